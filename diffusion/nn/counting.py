"""The size and the cost of a network."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Counts:
    """What a network takes."""

    parameters: int
    """Numbers that are learned."""
    flops: int
    """Floating-point operations of one forward pass for one image: two for each multiply-add of convolutions, linear
    layers and attention; the rest, small beside them, is left out."""


def count(net: nn.Module, shape: tuple[int, int, int]) -> Counts:
    """Count for images of `shape` (C, H, W), on tensors without values: it is quick, and leaves `net` as it is."""
    named = [*net.named_parameters(), *net.named_buffers()]
    tensors = {name: tensor.detach().to("meta") for name, tensor in named}
    x_t = torch.empty(1, *shape, device="meta")
    t = torch.empty(1, dtype=torch.int64, device="meta")
    # The counter knows matrix products, but not every backend's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(net, tensors, (x_t, t))
    return Counts(sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops())
