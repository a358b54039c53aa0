"""The golden test embedded in a file."""

import json

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import numpy_helper

from diffusion.export import golden, metadata, sampler_graph
from tests.export.test_sampler_graph import parts, session
from tests.process import fakes

pytestmark = pytest.mark.slow


def files(classes: bool) -> list[onnx.ModelProto]:
    """Both graphs with their metadata and golden tests."""
    model, step = parts(classes)
    settings = fakes.options(sampler="dpm-solver++-sde", threshold="clip", steps=4)
    loop = sampler_graph.to_onnx(step, model, settings)
    step = onnx.ModelProto.FromString(step.SerializeToString())
    facts = metadata.of_model(model, "analytic", "weights", "data", {"mse": 0.5}) | metadata.of_sampler(settings, loop)
    for graph in (step, loop):
        metadata.describe(graph, facts | {"ddpm.golden": golden.record(session(graph), facts)})
    return [step, loop]


def checked(graph: onnx.ModelProto) -> golden.Outcome:
    loaded: ort.InferenceSession = session(graph)
    return golden.check(loaded, loaded.get_modelmeta().custom_metadata_map)


@pytest.mark.parametrize("classes", [False, True])
def test_a_whole_file_passes_to_the_bit(classes: bool) -> None:
    for graph in files(classes):
        assert checked(graph) == golden.Outcome(exact=True, largest=pytest.approx(0, abs=1e-6))


def test_other_weights_fail() -> None:
    step, loop = files(False)
    body = next(node for node in loop.graph.node if node.op_type == "Loop").attribute[0].g
    for graph, initializers in ((step, step.graph.initializer), (loop, body.initializer)):
        weight = max(initializers, key=lambda value: value.ByteSize())
        weight.CopyFrom(numpy_helper.from_array(1.5 * numpy_helper.to_array(weight), weight.name))
        with pytest.raises(ValueError, match=r"golden test failed: (eps_hat|images) differs by up to"):
            checked(graph)


def test_another_schedule_fails() -> None:
    step, _ = files(False)
    for prop in step.metadata_props:
        if prop.key == "ddpm.alpha_bar":
            prop.value = json.dumps([0.9, *json.loads(prop.value)[1:]])
    with pytest.raises(
        ValueError, match=r"ddpm\.alpha_bar does not match ddpm\.alpha_bar_sha256: the file was modified"
    ):
        checked(step)


def test_a_file_without_a_golden_test_is_rejected() -> None:
    _, step = parts(False)
    bare = onnx.ModelProto.FromString(step.SerializeToString())
    with pytest.raises(ValueError, match="has no golden test that can be run"):
        checked(bare)


def test_rounding_does_not_fail() -> None:
    step, _ = files(False)
    weight = max(step.graph.initializer, key=lambda value: value.ByteSize())
    nudged = numpy_helper.to_array(weight) * np.float32(1 + 1e-6)
    weight.CopyFrom(numpy_helper.from_array(nudged, weight.name))
    outcome = checked(step)
    assert not outcome.exact
    assert 0 < outcome.largest < 1e-3


def test_the_noise_is_what_a_consumer_makes_of_the_document() -> None:
    """deploy/ONNX.md promises it: numpy's Philox with the key [seed, number]."""
    numbers = [[0.059911035, 0.015559634, -1.1644385], [-1.431463, 1.6707169, -0.40272397]]
    for number, expected in enumerate(numbers):
        np.testing.assert_array_equal(golden.normal(0, number, (1, 3)), np.float32([expected]))
