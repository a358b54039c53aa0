"""The loop of a sampler.onnx, in pieces, against the whole graph."""

import json
from itertools import pairwise
from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import helper

from deploy.service import loop
from deploy.service.models import Model, RejectedModel, to_uint8
from deploy.service.work import Span
from diffusion.export import runtime, sampler_graph
from tests.deploy.models import write_model
from tests.export.test_sampler_graph import given, parts
from tests.process import fakes

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("changes", fakes.SAMPLERS, ids=lambda changes: "-".join(map(str, changes.values())))
def test_evaluations_in_pieces_are_those_of_the_whole_graph(changes: dict[str, object]) -> None:
    classes = changes["sampler"] in ("heun", "ddpm")
    model, step = parts(classes)
    settings = fakes.options(**fakes.guided(changes), steps=5, threshold="clip")
    content = sampler_graph.to_onnx(step, model, settings).SerializeToString()
    whole, found = runtime.session(content, None, 1), loop.extract(content)
    pieces = runtime.session(found.graph, None, 1)
    inputs = given(3, 5)
    names = [value.name for value in whole.get_inputs()]
    images, x_0 = whole.run(None, {name: inputs[name] for name in names})
    stochastic = "steps_noise" in names
    evaluations = found.lengths[5]
    assert evaluations == (8 if changes["sampler"] == "heun" else 5)  # two of its steps take only one
    state = np.stack([inputs["noise"]] * 3)
    for first, last in pairwise([0, 1, 4, evaluations]):
        own = {name: inputs[name] for name in names if name in ("y", "guidance")}
        own |= {"steps_noise": inputs["steps_noise"][first:last]} if stochastic else {}
        place = {"begin": found.begins[[5]] + first, "most": np.array(last - first)}
        (state,) = pieces.run(None, {"state": state, **place, **own})
    np.testing.assert_array_equal(state[0], x_0)
    np.testing.assert_array_equal(to_uint8(state[0]), images)


def test_the_state_has_the_estimate_of_the_clean_images(tmp_path: Path) -> None:
    """DDIM steps from x_t to sqrt(a) x_0_hat + sqrt(1 - a) eps_hat, whose eps_hat follows from x_t and x_0_hat."""
    model = Model(write_model(tmp_path / "sampler.onnx", "ddim", False).read_bytes())
    facts = {each.key: each.value for each in onnx.load(tmp_path / "sampler.onnx").metadata_props}
    alpha_bar = np.array(json.loads(facts["ddpm.alpha_bar"]))
    noise = given(2, 1)["noise"]
    steps = model.evaluations(0)
    t, s = np.round(np.linspace(99, 0, steps)).astype(int)[:2]
    (x_s, _, x_0_hat) = model.run({"noise": noise}, Span(steps, 0, 1))["state"]
    eps_hat = (noise - np.sqrt(alpha_bar[t]) * x_0_hat) / np.sqrt(1 - alpha_bar[t])
    expected = np.sqrt(alpha_bar[s]) * x_0_hat + np.sqrt(1 - alpha_bar[s]) * eps_hat
    np.testing.assert_allclose(x_s, expected, rtol=1e-3, atol=1e-4)


def test_a_graph_without_the_loop() -> None:
    value = helper.make_tensor_value_info("noise", onnx.TensorProto.FLOAT, ["B", 1, 2, 2])
    output = helper.make_tensor_value_info("images", onnx.TensorProto.FLOAT, ["B", 1, 2, 2])
    graph = helper.make_graph([helper.make_node("Identity", ["noise"], ["images"])], "other", [value], [output])
    content = helper.make_model(graph).SerializeToString()
    with pytest.raises(ValueError, match=r"^its graph is not one that ddpm export writes$"):
        loop.extract(content)


def test_a_loop_that_computes_something_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    content = write_model(tmp_path / "sampler.onnx", "ddim", False).read_bytes()
    extract = loop.extract
    monkeypatch.setattr(loop, "extract", lambda found: (each := extract(found))._replace(begins=each.begins + 1))
    with pytest.raises(RejectedModel, match=r"^its loop computes other images than the whole graph$"):
        Model(content)
