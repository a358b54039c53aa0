"""Networks and devices by name."""

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
    """The networks of this package's modules: a new one is a module of its own, and is listed nowhere else."""
    for module in pkgutil.iter_modules(nn.__path__, f"{nn.__name__}."):
        if module.name != __name__:
            importlib.import_module(module.name)
    found = {network.Options.model_fields["kind"].default: network for network in Network.__subclasses__()}
    return dict(sorted(found.items()))


NETWORKS = _networks()
"""Networks by the kind of their options; each is made with the arguments of `network`."""
NetworkChoice = Annotated[NetworkOptions, OneOf(NETWORKS, {kind: made.Options for kind, made in NETWORKS.items()})]


def network(shape: tuple[int, int, int], channels_out: int, num_classes: int, options: NetworkOptions) -> Network:
    """The network that `options` describes, for images of `shape` (C, H, W), in the memory layout that is fastest.

    It is called as net(x_t (B, C, H, W), t int64 (B,), y int64 (B,) or None), where y names one of `num_classes`
    classes, or is negative or None for none; without `options.classes` it is not looked at. The raw output is
    (B, channels_out, H, W): C, or 2 C where the network learns the variance as well, whose second half is for the
    fraction by which it lies between its bounds (Nichol & Dhariwal 2021, sec. 3.1). A new network gives zero.
    """
    net: Network = NETWORKS[options.kind](shape, channels_out, num_classes if options.classes else None, options)
    return net.to(memory_format=torch.channels_last)  # type: ignore[call-overload] # torch's stubs leave it out


def device(name: str, local_rank: int = 0) -> torch.device:
    """The device of that name. Raises UserError if it is not there.

    `auto` is the first of CUDA, MPS (Apple) and XPU (Intel) that is there, or else the CPU. Of several processes that
    train together, each takes the GPU of its `local_rank`, if none is named by number.

    With CUDA torch is told to use deterministic kernels of full float32 precision (training may use TF32). On a CPU
    they are so anyway. On other devices torch does not promise that the same training gives the same bytes.
    """
    there = {
        "cuda": torch.cuda.device_count(),
        "mps": int(torch.backends.mps.is_available()),
        "xpu": torch.xpu.device_count(),
    }
    if name == "auto":
        name = next((kind for kind, count in there.items() if count), "cpu")
    chosen = torch.device(name, local_rank) if name in ("cuda", "xpu") else torch.device(name)
    if chosen.type in there and (chosen.index or 0) >= there[chosen.type]:
        raise UserError(f"device: {chosen} is not there; set device to auto or cpu")
    if chosen.type == "cuda":
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
        # With warnings alone attention's backward pass would stay non-deterministic.
        torch.use_deterministic_algorithms(True)
        torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]
        torch.backends.cudnn.benchmark = False
        torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = False
    return chosen
