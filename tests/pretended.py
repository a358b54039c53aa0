"""A simulated device: its tensors are computed on the CPU, but cannot be mixed with CPU tensors."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only
from torch.utils.backend_registration import _DummyBackendModule, _setup_privateuseone_for_python_backend

NAME = "pretended"


class _Elsewhere(Tensor):
    """A tensor on the simulated device; `inner` holds its values."""

    inner: Tensor

    @staticmethod
    def __new__(cls: type["_Elsewhere"], inner: Tensor) -> "_Elsewhere":
        made: _Elsewhere = torch.Tensor._make_wrapper_subclass(  # type: ignore[attr-defined]
            cls,
            inner.shape,
            inner.stride(),
            inner.storage_offset(),
            dtype=inner.dtype,
            device=torch.device(NAME, 0),
        )
        made.inner = inner
        return made

    def tolist(self) -> Any:  # type: ignore[override] # torch has none for subclasses
        return self.inner.tolist()

    __torch_dispatch__ = classmethod(lambda cls, func, types, args=(), kwargs=None: NotImplemented)  # noqa: ARG005


class Pretended(TorchDispatchMode):
    """A block in which the simulated device is available.

    Raises AssertionError where a tensor of it meets one of the CPU (other than a scalar), or is in float64 without
    having it.
    """

    def __init__(self, float64: bool) -> None:
        super().__init__()
        self.float64 = float64

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        wrappers = {id(x.inner): x for x in tensors if isinstance(x, _Elsewhere)}
        here = bool(wrappers)
        if kwargs.get("device") is not None:
            here, kwargs["device"] = torch.device(kwargs["device"]).type == NAME, torch.device("cpu")
        elif func is not torch.ops.aten.copy_.default:
            others = [x for x in tensors if x.ndim and not isinstance(x, _Elsewhere)]
            assert not (wrappers and others), f"{func}: tensors of two devices"
        args, kwargs = tree_map_only(_Elsewhere, lambda x: x.inner, (args, kwargs))
        out = func(*args, **kwargs)

        def wrapped(x: Tensor) -> Tensor:
            assert self.float64 or x.dtype != torch.float64, f"{func}: the device has no float64"
            return wrappers[id(x)] if id(x) in wrappers else _Elsewhere(x)

        return tree_map_only(Tensor, wrapped, out) if here else out


class _Backend(_DummyBackendModule):
    def get_amp_supported_dtype(self) -> list[torch.dtype]:
        return [torch.bfloat16]


def register() -> None:
    """Register the device with PyTorch, once per process."""
    _setup_privateuseone_for_python_backend(NAME, backend_module=_Backend())


def moved(net: nn.Module) -> nn.Module:
    """Move the network to the simulated device, inside a `Pretended` block."""
    for module in net.modules():
        for name, parameter in module.named_parameters(recurse=False):
            setattr(module, name, nn.Parameter(parameter.detach().to(NAME), requires_grad=parameter.requires_grad))
        for name, buffer in module.named_buffers(recurse=False):
            setattr(module, name, buffer.to(NAME))
    return net
