"""Parameter and FLOP counts."""

from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode


@dataclass(frozen=True)
class Counts:
    """Size and cost of a network."""

    parameters: int
    """Number of trainable parameters."""
    flops: int
    """Floating-point operations of a forward pass for one image: two per multiply-add in convolutions, linear layers
    and attention. Other operations are negligible and not counted."""


def count(net: nn.Module, shape: tuple[int, int, int]) -> Counts:
    """Count for images of `shape` (C, H, W), on meta tensors: fast, and without side effects on `net`."""
    named = [*net.named_parameters(), *net.named_buffers()]
    tensors = {name: tensor.detach().to("meta") for name, tensor in named}
    x_t = torch.empty(1, *shape, device="meta")
    t = torch.empty(1, dtype=torch.int64, device="meta")
    # The counter supports matrix products but not every backend's fused attention.
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        torch.func.functional_call(net, tensors, (x_t, t))
    return Counts(sum(parameter.numel() for parameter in net.parameters()), counter.get_total_flops())
