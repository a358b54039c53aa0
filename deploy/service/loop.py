"""The loop of a sampler.onnx as a graph that runs some of its network evaluations, so that it can stop in between."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import GraphProto, TensorProto, helper, numpy_helper

STATE, BEGIN, COUNT = "state", "begin", "most"
"""Tensors of a sampler.onnx that become inputs: the images between evaluations, float32 (3, B, C, H, W); the row of the
first evaluation in the tables of the loop, int64 (1,); and the number of evaluations to run, int64 ()."""
STATES = "states"
"""The output: the state after these. Its images are the next input of the network, x_t, and the last x_0_hat."""


class Loop(NamedTuple):
    """The graph, and where the evaluations of each number of steps are in its tables."""

    graph: bytes
    begins: NDArray[np.int64]
    """First row, by number of steps."""
    lengths: NDArray[np.int64]
    """Number of rows, by number of steps; 0 where a number is not allowed."""


def extract(content: bytes) -> Loop:
    """Extract the loop from a sampler.onnx; raises ValueError if it has none with these tensors."""
    model = onnx.load_from_string(content)
    graph, tables = model.graph, {tensor.name: tensor for tensor in model.graph.initializer}
    shape = next((list(_sides(value)) for value in graph.input if value.name == "noise"), [])
    made = {name for node in graph.node for name in node.output}
    if not {STATE, BEGIN, COUNT, STATES} <= made or not {"BEGINS", "LENGTHS"} <= tables.keys():
        raise ValueError("its graph is not one that ddpm export writes")
    images = helper.make_tensor_value_info(STATE, TensorProto.FLOAT, [3, *shape])
    begin = helper.make_tensor_value_info(BEGIN, TensorProto.INT64, [1])
    cut = {STATE: images, BEGIN: begin, COUNT: helper.make_tensor_value_info(COUNT, TensorProto.INT64, [])}
    nodes, needed = list[onnx.NodeProto](), {STATES}
    for node in reversed(graph.node):  # they are sorted, so what a node reads was written before it
        if needed & set(node.output) and not cut.keys() & set(node.output):
            nodes.insert(0, node)
            needed |= set(_read(node))
    inputs = [*(value for value in graph.input if value.name in needed), *cut.values()]
    output = helper.make_tensor_value_info(STATES, TensorProto.FLOAT, [3, *shape])
    kept = [tensor for name, tensor in tables.items() if name in needed]
    loop = helper.make_model(
        helper.make_graph(nodes, "loop", inputs, [output], kept),
        opset_imports=model.opset_import,
        ir_version=model.ir_version,
        functions=model.functions,
    )
    begins, lengths = (numpy_helper.to_array(tables[name]) for name in ("BEGINS", "LENGTHS"))
    return Loop(loop.SerializeToString(), begins, lengths)


def _sides(value: onnx.ValueInfoProto) -> Iterator[int | str]:
    for side in value.type.tensor_type.shape.dim:
        yield side.dim_param or side.dim_value


def _read(node: onnx.NodeProto) -> Iterator[str]:
    """What a node reads, including in its loop body."""
    yield from node.input
    for attribute in node.attribute:
        yield from _read_in(attribute.g)


def _read_in(graph: GraphProto) -> Iterator[str]:
    for node in graph.node:
        yield from _read(node)
