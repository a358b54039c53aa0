"""The graphs themselves reject impossible inputs."""

import json
from functools import cache
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from onnx import helper, parser

from diffusion.export import metadata, parity, ranges, sampler_graph
from flows.stages.export import finished
from tests.export.test_sampler_graph import SHAPE, given, parts
from tests.export.test_variants import graph as variant
from tests.process import fakes

pytestmark = pytest.mark.slow

T, CLASSES = 100, 3
BEYOND: list[Any] = [np.nan, np.inf, -np.inf, 1000.5, -1e30]


@cache
def loaded(name: str, precision: str = "fp32") -> ort.InferenceSession:
    """A complete file: the denoiser, or a sampler by name, of a class-conditional network."""
    model, step = parts(True)
    graph = step if precision == "fp32" else variant(precision)
    facts = metadata.of_model(model, "analytic", "weights", "data", {})
    if name != "denoiser":
        settings = fakes.options(sampler=name, threshold="clip", steps=4, guidance=2.5)
        graph = sampler_graph.to_onnx(graph, model, settings)
        facts |= metadata.of_sampler(settings, graph)
    return parity.session(finished("model.onnx", graph, facts), torch.device("cpu"))


def inputs(session: ort.InferenceSession) -> dict[str, Any]:
    whole = given(4, 4) | {"t": np.array([0, 1, 50, T - 1])}
    whole["x_t"] = whole["noise"]
    return {value.name: whole[value.name].copy() for value in session.get_inputs()}


@pytest.mark.parametrize(
    ("name", "precision", "field", "values", "line"),
    [
        ("denoiser", "fp32", "t", [-1, T, 2**62], "t must be from 0 to 99"),
        ("denoiser", "fp32", "x_t", BEYOND, "x_t must be from -1000 to 1000"),
        ("denoiser", "fp32", "y", [-2, CLASSES, 10], "y must be from -1 to 2"),
        ("denoiser", "fp16", "t", [-1, T], "t must be from 0 to 99"),
        ("denoiser", "fp16", "x_t", BEYOND, "x_t must be from -1000 to 1000"),
        ("denoiser", "int8", "t", [-1, T], "t must be from 0 to 99"),
        ("denoiser", "int8", "y", [-2, CLASSES], "y must be from -1 to 2"),
        ("dpm-solver++", "fp32", "noise", BEYOND, "noise must be from -1000 to 1000"),
        ("dpm-solver++", "fp32", "y", [-2, CLASSES, 10], "y must be from -1 to 2"),
        ("dpm-solver++", "fp32", "guidance", BEYOND, "guidance must be from -1000 to 1000"),
        ("dpm-solver++", "int8", "noise", BEYOND, "noise must be from -1000 to 1000"),
        ("dpm-solver++", "fp16", "guidance", BEYOND, "guidance must be from -1000 to 1000"),
        ("ddpm", "fp32", "noise", BEYOND, "noise must be from -1000 to 1000"),
        ("ddpm", "fp32", "steps_noise", BEYOND, "steps_noise must be from -1000 to 1000"),
    ],
)
def test_what_is_out_of_range_is_an_error(name: str, precision: str, field: str, values: list[Any], line: str) -> None:
    session = loaded(name, precision)
    good = inputs(session)
    low, high = json.loads(session.get_modelmeta().custom_metadata_map["ddpm.ranges"])[field]
    assert line == f"{field} must be from {low} to {high}"
    for value in values:
        wrong = good[field].copy()
        wrong.flat[-1] = value  # one of them is enough
        with pytest.raises(Exception, match=f"Name:'{line}'"):
            session.run(None, good | {field: wrong})
    for value in (low, high):
        edge = good[field].copy()
        edge.flat[-1] = value
        assert all(np.isfinite(output).all() for output in session.run(None, good | {field: edge}))


def test_the_checks_change_no_output() -> None:
    _, step = parts(True)
    bare = parity.session(step.SerializeToString(), torch.device("cpu"))
    for found, expected in zip(*(each.run(None, inputs(each)) for each in (loaded("denoiser"), bare)), strict=True):
        assert np.array_equal(found, expected)
    assert found.shape == (4, *SHAPE)


def test_the_ranges_are_those_of_the_inputs() -> None:
    found = json.loads(loaded("dpm-solver++").get_modelmeta().custom_metadata_map["ddpm.ranges"])
    assert found == {"noise": [-1000, 1000], "steps": [0, 50], "y": [-1, 2], "guidance": [-1000, 1000]}
    assert ranges.of_inputs(["x_t", "t"], 20, 0) == {"x_t": [-1000, 1000], "t": [0, 19]}
    assert ranges.of_inputs(["steps"], 20, 0) == {"steps": [0, 20]}


def test_a_tensor_inside_a_graph_can_be_checked() -> None:
    """Also a tensor that is read in the body of a condition."""
    graph = parser.parse_graph(
        """
        g (float[N] x) => (float[N] z) {
            y = Add (x, x)
            yes = Constant <value = bool {1}> ()
            z = If (yes) <
                then_branch = a () => (float[N] one) { one = Identity (y) },
                else_branch = b () => (float[N] two) { two = Neg (y) }
            >
        }
        """
    )
    ranges.require(graph, "y", np.float32(-2), np.float32(4), "y is out of range")
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    onnx.checker.check_model(model, full_check=True)
    session = parity.session(model.SerializeToString(), torch.device("cpu"))
    assert session.run(None, {"x": np.float32([-1, 2])})[0].tolist() == [-2, 4]
    with pytest.raises(Exception, match="y is out of range"):
        session.run(None, {"x": np.float32([-1, 2.5])})


def test_the_files_ask_for_no_newer_runtime_than_their_operators() -> None:
    """IR 9 came with opset 20 in onnx 1.15, which ONNX Runtime 1.17 has: onnx/docs/Versioning.md."""
    model, step = parts(True)
    assert [(opset.domain, opset.version) for opset in step.opset_import] == [("", 20)]
    loop = sampler_graph.to_onnx(step, model, fakes.options(sampler="ddim", steps=4))
    for graph in (step, loop, variant("fp16"), variant("int8")):
        assert graph.ir_version == 9
