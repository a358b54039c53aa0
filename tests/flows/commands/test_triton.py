"""The model repository for Triton, as far as it can be tried without Triton: by ONNX Runtime, as Triton would."""

import shutil
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from diffusion.export import metadata, sampler_graph
from flows.__main__ import main
from flows.paths import Paths
from flows.stages.export import finished
from tests.export.test_sampler_graph import SHAPE, given, parts
from tests.process import fakes

pytestmark = pytest.mark.slow


def exported(root: Path, classes: bool, sampler: str, student: bool = False) -> Paths:
    """models/onnx, or models/student-onnx, with both graphs."""
    model, step = parts(classes)
    settings = fakes.options(sampler=sampler, threshold="clip", steps=4, guidance=2.5)
    loop = sampler_graph.to_onnx(step, model, settings)
    facts = metadata.of_model(model, "analytic", "a" * 64, "data", {}) | metadata.of_sampler(settings, loop)
    paths = Paths(root, student)
    paths.onnx.mkdir(parents=True)
    for path, graph in ((paths.denoiser, step), (paths.sampler, loop)):
        path.write_bytes(finished(path.name, graph, facts))
    return paths


def names_and_dims(line: str) -> tuple[str, list[int]]:
    return line.split('"')[1], [int(size) for size in line.split("dims: [")[1].split("]")[0].split(",")]


@pytest.mark.parametrize("classes", [False, True])
@pytest.mark.parametrize("sampler", ["dpm-solver++", "ddpm"])
def test_requests_can_be_joined_along_the_first_dimension(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, classes: bool, sampler: str
) -> None:
    paths = exported(tmp_path, classes, sampler)
    monkeypatch.chdir(tmp_path)
    assert main(["triton", "repository", "--max-batch", "16"]) == 0
    for name in ("denoiser", "sampler"):
        text = (tmp_path / "repository" / name / "config.pbtxt").read_text()
        assert f'name: "{name}"' in text
        assert "max_batch_size: 16" in text
        served = ort.InferenceSession(
            tmp_path / "repository" / name / "1" / "model.onnx", providers=["CPUExecutionProvider"]
        )
        declared = dict(names_and_dims(line) for line in text.splitlines() if line.startswith("  {"))
        for value in [*served.get_inputs(), *served.get_outputs()]:
            assert value.shape[0] == "B"
            sizes = [size if isinstance(size, int) else -1 for size in value.shape[1:]]
            assert declared.pop(value.name) == (sizes or [1])
        assert not declared
    inputs = given(3, 4)
    plain = ort.InferenceSession(paths.sampler, providers=["CPUExecutionProvider"])
    expected = plain.run(["images"], {value.name: inputs[value.name] for value in plain.get_inputs()})[0]
    inputs["steps_noise"] = inputs["steps_noise"].swapaxes(0, 1)
    asked = {value.name: inputs[value.name] for value in served.get_inputs()}
    assert set(asked) <= {"noise", "y", "steps_noise"}
    assert np.array_equal(served.run(["images"], asked)[0], expected)
    assert expected.shape == (3, *SHAPE[1:], SHAPE[0])
    inputs["noise"][1, 0, 0, 0] = np.nan
    with pytest.raises(Exception, match="noise must be from -1000 to 1000"):
        served.run(["images"], asked)
    assert "ddpm.sha256" not in served.get_modelmeta().custom_metadata_map  # it was of the file before


def test_the_graphs_of_the_student(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(tmp_path, False, "consistency", student=True)
    monkeypatch.chdir(tmp_path)
    assert main(["triton", "repository"]) == 1
    assert "models/onnx/denoiser.onnx: No such file or directory; `dvc repro" in capsys.readouterr().err
    assert main(["triton", "repository", "--student"]) == 0
    graph = onnx.load(tmp_path / "repository" / "sampler" / "1" / "model.onnx")
    facts = {prop.key: prop.value for prop in graph.metadata_props}
    assert facts["ddpm.sampler"] == "consistency"


def test_a_damaged_graph_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path = exported(tmp_path, False, "ddim").sampler
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    monkeypatch.chdir(tmp_path)
    assert main(["triton", "repository"]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "models/onnx/sampler.onnx: does not match the SHA-256 in ddpm.sha256" in line
    assert not (tmp_path / "repository").exists()


def test_what_is_there_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    exported(tmp_path, False, "ddim")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "letter.txt").write_text("dear")
    for options in ([], ["--force"]):
        assert main(["triton", "used", *options]) == 1
    assert main(["triton", "repository"]) == 0
    assert main(["triton", "repository"]) == 1
    assert main(["triton", "repository", "--force"]) == 0
    assert main(["triton", "other", "--max-batch", "0"]) == 2
    shutil.rmtree(tmp_path / "models")
    assert main(["triton", "other"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 5
    assert lines[0] == lines[1]
    assert "used: already there" in lines[0]
    assert "--max-batch: must be from 1 to 2147483647 (got 0)" in lines[3]
    assert "models/onnx/denoiser.onnx: No such file or directory; `dvc repro export` writes it" in lines[4]
    assert (tmp_path / "used" / "letter.txt").read_text() == "dear"
    assert not (tmp_path / "other").exists()
