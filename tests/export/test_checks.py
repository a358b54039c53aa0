"""Checks that prevent an export, and the metadata of the model."""

import io
import json
import math
from collections import Counter
from contextlib import redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any, cast

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray

from diffusion.errors import UserError
from diffusion.export import metadata, parity, runtime, sampler_graph
from diffusion.pairs.pairs import MANIFEST
from diffusion.storage.files import write_json, write_sums
from flows.paths import Paths
from flows.stages import export
from tests.export.test_sampler_graph import parts
from tests.process import fakes
from tests.training import trees

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(("classes", "sampler"), [(False, "ddpm"), (True, "dpm-solver++")])
def test_images_of_other_weights_are_rejected(classes: bool, sampler: str) -> None:
    model, step = parts(classes)
    settings = fakes.options(sampler=sampler, steps=3, threshold="clip")
    graph = sampler_graph.to_onnx(step, model, settings)
    facts = metadata.of_model(model, "analytic", "weights", "data", {})
    metadata.describe(graph, facts | metadata.of_sampler(settings, graph))
    loaded = parity.session(graph.SerializeToString(), torch.device("cpu"))
    found = parity.check_sampler(loaded, model, settings)
    assert found["images"] == 64
    assert found["values_off_by_one"] <= parity.MAX_OFF_BY_ONE
    weights = max(model.net.parameters(), key=torch.numel)
    before = weights.detach().clone()
    try:
        with torch.no_grad():
            weights.mul_(1.2)
        with pytest.raises(UserError, match=r"sampler\.onnx: .* of its pixel values differ .* no model was written"):
            parity.check_sampler(loaded, model, settings)
    finally:
        weights.data.copy_(before)


class Recording:
    """A session that keeps what it is given."""

    def __init__(self, session: ort.InferenceSession) -> None:
        self.get_inputs, self.get_modelmeta, self._run = session.get_inputs, session.get_modelmeta, session.run
        self.fed = list[dict[str, NDArray[Any]]]()

    def run(self, names: list[str], feed: dict[str, NDArray[Any]]) -> list[Any]:
        self.fed.append(feed)
        return self._run(names, feed)


def test_noise_of_many_steps_is_made_for_a_part_of_the_images(monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = parts(True)
    settings = fakes.options(sampler="ddpm", steps=3, threshold="clip")
    graph = sampler_graph.to_onnx(step, model, settings)
    facts = metadata.of_model(model, "analytic", "weights", "data", {})
    metadata.describe(graph, facts | metadata.of_sampler(settings, graph))
    loaded = parity.session(graph.SerializeToString(), torch.device("cpu"))

    def given(most: int) -> list[dict[str, NDArray[Any]]]:
        monkeypatch.setattr(parity, "MAX_NOISE", most)
        recording = Recording(loaded)
        assert parity.check_sampler(cast("ort.InferenceSession", recording), model, settings)["images"] == 64
        return recording.fed

    whole, some = (given(most) for most in (parity.MAX_NOISE, 27 * 3 * 4 * math.prod(model.shape) + 1))
    for fed, sizes in ((whole, {1: 8, 7: 8, 64: 1}), (some, {1: 8, 7: 7, 6: 2, 27: 2, 10: 1})):
        assert Counter(len(feed["noise"]) for feed in fed) == {size: 2 * count for size, count in sizes.items()}
    for fed in (whole, some):
        assert all(feed["steps_noise"].shape == (3, *feed["noise"].shape) for feed in fed)
        assert {label for feed in fed for label in feed["y"].tolist()} == {-1, 0, 1, 2}
        largest = max(len(feed["noise"]) for feed in fed)
        noise = np.concatenate([feed["noise"] for feed in fed if len(feed["noise"]) == largest])
        assert len(np.unique(noise.reshape(len(noise), -1), axis=0)) >= 54  # other images have other noise


def test_a_graph_that_cannot_be_run_is_rejected() -> None:
    _, step = parts(False)
    broken = onnx.ModelProto.FromString(step.SerializeToString())
    del broken.graph.node[3]
    with pytest.raises(UserError, match=r"denoiser\.onnx: the graph cannot be run .* no model was written"):
        export.finished("denoiser.onnx", broken, {})


def test_int8_without_val_pairs_is_refused_before_anything_is_written(whole_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(whole_tree, tmp_path / "tree")
    pairs, before = tree / "data/pairs", trees.digests(tree, "models", "reports")
    manifest = json.loads((pairs / MANIFEST).read_text())
    manifest["splits"]["val"] = {"images": 0, "blocks": 0, "tars": []}
    write_json(pairs / MANIFEST, manifest)
    write_sums(pairs, {tar["name"]: tar["sha256"] for split in manifest["splits"].values() for tar in split["tars"]})
    done = trees.run(tree, "export")
    assert done.returncode == 1
    message = "export.variants: int8 is calibrated on val pairs, and data/pairs has none; remove int8, or increase"
    assert [line for line in done.stderr.splitlines() if message in line] == done.stderr.splitlines()[-1:]
    assert "Traceback" not in done.stderr
    assert "tracing" not in done.stderr
    assert trees.digests(tree, "models", "reports") == before


def test_scores_are_of_these_weights_and_pairs_or_none(tmp_path: Path) -> None:
    paths = Paths(tmp_path)
    assert export.scores(paths, "w", "p") == {}
    write_json(paths.evaluate_report, {"mse": 0.25})
    assert export.scores(paths, "w", "p") == {}
    report = sha256(paths.evaluate_report.read_bytes()).hexdigest()
    write_json(paths.evaluation / "scored.json", {"weights_sha256": "w", "pairs_sha256": "p", "report_sha256": report})
    write_sums(paths.evaluation)
    assert export.scores(paths, "w", "p") == {"mse": 0.25}
    assert export.scores(paths, "other", "p") == {}
    assert export.scores(paths, "w", "other") == {}
    write_json(paths.evaluate_report, {"mse": 0.2})
    with pytest.raises(UserError, match=r"evaluate\.json: damaged \(it does not match its digest\)"):
        export.scores(paths, "w", "p")


def test_the_facts_give_the_schedule_back_exactly() -> None:
    model, _ = parts(True)
    facts = metadata.of_model(model, "analytic", "weights", "data", {})
    alpha_bar = np.array(json.loads(facts["ddpm.alpha_bar"]))
    assert np.array_equal(alpha_bar, model.process.schedule.alpha_bar.numpy())
    assert facts["ddpm.classes"] == '["0", "1", "2"]'
    assert facts["ddpm.parameterization"] == "v"


def test_the_libraries_of_cuda_are_loaded_before_a_session_on_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[object]()

    def prints_and_loads() -> None:
        print("not found")
        done.append("libraries")

    monkeypatch.setattr(ort, "preload_dlls", prints_and_loads)
    monkeypatch.setattr(ort, "get_available_providers", lambda: [runtime.CUDA, "CPUExecutionProvider"])
    monkeypatch.setattr(ort, "InferenceSession", lambda *_, providers: done.append(providers))
    runtime._load_cuda.cache_clear()
    runtime.session(b"", None)
    assert done == [["CPUExecutionProvider"]]
    with redirect_stdout(io.StringIO()) as printed:
        runtime.session(b"", 1)
        runtime.session(b"", 1)
    exact = {"device_id": 1, "use_tf32": 0, "cudnn_conv_algo_search": "DEFAULT"}
    assert done[1:] == ["libraries", *2 * [[(runtime.CUDA, exact), "CPUExecutionProvider"]]]
    assert not printed.getvalue()


def test_a_gpu_that_onnx_runtime_cannot_use_is_replaced_only_where_it_was_not_asked_for(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(parity.ort, "get_available_providers", lambda: ["CPUExecutionProvider"])
    _, step = parts(False)
    content, gpu = step.SerializeToString(), torch.device("cuda", 0)
    with pytest.raises(UserError, match=r"^device: ONNX Runtime cannot use cuda:0; set device to auto or cpu$"):
        parity.session(content, gpu)
    made = parity.session(content, gpu, required=False)
    assert made.get_providers() == ["CPUExecutionProvider"]
    assert "ONNX Runtime cannot use cuda:0; running the graph on the CPU" in capsys.readouterr().err
    made = parity.session(content, torch.device("mps"))
    assert made.get_providers() == ["CPUExecutionProvider"]
    assert "ONNX Runtime cannot use mps; running the graph on the CPU" in capsys.readouterr().err
