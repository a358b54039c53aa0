"""The model repository for Triton, as far as it can be tried without Triton: by ONNX Runtime, as Triton would."""

import ast
import re
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
from tests.deploy.services import same
from tests.export.test_sampler_graph import SHAPE, given, parts
from tests.process import fakes

pytestmark = pytest.mark.slow

SAMPLER, CONFIG = "repository/sampler/1/model.onnx", "repository/sampler/config.pbtxt"


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
    inputs["guidance"] = inputs["guidance"].repeat(3)
    asked = {value.name: inputs[value.name] for value in served.get_inputs()}
    assert set(asked) == {value.name for value in plain.get_inputs()} - {"steps"}
    assert np.array_equal(served.run(["images"], asked)[0], expected)
    assert expected.shape == (3, *SHAPE[1:], SHAPE[0])
    inputs["noise"][1, 0, 0, 0] = np.nan
    with pytest.raises(Exception, match="noise must be from -1000 to 1000"):
        served.run(["images"], asked)
    assert "ddpm.sha256" not in served.get_modelmeta().custom_metadata_map  # it was of the file before


@pytest.mark.parametrize("sampler", ["dpm-solver++", "ddpm"])
def test_guidance_is_chosen_for_each_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, sampler: str) -> None:
    plain = ort.InferenceSession(exported(tmp_path, True, sampler).sampler, providers=["CPUExecutionProvider"])
    monkeypatch.chdir(tmp_path)
    assert main(["triton", "repository"]) == 0
    served = ort.InferenceSession(tmp_path / SAMPLER, providers=["CPUExecutionProvider"])
    inputs, numbers = given(5, 4), np.array([0, 1, 2.5, -3, 7], np.float32)
    asked = {value.name: inputs[value.name] for value in served.get_inputs()} | {"guidance": numbers}
    if "steps_noise" in asked:
        asked["steps_noise"] = inputs["steps_noise"].swapaxes(0, 1)
    images, x_0 = served.run(None, asked)
    for image, guidance in enumerate(numbers):
        feeds = {value.name: inputs[value.name] for value in plain.get_inputs()} | {"guidance": guidance[None]}
        expected = plain.run(None, feeds)
        np.testing.assert_allclose(x_0[image], expected[1][image], rtol=0, atol=1e-4)
        same(images[image], expected[0][image])
    for wrong in (1001, np.nan):
        with pytest.raises(Exception, match="guidance must be from -1000 to 1000"):
            served.run(None, asked | {"guidance": np.where(numbers == 7, wrong, numbers).astype(np.float32)})


def test_without_guidance_the_network_runs_on_each_image_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported(tmp_path, True, "ddim")
    monkeypatch.chdir(tmp_path)
    assert main(["triton", "repository"]) == 0
    graph = onnx.load(tmp_path / SAMPLER)
    (body,) = (node.attribute[0].g for node in graph.graph.node if node.op_type == "Loop")
    # The states become the timesteps of the network's last evaluation, one for each image that it sees.
    added = onnx.parser.parse_graph("added (int64[N] t) => (float now) { n = Shape (t) shown = Cast <to = 1> (n) }")
    body.node.extend(added.node)
    body.output.append(onnx.helper.make_tensor_value_info("shown", onnx.TensorProto.FLOAT, [1]))
    loop = next(node for node in graph.graph.node if node.op_type == "Loop")
    loop.output.append("seen")
    graph.graph.output.append(onnx.helper.make_tensor_value_info("seen", onnx.TensorProto.FLOAT, [None, 1]))
    served, inputs = ort.InferenceSession(graph.SerializeToString()), given(3, 4)
    for guidance, seen in (([1, 1, 1], 3), ([1, 1, 2], 6), ([0, 0, 0], 6)):
        asked = {"noise": inputs["noise"], "y": inputs["y"], "guidance": np.array(guidance, np.float32)}
        assert (served.run(["seen"], asked)[0] == seen).all()


def test_the_configuration_has_what_clients_need(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = exported(tmp_path, True, "ddim")
    monkeypatch.chdir(tmp_path)
    assert main(["triton", "repository"]) == 0
    facts = ort.InferenceSession(paths.sampler).get_modelmeta().custom_metadata_map
    found = dict(
        re.findall(r'parameters { key: "(.*)" value { string_value: (".*") } }', (tmp_path / CONFIG).read_text())
    )
    names = ("ddpm.classes", "ddpm.guidance", "ddpm.ranges", "ddpm.steps")
    assert {key: ast.literal_eval(value) for key, value in found.items()} == {name: facts[name] for name in names}
    assert facts["ddpm.guidance"] == "2.5"


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
