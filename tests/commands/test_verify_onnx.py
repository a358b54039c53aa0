"""`ddpm verify-onnx` on whole files, and on what else people will give it."""

import json
from pathlib import Path

import onnx
import pytest

from diffusion.__main__ import main
from diffusion.export import golden, metadata
from tests.commands.test_triton import exported
from tests.export.test_sampler_graph import session

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sampler's graph with its golden test."""
    graph = exported(tmp_path, False, "dpm-solver++")
    facts = {prop.key: prop.value for prop in graph.metadata_props}
    metadata.describe(graph, facts | {"ddpm.golden": golden.made(session(graph), facts)})
    onnx.save_model(graph, tmp_path / "sampler.onnx")
    return tmp_path / "sampler.onnx"


def changed(file: Path, key: str, value: str | None) -> None:
    graph = onnx.load(file)
    facts = {prop.key: prop.value for prop in graph.metadata_props}
    metadata.describe(graph, {name: text for name, text in (facts | {key: value}).items() if text is not None})
    onnx.save_model(graph, file)


def test_a_whole_file(file: Path, capsys: Capture) -> None:
    changed(file, "ddpm.heldout", json.dumps({"mse": 0.25, "images": 3}))
    assert main(["verify-onnx", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: passes its golden test (the same bits) on CPUExecutionProvider",
        f"weights   {'a' * 64}",
        "mse          0.2500",
    ]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ddpm.golden", None),
        ("ddpm.golden", "[]"),
        ("ddpm.golden", '{"seed": -1}'),
        ("ddpm.height", "9"),
        ("ddpm.steps", "51"),
        ("ddpm.alpha_bar", "{}"),
        ("ddpm.alpha_bar", "[0.5]"),
    ],
)
def test_a_changed_file_gets_one_line(file: Path, key: str, value: str | None, capfd: Capture) -> None:
    changed(file, key, value)
    assert main(["verify-onnx", str(file)]) == 1
    (line,) = capfd.readouterr().err.splitlines()
    assert line.startswith(f"ddpm verify-onnx: error: {file}: ")
    assert "changed" in line


def test_what_is_no_such_file_gets_one_line(file: Path, tmp_path: Path, capfd: Capture) -> None:
    (tmp_path / "cut.onnx").write_bytes(file.read_bytes()[:5000])
    (tmp_path / "text.onnx").write_text("hello")
    for name, message in (("cut.onnx", "no ONNX model"), ("text.onnx", "no ONNX model"), ("none.onnx", "No such file")):
        assert main(["verify-onnx", str(tmp_path / name)]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert f"{tmp_path / name}: " in line
        assert message in line
    assert main(["verify-onnx", str(file), "--device", "gpu"]) == 1
    assert "--device: " in capfd.readouterr().err
