"""What the measurements on a GPU share, and whether training there is right."""

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from diffusion.model import new_network
from diffusion.nn import build as networks
from diffusion.nn.counting import count
from diffusion.pairs.memory import Blocks, Images
from diffusion.pairs.pairs import Batch, Batches
from diffusion.process import build
from diffusion.training import loop
from diffusion.training.distributed import World
from diffusion.training.hardware import Prefetch, precision, runnable, to_compile
from diffusion.training.state import State, begin
from flows import presets
from flows.params import Params

ROOT = Path(__file__).parents[1]
SHAPES = {"digits": (1, 8, 8), "fashion-mnist": (1, 28, 28), "cifar10": (3, 32, 32)}
Facts = dict[str, Any]


class Bench:
    """What the measurements share."""

    def __init__(self, rehearse: bool, steps: int) -> None:
        self.rehearse, self.steps = rehearse, steps
        self.device = networks.device("cpu" if rehearse else "cuda")
        self.cuda = self.device.type == "cuda"

    def params(self, preset: str, **train: Any) -> Params:
        """A preset's parameters; in a rehearsal with a tiny network."""
        params = presets.load(ROOT / "presets" / f"{preset}.yaml")
        changes: Facts = {"train": params.train.model_copy(update={"decay": "constant"} | train)}
        if self.rehearse:
            changes["network"] = params.network.model_copy(update={"base_channels": 32, "blocks_per_level": 1})
        return params.model_copy(update=changes)

    def training(self, preset: str, **train: Any) -> tuple[State, loop.Trainer]:
        """A training of random pixels that has not begun."""
        params, shape = self.params(preset, **train), SHAPES[preset]
        process, options = build.process(params.process), params.train
        torch.manual_seed(0)
        net = new_network(shape, 0, params.network, params.process).to(self.device)
        self.flops = count(net, shape).flops  # before it is compiled
        state = begin(net, options, process.schedule)
        rng = np.random.default_rng(0)
        batches = [_batch(rng, options.batch_size, shape) for _ in range(4)]
        forward = runnable(net, options, World(), to_compile(options, self.device, lambda: self.flops))
        return state, loop.Trainer(
            options, 0, process.loss, lambda step: batches[step % 4], forward, precision=precision(options, self.device)
        )

    def finish(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, action: Callable[[], object], times: int, rounds: int = 5) -> float:
        """Seconds of one `action`, the median of rounds of `times` in a row, after one more to warm up."""
        action()
        found = []
        for _ in range(1 if self.rehearse else rounds):
            self.finish()
            began = time.perf_counter()
            for _ in range(1 if self.rehearse else times):
                action()
            self.finish()
            found.append((time.perf_counter() - began) / (1 if self.rehearse else times))
        return statistics.median(found)


def _batch(rng: np.random.Generator, size: int, shape: tuple[int, int, int]) -> Batch:
    return Batch(
        x_0=rng.uniform(-1, 1, (size, *shape)).astype(np.float32),
        t=rng.integers(0, 1000, size),
        eps=rng.standard_normal((size, *shape), dtype=np.float32),
        y=np.full(size, -1),
        u=rng.random(size),
    )


def gpu_tests(bench: Bench) -> Iterator[Facts]:
    """Those of tests/gpu: whether training and sampling there are right. In a rehearsal nothing is compiled."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "--confcutdir", "tests/gpu", "tests/gpu"]
    command += ["-W", "default"]  # without the plugins that pyproject.toml sets up
    command += ["-k", "not True"] if bench.rehearse else []
    environment = os.environ | {"PYTHONPATH": str(ROOT), "REHEARSE_GPU_TESTS": str(int(bench.rehearse))}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    failed = [line for line in done.stdout.splitlines() if line.startswith(("FAILED", "ERROR", "E  "))]
    yield {"passed": done.returncode == 0, "summary": done.stdout.splitlines()[-1:], "failed": failed}


def pairs(bench: Bench) -> Iterator[Facts]:
    """Training pairs made per second from images in memory, with flips, by the number of threads that prefetch them."""
    cores = len(os.sched_getaffinity(0))
    for shape in ((1, 28, 28), (3, 32, 32), (3, 64, 64), (3, 256, 256)):
        size = 128 if shape[-1] < 256 else 16
        images = Images(np.random.default_rng(0).integers(0, 256, (size, *shape), dtype=np.uint8), np.full(size, -1))
        fetch = Batches(Blocks(images, 0, 1000), 0, size, flip=True)
        for threads in [number for number in (1, 2, 4, 8, 16) if number <= cores]:
            steps = max(4 * threads, 2 if bench.rehearse else 24)
            with Prefetch(fetch, threads) as prefetch:
                prefetch(0)
                began = time.perf_counter()
                for step in range(1, 1 + steps):
                    prefetch(step)
                spent = time.perf_counter() - began
            yield {"shape": shape, "threads": threads, "pairs_per_s": round(size * steps / spent)}


def stages(bench: Bench) -> Iterator[Facts]:
    """The digits by the stages' own commands; a training that is killed and resumed against one that is not."""
    steps = 60 if bench.rehearse else bench.steps
    environment = os.environ | {"PYTHONPATH": str(ROOT), "DDPM_CHECKPOINT_SECONDS": "0.5"}

    def run(tree: Path, name: str) -> float:
        began = time.perf_counter()
        command = [sys.executable, "-m", "flows", name]
        done = subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"{name}: {done.stderr[-1500:]}")
        return round(time.perf_counter() - began, 1)

    with tempfile.TemporaryDirectory() as directory:
        whole, killed = Path(directory) / "whole", Path(directory) / "killed"
        whole.mkdir()
        shutil.copytree(ROOT / "data" / "raw", whole / "data" / "raw")
        text = (ROOT / "params.yaml").read_text().replace("  steps: 1000\n", f"  steps: {steps}\n")
        (whole / "params.yaml").write_text(text.replace("compile: auto", "compile: false"))
        yield {"shard_s": run(whole, "shard"), "pairs_s": run(whole, "pairs")}
        shutil.copytree(whole, killed)
        yield {"steps": steps, "train_s": run(whole, "train")} | _report(whole, "train")
        killed_at = _train_and_kill(killed, environment, after=20)
        resumed = run(killed, "train")
        weights = [(tree / "models" / "ddpm" / "model.safetensors").read_bytes() for tree in (whole, killed)]
        yield {"killed_at": killed_at, "resumed_s": resumed, "same": weights[0] == weights[1]}
        for name in ("evaluate", "export"):
            yield {f"{name}_s": run(whole, name)} | _report(whole, name)


def _report(tree: Path, name: str) -> Facts:
    """The numbers in a stage's report."""
    report = json.loads((tree / "reports" / f"{name}.json").read_text())
    return {key: value for key, value in report.items() if isinstance(value, int | float)}


def _train_and_kill(tree: Path, environment: dict[str, str], after: int) -> str | None:
    """Kill a training once it has a checkpoint of step `after` or later; gives the step of its last one."""
    command = [sys.executable, "-m", "flows", "train"]
    process = subprocess.Popen(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline, last = time.monotonic() + 120, None
    while process.poll() is None and time.monotonic() < deadline and int(last or 0) < after:
        last = max((path.stem for path in tree.glob(".ddpm/checkpoints/*/0*.json")), default=None)
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    return last
