"""Allowed ranges of an ONNX graph's inputs, and nodes that make runs fail outside of them."""

from collections.abc import Iterable

import numpy as np
from onnx import GraphProto, TensorProto, helper, numpy_helper

from diffusion.export.runtime import MAX_FREE_STEPS

MAX_MAGNITUDE = 1000
"""Maximum magnitude of noise, noisy images and guidance; larger values are certainly mistakes."""


def of_inputs(names: Iterable[str], num_timesteps: int, num_classes: int) -> dict[str, list[int]]:
    """Minimum and maximum of each of a graph's inputs."""
    known = {
        "steps": [0, min(MAX_FREE_STEPS, num_timesteps)],
        "x_t": [-MAX_MAGNITUDE, MAX_MAGNITUDE],
        "t": [0, num_timesteps - 1],
        "noise": [-MAX_MAGNITUDE, MAX_MAGNITUDE],
        "steps_noise": [-MAX_MAGNITUDE, MAX_MAGNITUDE],
        "y": [-1, num_classes - 1],
        "guidance": [-MAX_MAGNITUDE, MAX_MAGNITUDE],
    }
    return {name: known[name] for name in names if name in known}


def require_inputs(graph: GraphProto, allowed: dict[str, list[int]]) -> None:
    """Make runs of a graph fail unless its inputs are within the ranges of `of_inputs`; NaN is never allowed.

    The number of steps is checked in sampler_graph.py instead, since the exported number may be outside the range.
    """
    kinds = {value.name: value.type.tensor_type.elem_type for value in graph.input}
    for name, (low, high) in allowed.items():
        if name != "steps":
            kind = np.float32 if kinds[name] == TensorProto.FLOAT else np.int64
            require(graph, name, kind(low), kind(high), f"{name} must be from {low} to {high}")


def require(graph: GraphProto, name: str, low: np.generic, high: np.generic, message: str) -> None:
    """Make runs of a graph fail with `message` unless all values of the tensor `name` are in [`low`, `high`].

    ONNX has no assertion operator. But ONNX Runtime rejects a Slice with a step of zero on all devices: the step is
    validated on the CPU even if the tensor is on a GPU, and without a C++ exception, which browser builds could not
    catch. (An index out of range is only an error on CPUs.) The error message contains the node's name.
    """
    checked = f"{name}.checked"
    rename(graph, name, checked)

    def part(what: str) -> str:
        return f"{name}.{what}"

    constants = {
        "low": low,
        "high": high,
        "flat": np.array([-1]),
        "zero": np.zeros(1, np.int32),
        "end": np.array([np.iinfo(np.int32).max], np.int32),
    }
    graph.initializer.extend(
        numpy_helper.from_array(np.asarray(value), part(what)) for what, value in constants.items()
    )
    nodes = [
        helper.make_node("Clip", [name, part("low"), part("high")], [part("clipped")]),
        helper.make_node("Equal", [name, part("clipped")], [part("holds")]),  # nothing equals NaN
        helper.make_node("Cast", [part("holds")], [part("holds_as_int")], to=TensorProto.INT32),
        helper.make_node("Reshape", [part("holds_as_int"), part("flat")], [part("holds_flat")]),
        helper.make_node("ReduceMin", [part("holds_flat")], [part("step")], keepdims=1),
        helper.make_node(
            "Slice", [name, part("zero"), part("end"), part("zero"), part("step")], [checked], name=message
        ),
    ]
    place = next((index + 1 for index, node in enumerate(graph.node) if name in node.output), 0)
    for index, node in enumerate(nodes, place):
        graph.node.insert(index, node)


def rename(graph: GraphProto, old: str, new: str) -> None:
    """Rename a tensor in all nodes that read it, including those in loop bodies."""
    for node in graph.node:
        node.input[:] = [new if name == old else name for name in node.input]
        for attribute in node.attribute:
            rename(attribute.g, old, new)
