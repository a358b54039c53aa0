"""Running a network on the available hardware: precision, compilation, memory and prefetching."""

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import partial
from typing import Generic, Self, TypeVar

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from diffusion.nn.layers import Network
from diffusion.pairs.pairs import Batch
from diffusion.training.distributed import World, data_parallel
from diffusion.training.options import TrainOptions

Item = TypeVar("Item")


def precision(options: TrainOptions, device: torch.device) -> torch.dtype:
    """The autocast dtype; weights, optimizer state and EMA are always float32."""
    bf16 = options.precision == "bf16"
    if options.precision == "auto":
        bf16 = device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    return torch.bfloat16 if bf16 else torch.float32


COMPILE_MIN_FLOPS = 1e16
"""Training FLOPs from which `compile: auto` compiles on a GPU. Compilation takes a minute or more (44 s for the preset
digits, 87 s for cifar10 on an H200); uncompiled, cifar10 performs these FLOPs in about three minutes there."""


def should_compile(options: TrainOptions, device: torch.device, flops: Callable[[], float]) -> bool:
    """Whether to compile the network; `flops` returns the FLOPs of its forward pass for one image."""
    if options.compile != "auto":
        return options.compile
    return device.type == "cuda" and 3 * flops() * options.batch_size * options.steps >= COMPILE_MIN_FLOPS


def runnable(net: Network, options: TrainOptions, world: World, compiling: bool) -> nn.Module:
    """Wrap the network for training: activation checkpointing, data parallelism and compilation.

    Shares its weights with `net`. All batches have the same shape, so it is compiled once.
    """
    if options.recompute:
        for block in net.blocks():
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
    wrapped = data_parallel(net, options, world)
    if compiling:
        wrapped.compile(dynamic=False)
    return wrapped


@contextmanager
def tf32() -> Iterator[None]:
    """Use TF32 (10 bits of mantissa) for float32 matrix products and convolutions on GPUs in this block.

    Does nothing if PyTorch's newer `fp32_precision` is in use, since the two APIs must not be mixed.
    """
    convolutions = torch.backends.cudnn
    try:
        before = torch.get_float32_matmul_precision(), convolutions.allow_tf32
    except RuntimeError:
        yield
        return
    torch.set_float32_matmul_precision("high")
    convolutions.allow_tf32 = True
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        convolutions.allow_tf32 = before[1]


def seed_dropout(device: torch.device, seed: int) -> None:
    """Seed only this device's generator; torch.manual_seed, which seeds all, takes a quarter of a millisecond."""
    if device.type == "cpu":
        torch.default_generator.manual_seed(seed)
    elif device.type == "cuda":
        torch.cuda.default_generators[device.index or 0].manual_seed(seed)
    else:
        torch.manual_seed(seed)


def copy_to_host(tensor: torch.Tensor) -> Callable[[], torch.Tensor]:
    """Start copying a tensor to the CPU; the returned function waits for the copy and returns it."""
    if tensor.device.type != "cuda":
        copied = tensor.to("cpu")
        return lambda: copied
    copied = torch.empty_like(tensor, device="cpu", pin_memory=True).copy_(tensor, non_blocking=True)
    done = torch.cuda.current_stream(tensor.device).record_event()

    def wait() -> torch.Tensor:
        done.synchronize()
        return copied

    return wait


def prefetched(fetch: Callable[[int], Batch], device: torch.device) -> "Prefetch[Batch]":
    """Prefetch batches; for a GPU with as many threads as PyTorch uses, into pinned memory for asynchronous copies."""
    if device.type != "cuda":
        return Prefetch(fetch)

    def pinned(step: int) -> Batch:
        with torch.cuda.device(device):  # the current device is per thread
            return Batch(*(torch.from_numpy(array).pin_memory().numpy() for array in fetch(step)))

    return Prefetch(pinned, threads=torch.get_num_threads())


class Prefetch(Generic[Item]):
    """Wraps `fetch` and loads the next items, one per thread, in the background; a context manager."""

    def __init__(self, fetch: Callable[[int], Item], threads: int = 1) -> None:
        self._fetch, self._threads = fetch, threads
        self._pool = ThreadPoolExecutor(threads, thread_name_prefix="prefetch")
        self._ready: dict[int, Future[Item]] = {}

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def __call__(self, step: int) -> Item:
        ready, self._ready = self._ready, {}
        item = ready[step].result() if step in ready else self._fetch(step)
        for later in range(step + 1, step + 1 + self._threads):
            self._ready[later] = ready.pop(later) if later in ready else self._pool.submit(self._fetch, later)
        for unwanted in ready.values():  # training was rolled back
            unwanted.cancel()
        return item
