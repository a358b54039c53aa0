"""How a network is run on the hardware at hand: precision, compilation, memory and prefetching."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Generic, Self, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusion.nn.layers import Network
from diffusion.training.distributed import World, synchronized
from diffusion.training.options import TrainOptions

Item = TypeVar("Item")


def precision(options: TrainOptions, device: torch.device) -> torch.dtype:
    """What matrix products and convolutions are computed in; weights and all else are float32."""
    bf16 = options.precision == "bf16"
    if options.precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


def runnable(net: Network, options: TrainOptions, world: World) -> nn.Module:
    """The network as it is trained: recomputed, synchronized with other processes and compiled as `options` say.

    Its weights are those of `net`. Every batch has the same shape, so that it is compiled once.
    """
    if options.recompute:
        for block in net.hidden():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    device = next(net.parameters()).device
    made = synchronized(net, options, world)
    if device.type == "cuda" if options.compile == "auto" else options.compile:
        made.compile(dynamic=False)
    return made


class Ahead(Generic[Item]):
    """`fetch`, with the next item made in a thread meanwhile; a context manager."""

    def __init__(self, fetch: Callable[[int], Item]) -> None:
        self._fetch = fetch
        self._thread = ThreadPoolExecutor(max_workers=1, thread_name_prefix="ahead")
        self._next: tuple[int, Future[Item]] | None = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Item:
        ready, self._next = self._next, None
        item = ready[1].result() if ready and ready[0] == step else self._fetch(step)
        self._next = step + 1, self._thread.submit(self._fetch, step + 1)
        return item
