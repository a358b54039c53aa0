"""Builds networks and devices by name."""

import importlib
import os
import pkgutil
import re
from typing import Annotated, Any

import torch
from pydantic import BeforeValidator, Field
from pydantic_core import PydanticCustomError

from diffusion import nn
from diffusion.errors import UserError
from diffusion.nn.layers import Network, NetworkOptions
from diffusion.sections import OneOf

DEVICES = r"^(auto|cpu|mps|(cuda|xpu)(:\d+)?)$"
DEVICE_NAMES = ["auto", "cpu", "cuda", "cuda:N", "mps", "xpu", "xpu:N"]


def _check_device(name: Any) -> Any:
    if isinstance(name, str) and not re.search(DEVICES, name):
        expected = f"{', '.join(DEVICE_NAMES[:-1])} or {DEVICE_NAMES[-1]}"
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
    return name


Device = Annotated[str, Field(pattern=DEVICES, examples=DEVICE_NAMES), BeforeValidator(_check_device)]


def _networks() -> dict[str, Any]:
    """Discover the networks in this package's modules, so that a new one needs no registration elsewhere."""
    for module in pkgutil.iter_modules(nn.__path__, f"{nn.__name__}."):
        if module.name != __name__:
            importlib.import_module(module.name)
    found = {network.Options.model_fields["kind"].default: network for network in Network.__subclasses__()}
    return dict(sorted(found.items()))


NETWORKS = _networks()
"""Network classes by the kind of their options; the arguments are those of `network`."""
NetworkChoice = Annotated[
    NetworkOptions, OneOf(NETWORKS, {kind: network.Options for kind, network in NETWORKS.items()})
]


def network(shape: tuple[int, int, int], channels_out: int, num_classes: int, options: NetworkOptions) -> Network:
    """Build the network described by `options` for images of `shape` (C, H, W), in channels_last memory format.

    It is called as net(x_t (B, C, H, W), t int64 (B,), y int64 (B,) or None), where y is one of `num_classes` classes,
    or negative or None for none; y is ignored without `options.classes`. The raw output is (B, channels_out, H, W),
    with C channels, or 2 C if the network learns the variance: the second half interpolates between the bounds of the
    variance (Nichol & Dhariwal 2021, sec. 3.1). The output of a new network is zero. Training with augmentation passes
    a fourth argument, `augmentation` (B, parameters), for the network's `conditions`.
    """
    net: Network = NETWORKS[options.kind](shape, channels_out, num_classes if options.classes else None, options)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs leave it out


def device(name: str, local_rank: int = 0) -> torch.device:
    """Return the device called `name`; raises UserError if it is not available.

    `auto` selects the first available of CUDA, MPS (Apple) and XPU (Intel), and otherwise the CPU. In distributed
    training, each process takes the GPU of its `local_rank`, unless `name` has an index.

    With CUDA, this enables deterministic algorithms and disables TF32 (training may turn TF32 on). CPU kernels are
    deterministic anyway. On other devices PyTorch does not guarantee that a repeated training gives the same bytes.
    """
    available = {
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count(),
    }
    if name == "auto":
        name = next((kind for kind, count in available.items() if count), "cpu")
    chosen = torch.device(name, local_rank) if name in ("cuda", "xpu") else torch.device(name)
    if chosen.type in available and (chosen.index or 0) >= available[chosen.type]:
        raise UserError(f"device: {chosen} is not available; set device to auto or cpu")
    if chosen.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # With warn_only, the backward pass of attention would remain nondeterministic.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return chosen
