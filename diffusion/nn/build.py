"""The only place where a name in params.yaml becomes a network."""

import os
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
    """The device that params.yaml names; `auto` is a GPU where there is one. Raises UserError if it is not there.

    On a GPU torch is told to use deterministic kernels, of full float32 precision: those on a CPU are so by themselves.
    """
    gpus = torch.cuda.device_count()
    chosen = torch.device(("cuda" if gpus else "cpu") if name == "auto" else name)
    if chosen.type == "cuda":
        if (chosen.index or 0) >= gpus:
            raise UserError(f"device: {name} is not there; set device to auto or cpu in params.yaml")
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        torch.use_deterministic_algorithms(True, warn_only=True)
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return chosen
