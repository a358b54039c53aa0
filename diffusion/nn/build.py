"""The only place where a name in params.yaml becomes a network."""

from collections.abc import Callable

import torch
from torch import nn

from diffusion import params
from diffusion.errors import UserError
from diffusion.nn.unet import UNet

NETWORKS: dict[str, Callable[[tuple[int, int, int], params.Network], nn.Module]] = {"unet": UNet}


def network(shape: tuple[int, int, int], options: params.Network) -> nn.Module:
    """The network that `options` describes, for images of `shape` (C, H, W), in the memory layout that is fastest."""
    net = NETWORKS[options.kind](shape, options)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs leave it out


def device(name: str) -> torch.device:
    """The device that params.yaml names; `auto` is a GPU where there is one. Raises UserError if it is not there."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    if name == "auto":
        return accelerator or torch.device("cpu")
    chosen = torch.device(name)
    there = chosen.type == "cpu" or (accelerator is not None and accelerator.type == chosen.type)
    if not there or (chosen.index or 0) >= max(torch.accelerator.device_count(), 1):
        raise UserError(f"device: {name} is not there; set device to auto or cpu in params.yaml")
    return chosen
