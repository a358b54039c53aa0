"""Speed of training compared with diffusers, and its memory."""

import os
import time
from collections.abc import Iterator
from functools import partial

import numpy as np
import torch

from diffusion.pairs.memory import Blocks, Images
from diffusion.pairs.noise import BLOCK
from diffusion.pairs.pairs import Batches
from diffusion.training.hardware import Prefetch
from gpu_measurements import peer
from gpu_measurements.bench import NO_TIME, Bench, Facts
from gpu_measurements.turns import Contender, Ready, first_line, slices

COMPUTED_IN = {"bf16": "bf16", "fp32": "tf32"}
"""Precision of matrix products on a GPU, by `train.precision`."""


def ceilings(bench: Bench) -> Iterator[Facts]:
    """Peak speed of 8192 x 8192 matrix products and of copies."""
    side = 256 if bench.rehearse else 8192
    facts: Facts = {}
    for name, dtype, tf32 in (("bf16", torch.bfloat16, False), ("tf32", torch.float32, True)):
        a, b = (torch.randn(side, side, device=bench.device).to(dtype) for _ in range(2))
        torch.backends.cuda.matmul.allow_tf32 = tf32
        bench.products[name] = 2 * side**3 / bench.seconds(partial(torch.matmul, a, b), 20)
        facts[f"{name}_tflops"] = float(f"{bench.products[name] / 1e12:.3g}")
    torch.backends.cuda.matmul.allow_tf32 = False
    source = torch.empty(2**20 if bench.rehearse else 2**32, dtype=torch.uint8, device=bench.device)
    target = torch.empty_like(source)
    seconds = bench.seconds(lambda: target.copy_(source), 10)
    yield facts | {"copy_tb_per_s": float(f"{2 * len(source) / seconds / 1e12:.3g}")}


def ours(bench: Bench, preset: str, size: int, precision: str, compiled: bool) -> Contender:
    """The training step of a preset on batches of `size` images."""

    def make() -> Ready:
        training = bench.training(preset, batch_size=size, precision=precision, compile=compiled)
        return Ready(training.step, training.counts)

    facts = {"training": preset, "batch_size": size, "precision": COMPUTED_IN[precision], "compiled": compiled}
    return Contender(facts, size, make)


def throughput(bench: Bench) -> Iterator[Facts]:
    """Training the network of the DDPM paper for CIFAR-10 (35.7M parameters), compared with diffusers.

    Several batch sizes are tried uncompiled; the fastest one is then compiled, and used for diffusers at its best.
    """
    fastest = 0.0
    for size in (4,) if bench.rehearse else (128, 256, 512, 1024):
        for facts in slices(bench, [ours(bench, "cifar10", size, "bf16", compiled=False)], rounds=1, seconds=1.5):
            if facts.get("images_per_s", 0.0) > fastest:
                fastest, bench.best_batch = facts["images_per_s"], size
            yield facts
    bench.release()  # so that the first line of each includes the time and memory of setting it up
    own = 2 if bench.rehearse else 128
    contenders = [
        ours(bench, "cifar10", bench.best_batch, "bf16", compiled=True),
        peer.training(bench, bench.best_batch, best=True),
        ours(bench, "cifar10", own, "bf16", compiled=False),
        ours(bench, "cifar10", own, "fp32", compiled=False),
        peer.training(bench, own, best=False),
    ]
    yield from slices(bench, contenders, rounds=6, seconds=1.5)


def settings(bench: Bench) -> Iterator[Facts]:
    """Training with other batch sizes and presets."""
    cases = [
        ("digits", 128, "bf16", False),
        ("fashion-mnist", 32, "bf16", False),
        ("fashion-mnist", 32, "bf16", True),
        ("digits", 128, "bf16", True),
        ("cifar10", 128, "bf16", True),
        ("cifar10", 256, "bf16", True),
        ("cifar10", 1024, "bf16", True),
    ]
    bench.release()  # so that each one is set up again
    for preset, size, precision, compiled in cases[: 1 if bench.rehearse else None]:
        size = 4 if bench.rehearse else size
        yield from slices(bench, [ours(bench, preset, size, precision, compiled)], rounds=3, seconds=1.5)


def memory(bench: Bench) -> Iterator[Facts]:
    """Peak device memory of a training step of cifar10, by resolution, batch size and activation checkpointing."""
    cases = [(side, size) for side in (32, 64, 128, 256) for size in (32, 128, 512) if side * size < 256 * 512]
    for side, size in [(8, 2)] if bench.rehearse else cases:
        for recompute in (False, True):
            if bench.left() < 0:
                yield {"side": side, "batch_size": size, "recompute": recompute, "skipped": NO_TIME}
                return
            bench.release()
            yield {"side": side, "batch_size": size, "recompute": recompute} | _memory(bench, side, size, recompute)


def _memory(bench: Bench, side: int, size: int, recompute: bool) -> Facts:
    """Measure one training run, which is freed on return."""
    base = bench.watch_memory()
    options = {"batch_size": size, "precision": "bf16", "compile": False, "recompute": recompute}
    try:
        training = bench.new_training("cifar10", (3, side, side), batches=1, **options)
        seconds = bench.seconds(training.step, times=2, rounds=1)
    except RuntimeError as error:  # out of memory in torch, cuDNN or cuBLAS, or an index exceeds 32 bits
        return {"does_not_run": first_line(error)}
    return {"peak_gib": bench.peak_gib(base), "ms_per_step": round(1000 * seconds, 1)}


def pairs(bench: Bench) -> Iterator[Facts]:
    """Training pairs per second from images in memory, with flips, by the number of prefetching threads."""
    cores, count = len(os.sched_getaffinity(0)), 16 * BLOCK  # the maximum number of blocks drawn at once
    least = 0.1 if bench.rehearse else 2.0
    for shape in ((1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 256, 256))[: 2 if bench.rehearse else None]:
        size = 2 * BLOCK if shape[-1] < 256 else BLOCK
        images = Images(np.random.default_rng(0).integers(0, 256, (count, *shape), dtype=np.uint8), np.full(count, -1))
        fetch = Batches(Blocks(images, 0, 1000), 0, size, flip=True)
        for threads in [number for number in (1, 2, 4, 8, 16) if number <= cores]:
            with Prefetch(fetch, threads) as prefetch:
                for step in range(8):  # the first ones are slower
                    prefetch(step)
                done, began, spent = 0, time.perf_counter(), 0.0
                while done < 4 * threads or spent < least:
                    done += 1
                    prefetch(7 + done)
                    spent = time.perf_counter() - began
            yield {"shape": shape, "batch_size": size, "threads": threads, "pairs_per_s": round(size * done / spent)}
