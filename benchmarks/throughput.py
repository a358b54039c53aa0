"""How close the stage `train` comes to the peak of the machine: images/s, pairs/s and FLOP/s, as one JSON line.

Run it in a working tree where `ddpm shard` and `ddpm pairs` have written data/pairs, with params.yaml:

    python benchmarks/throughput.py

It measures in turn, a few seconds each, so that fluctuations of the machine affect all equally:

- the bare training loop on batches in memory;
- the loop of the stage: reading pairs, loss curves, progress, and MLflow (a separate store on disk);
- products of 2048 x 2048 matrices, for the FLOP/s that the machine can reach.

The reported ratios are medians over the turns of the ratio within a turn. Checkpoints, once a minute, and the held-out
measurements and samples of `preview_every` are excluded. Reading alone is measured on one thread.
"""

import argparse
import json
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import torch

from diffusion.evaluation.heldout import Estimate, quick_mse
from diffusion.model import Config, Model, new_network
from diffusion.nn import build as networks
from diffusion.nn.counting import count
from diffusion.pairs.pairs import Batches, Pairs
from diffusion.process import build
from diffusion.progress import Progress
from diffusion.signals import StopSignals
from diffusion.training import loop
from diffusion.training.distributed import World
from diffusion.training.hardware import precision, prefetched, runnable, should_compile
from diffusion.training.hooks import CheckStop, Hooks, preview_options
from diffusion.training.state import new_state
from flows import params as parameters
from flows import tracking
from flows.paths import Paths

SIDE = 2048
IN_MEMORY = 64
"""Number of batches that the bare loop cycles through."""


def rate(action: Callable[[], object], seconds: float) -> float:
    """Calls of `action` per second."""
    done, began = 0, time.perf_counter()
    while (spent := time.perf_counter() - began) < seconds:
        action()
        done += 1
    return done / spent


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tree", type=Path, default=Path(), help="working tree with data/pairs and params.yaml")
    parser.add_argument("--turns", type=int, default=12, help="number of turns")
    parser.add_argument("--seconds", type=float, default=5.0, help="seconds per measurement")
    arguments = parser.parse_args()

    paths = Paths(arguments.tree)
    params = parameters.load(paths.params)
    options = params.train.model_copy(update={"steps": 10**9, "decay": "constant"})
    device, pairs, process = networks.device(params.device), Pairs(paths.pairs, "train"), build.process(params.process)
    torch.manual_seed(0)
    net = new_network(pairs.shape, len(pairs.manifest.classes), params.network, params.process).to(device)
    counts, state = count(net, pairs.shape), new_state(net, options, process.schedule)
    fetch = Batches(pairs, params.seed, options.batch_size, options.flip)
    batches = [fetch(step) for step in range(IN_MEMORY)]
    forward = runnable(net, options, World(), should_compile(options, device, lambda: counts.flops))
    dtype = precision(options, device)
    bare = loop.Trainer(
        options, params.seed, process.loss, lambda step: batches[step % IN_MEMORY], forward, precision=dtype
    )
    config = Config(shape=pairs.shape, classes=(), network=params.network, process=params.process, x_0_mse=None)
    model = Model(state.average, process, config)

    def finished() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    matrix = torch.randn(SIDE, SIDE, device=device, dtype=dtype)
    product_of_it = torch.empty_like(matrix)

    def product() -> None:
        torch.mm(matrix, matrix, out=product_of_it)
        finished()

    found: dict[str, list[float]] = {"bare": [], "stage": [], "gemm": []}
    with tempfile.TemporaryDirectory() as directory, StopSignals() as stop, prefetched(fetch, device) as ahead:
        os.environ["MLFLOW_TRACKING_URI"] = f"sqlite:///{directory}/mlflow.db"
        trainer = loop.Trainer(options, params.seed, process.loss, ahead, forward, precision=dtype)
        with (
            tracking.live(params, paths, None, "benchmark") as live,
            Progress("train", options.steps * options.batch_size, "images") as progress,
        ):
            drawing = preview_options(params.process)

            def measure(model: Model, check_stop: CheckStop) -> Estimate:
                return quick_mse(model, pairs, device, check_stop)

            watch = Hooks(trainer, model, measure, device, drawing, Path(directory), stop, progress, live, counts.flops)

            def step_of_stage() -> None:
                loop.step(state, trainer)
                watch.report(state)

            loop.step(state, bare)  # the first step is slower
            for turn in range(arguments.turns):
                stop.check()
                found["bare"].append(rate(lambda: loop.step(state, bare), arguments.seconds) * options.batch_size)
                finished()
                found["stage"].append(rate(step_of_stage, arguments.seconds) * options.batch_size)
                finished()
                found["gemm"].append(2 * SIDE**3 * rate(product, 1.0))
                print(
                    f"turn {turn + 1}: {found['bare'][-1]:.0f} images/s bare, {found['stage'][-1]:.0f} in the stage, "
                    f"GEMM {found['gemm'][-1] / 1e9:.0f} GFLOP/s",
                    file=sys.stderr,
                )
    threads, step = torch.get_num_threads(), iter(range(10**9))
    torch.set_num_threads(1)
    pairs_per_second = rate(lambda: fetch(next(step)), 5.0) * options.batch_size
    bare_rate = statistics.median(found["bare"])
    facts = {
        "threads": threads,
        "batch_size": options.batch_size,
        "parameters": counts.parameters,
        "bare_images_per_second": round(bare_rate, 1),
        "stage_images_per_second": round(statistics.median(found["stage"]), 1),
        "stage_over_bare": round(
            statistics.median(s / b for s, b in zip(found["stage"], found["bare"], strict=True)), 4
        ),
        "pairs_per_second_on_one_thread": round(pairs_per_second),
        "reading_over_step": round(bare_rate / pairs_per_second, 5),
        "gflops": round(3 * counts.flops * bare_rate / 1e9, 1),
        "gemm_gflops": round(statistics.median(found["gemm"]) / 1e9, 1),
        "flops_over_gemm": round(
            statistics.median(3 * counts.flops * b / g for b, g in zip(found["bare"], found["gemm"], strict=True)), 3
        ),
    }
    print(json.dumps({"benchmark": "throughput", **facts}))


if __name__ == "__main__":
    main()
