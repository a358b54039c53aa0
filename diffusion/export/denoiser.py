"""One denoising step as an ONNX graph."""

import copy
import logging
import warnings

import onnx
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812

from diffusion.model import Model
from diffusion.nn.layers import GroupNorm
from diffusion.process.parameterization import Parameterization, split


class Step(nn.Module):
    """(x_t float32 (B, C, H, W), t int64 (B,)[, y int64 (B,)]) to eps_hat and x_0_hat, for any parameterization.

    `y` is the class of each image, -1 for none; only for class-conditional networks.
    """

    def __init__(self, net: nn.Module, parameterization: Parameterization) -> None:
        super().__init__()
        self.net = net
        self.parameterization = parameterization

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, Tensor]:
        out, _ = split(self.net(x_t, t, y), x_t.shape[1])
        return self.parameterization.to_eps(out, x_t, t), self.parameterization.to_x_0(out, x_t, t)


class FastGroupNorm(nn.Module):
    """A GroupNorm that is faster in ONNX Runtime: combines its affine layer and the modulation to one scale and shift.

    The exporter would convert GroupNorm to InstanceNormalization, which is single-threaded in ONNX Runtime.
    """

    def __init__(self, norm: GroupNorm) -> None:
        super().__init__()
        self.norm = norm

    def forward(self, x: Tensor, scale: Tensor | None = None, shift: Tensor | None = None) -> Tensor:
        grouped = x.unflatten(1, (self.norm.num_groups, -1))
        normalized = F.layer_norm(grouped, grouped.shape[2:], eps=self.norm.eps).flatten(1, 2)
        factor, term = self.norm.weight[None], self.norm.bias[None]
        if scale is not None and shift is not None:
            factor, term = factor * (1 + scale), term * (1 + scale) + shift
        return normalized * factor[:, :, None, None] + term[:, :, None, None]


def to_onnx(model: Model, opset: int) -> onnx.ModelProto:
    """Export the graph with a dynamic batch size; deterministic."""
    module = Step(copy.deepcopy(model.net).cpu(), model.process.parameterization).eval()
    for part in list(module.modules()):
        for name, child in part.named_children():
            if isinstance(child, GroupNorm):
                setattr(part, name, FastGroupNorm(child))
    example = {"x_t": torch.zeros(2, *model.shape), "t": torch.zeros(2, dtype=torch.int64)}
    if model.num_classes:
        example["y"] = torch.zeros(2, dtype=torch.int64)
    batch = torch.export.Dim("B")
    # Silence the exporter's progress messages and warnings, on which users cannot act.
    logging.getLogger("torch.onnx").setLevel(logging.ERROR)
    logging.getLogger("onnxscript").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        program = torch.onnx.export(
            module,
            tuple(example.values()),
            input_names=list(example),
            output_names=["eps_hat", "x_0_hat"],
            dynamic_shapes={name: {0: batch} for name in example},
            opset_version=opset,
            dynamo=True,
            optimize=True,
            verbose=False,
        )
    assert program is not None
    graph = program.model_proto
    # The exporter's fixed IR version would exclude older runtimes that support all operators.
    graph.ir_version = onnx.helper.find_min_ir_version_for(graph.opset_import)
    _strip_origin(graph)
    return graph


def _strip_origin(graph: onnx.ModelProto) -> None:
    """Remove the exporter's source locations and stack traces, which differ between machines."""
    graph.producer_version = ""
    for part in [graph.graph, *graph.functions]:
        for node in part.node:
            del node.metadata_props[:]
            node.doc_string = ""
        del part.metadata_props[:]
        part.doc_string = ""
        for value in part.value_info:
            del value.metadata_props[:]
    for value in [*graph.graph.input, *graph.graph.output, *graph.graph.initializer]:
        del value.metadata_props[:]
        value.doc_string = ""
