"""`ddpm verify-onnx` on whole files, and on what else people will give it."""

import json
import random
import re
from hashlib import sha256
from pathlib import Path

import onnx
import pytest
from onnx import numpy_helper

from diffusion.export import digest, metadata
from flows.__main__ import main
from tests.flows.commands.test_triton import exported

pytestmark = pytest.mark.slow

Capture = pytest.CaptureFixture[str]


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """A sampler's graph with its golden test."""
    return exported(tmp_path, False, "dpm-solver++").sampler


def changed(file: Path, key: str, value: str | None) -> None:
    """The file with other metadata, and the digest of what it is now."""
    graph = onnx.load_from_string(digest.check(file.read_bytes()))
    facts = {prop.key: prop.value for prop in graph.metadata_props}
    metadata.describe(graph, {name: text for name, text in (facts | {key: value}).items() if text is not None})
    file.write_bytes(digest.seal(graph.SerializeToString()))


def test_a_whole_file(file: Path, capsys: Capture) -> None:
    changed(file, "ddpm.heldout", json.dumps({"mse": 0.25, "images": 3}))
    assert main(["verify-onnx", str(file)]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"{file}: passes its golden test (the same bits) on CPUExecutionProvider",
        f"digest       {sha256(file.read_bytes()[:-64]).hexdigest()} (graph, weights and metadata are as they were "
        "written)",
        f"made from    a model.safetensors with the SHA-256 {'a' * 64}",
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
    (tmp_path / "sealed.onnx").write_bytes(digest.seal(b"hello"))
    (tmp_path / "bare.onnx").write_bytes(digest.check(file.read_bytes()))
    for name, message in (
        ("cut.onnx", "does not end with ddpm.sha256"),
        ("text.onnx", "does not end with ddpm.sha256"),
        ("bare.onnx", "does not end with ddpm.sha256"),
        ("sealed.onnx", "no ONNX model"),
        ("none.onnx", "No such file"),
    ):
        assert main(["verify-onnx", str(tmp_path / name)]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert f"{tmp_path / name}: " in line
        assert message in line
    assert main(["verify-onnx", str(file), "--device", "gpu"]) == 2
    assert "--device: " in capfd.readouterr().err


def test_each_of_many_flipped_bits_is_found(file: Path, tmp_path: Path, capfd: Capture) -> None:
    """Fifteen in the weights, and as many anywhere, through the command; some hundreds by the digest alone."""
    content, pick = file.read_bytes(), random.Random(0)
    loop = next(node for node in onnx.load_from_string(content).graph.node if node.op_type == "Loop")
    (largest,) = sorted(loop.attribute[0].g.initializer, key=lambda value: len(value.raw_data))[-1:]
    begin = content.index(largest.raw_data)
    bits = [8 * (begin + pick.randrange(len(largest.raw_data))) + pick.randrange(8) for _ in range(15)]
    bits += [pick.randrange(8 * len(content)) for _ in range(15)]
    bits += [8 * (len(content) - back) for back in (1, 64, 65, 66, 81, 82)]  # in the digest itself, and its entry
    for bit in bits:
        (tmp_path / "flipped.onnx").write_bytes(flipped(content, bit))
        assert main(["verify-onnx", str(tmp_path / "flipped.onnx")]) == 1
        (line,) = capfd.readouterr().err.splitlines()
        assert line.startswith(f"ddpm verify-onnx: error: {tmp_path / 'flipped.onnx'}: ")
        assert "ddpm.sha256" in line
    for _ in range(300):
        with pytest.raises(ValueError, match=r"ddpm\.sha256"):
            digest.check(flipped(content, pick.randrange(8 * len(content))))


def flipped(content: bytes, bit: int) -> bytes:
    changed = bytearray(content)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def test_the_digest_is_part_of_the_metadata_and_of_an_unchanged_file_alone(
    file: Path, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the check that deploy/ONNX.md describes, and as onnx reads it."""
    content = file.read_bytes()
    (program,) = re.findall(
        r"```python\n(import hashlib\n.*?)```", (root / "deploy" / "ONNX.md").read_text(), re.DOTALL
    )
    monkeypatch.chdir(file.parent)
    exec(program, {})
    file.write_bytes(flipped(content, 5000))
    with pytest.raises(AssertionError, match="damaged"):
        exec(program, {})
    graph = onnx.load_from_string(content)
    assert {prop.key: prop.value for prop in graph.metadata_props}["ddpm.sha256"] == content[-64:].decode()
    assert graph.SerializeToString() == content  # MLflow's copy of the file is the file
    weight = next(value for value in graph.graph.initializer if value.data_type == onnx.TensorProto.FLOAT)
    weight.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(weight) * 2, weight.name))
    with pytest.raises(ValueError, match="does not match the SHA-256"):
        digest.check(graph.SerializeToString())
