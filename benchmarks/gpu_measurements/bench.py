"""Shared by the measurements: the device, the remaining time, training on random pixels, and timing."""

import gc
import statistics
import time
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion.model import new_network
from diffusion.nn import build as networks
from diffusion.nn.counting import Counts, count
from diffusion.pairs.pairs import Batch
from diffusion.process import build
from diffusion.training import loop
from diffusion.training.distributed import World
from diffusion.training.hardware import precision, prefetched, runnable, should_compile
from diffusion.training.state import State, new_state
from flows import presets
from flows.params import Params

ROOT = Path(__file__).parents[2]
SHAPES = {"digits": (1, 8, 8), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
Facts = dict[str, Any]
Action = Callable[[], object]
NO_TIME = "no time left"


@dataclass(frozen=True)
class Training:
    """A new training run, and the size and cost of its network."""

    state: State
    trainer: loop.Trainer
    counts: Counts

    def step(self) -> None:
        loop.step(self.state, self.trainer)


class Bench:
    """The device and the remaining time; a context manager.

    `images` is the folder with the idx files of Fashion-MNIST.
    """

    def __init__(self, rehearse: bool, minutes: float, images: Path) -> None:
        self.rehearse, self._deadline = rehearse, time.monotonic() + 60 * minutes
        self.images = images
        self.device = networks.device("cpu" if rehearse else "cuda")
        self.cuda = self.device.type == "cuda"
        self.card = torch.cuda.get_device_name() if self.cuda else "CPU"
        self.products: dict[str, float] = {}
        """Measured FLOP/s of matrix products, by precision."""
        self.best_batch = 4 if rehearse else 512
        """Batch size for the compiled measurements of cifar10."""
        self._kept: dict[tuple[Any, ...], Training] = {}
        self._held = ExitStack()

    def __enter__(self) -> "Bench":
        if self.rehearse:  # everything but the compiler itself, which would take minutes on a CPU
            torch.compiler.set_stance("force_eager")
        return self

    def __exit__(self, *_: object) -> None:
        torch.compiler.set_stance("default")
        self.release()

    def left(self) -> float:
        """Seconds left to start a measurement."""
        return self._deadline - time.monotonic()

    def params(self, preset: str, **train: Any) -> Params:
        """The parameters of a preset; with a small network in a rehearsal."""
        params = presets.load(ROOT / "presets" / f"{preset}.yaml")
        changes: Facts = {"train": params.train.model_copy(update={"decay": "constant"} | train)}
        if self.rehearse:
            small = {"base_channels": 8, "channel_multipliers": (1, 2), "blocks_per_level": 1}
            changes["network"] = params.network.model_copy(update=small)
        return params.model_copy(update=changes)

    def training(self, preset: str, **train: Any) -> Training:
        """A training run of a preset with changed options; cached, so that it is compiled only once."""
        key = (preset, *sorted(train.items()))
        if key not in self._kept:
            self._kept[key] = self.new_training(preset, SHAPES[preset], **train)
        return self._kept[key]

    def new_training(self, preset: str, shape: tuple[int, int, int], batches: int = 4, **train: Any) -> Training:
        """A training run on images (C, H, W) of random pixels, cycling through `batches` batches."""
        params = self.params(preset, **train)
        process, options = build.process(params.process), params.train
        torch.manual_seed(0)
        net = new_network(shape, 0, params.network, params.process).to(self.device)
        counts = count(net, shape)  # before compilation
        state = new_state(net, options, process.schedule)
        rng = np.random.default_rng(0)
        made = [random_batch(rng, options.batch_size, shape) for _ in range(batches)]
        fetch = self._held.enter_context(prefetched(lambda step: made[step % batches], self.device))
        forward = runnable(net, options, World(), should_compile(options, self.device, lambda: counts.flops))
        dtype = precision(options, self.device)
        return Training(state, loop.Trainer(options, 0, process.loss, fetch, forward, precision=dtype), counts)

    def release(self) -> None:
        """Free the memory held by earlier measurements."""
        self._kept.clear()
        self._held.close()
        torch.compiler.reset()
        self.empty_cache()

    def empty_cache(self) -> None:
        """Return device memory that torch caches but does not use, for other processes and libraries."""
        if self.cuda:
            gc.collect()
            torch.cuda.empty_cache()

    def finish(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def watch_memory(self) -> int:
        """Reset the peak statistics; returns the bytes of device memory in use, the base for `peak_gib`."""
        if not self.cuda:
            return 0
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()

    def peak_gib(self, base: int) -> float | None:
        """Peak device memory above `base` bytes, in GiB; None on a CPU."""
        return round((torch.cuda.max_memory_allocated() - base) / 2**30, 2) if self.cuda else None

    def seconds(self, action: Action, times: int, rounds: int = 5) -> float:
        """Seconds per `action` after a warm-up: the median over rounds of `times` consecutive calls."""
        action()
        times, rounds = (1, 1) if self.rehearse else (times, rounds)
        found = []
        for _ in range(rounds):
            self.finish()
            began = time.perf_counter()
            for _ in range(times):
                action()
            self.finish()
            found.append((time.perf_counter() - began) / times)
        return statistics.median(found)


def random_batch(rng: np.random.Generator, size: int, shape: tuple[int, int, int]) -> Batch:
    """Random pixels, timesteps and noise for `size` images (C, H, W)."""
    return Batch(
        x_0=rng.random((size, *shape), dtype=np.float32) * 2 - 1,
        t=rng.integers(0, 1000, size),
        eps=rng.standard_normal((size, *shape), dtype=np.float32),
        y=np.full(size, -1),
        u=rng.random(size),
        augmentation=np.empty((size, 0), np.float32),
    )
