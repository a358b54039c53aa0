"""Strong scaling on the cores of this machine: images/s of training with 1, 2 and 4 processes, as one JSON line.

Run it in a working tree where `ddpm shard` and `ddpm pairs` have written data/pairs, with params.yaml:

    python benchmarks/scaling.py

The processes divide the same global batch, and each has one thread. A step is that of the stage `train`, including
prefetching and the agreement on stopping, on a CPU with gloo. All groups of processes start once and take turns, so
that fluctuations of the machine affect them equally, each turn with and without gradient synchronization; the
difference is its cost. The reported efficiency is the median over the turns of the ratio within a turn.
"""

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from multiprocessing.connection import Connection
from pathlib import Path

import torch

from diffusion.model import new_network
from diffusion.nn.counting import count
from diffusion.pairs.pairs import Batches, Pairs
from diffusion.process import build
from diffusion.training import loop
from diffusion.training.distributed import process_group
from diffusion.training.hardware import precision, prefetched, runnable
from diffusion.training.state import new_state
from flows import params as parameters
from flows.paths import Paths

CPU = torch.device("cpu")


def work(rank: int, size: int, tree: Path, store: Path, pipe: Connection) -> None:
    """One of `size` processes: trains for each (steps, exchange) received from the pipe, and sends the seconds."""
    os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(size), "GLOO_SOCKET_IFNAME": "lo"}
    torch.set_num_threads(1)
    paths = Paths(tree)
    params = parameters.load(paths.params)
    options = params.train.model_copy(update={"steps": 10**9, "decay": "constant"})
    pairs, process = Pairs(paths.pairs, "train"), build.process(params.process)
    torch.manual_seed(0)
    net = new_network(pairs.shape, len(pairs.manifest.classes), params.network, params.process)
    state = new_state(net, options, process.schedule)
    fetch = Batches(pairs, params.seed, options.batch_size, options.flip, rank=rank, world=size)
    with process_group(CPU, store) as world, prefetched(fetch, CPU) as batches:
        forward = runnable(net, options, world, compiling=False)
        together = loop.Trainer(
            options, params.seed, process.loss, batches, forward, world, precision=precision(options, CPU)
        )
        apart = replace(together, net=net)
        pipe.send((count(net, pairs.shape).parameters, options.batch_size))
        while (order := pipe.recv()) is not None:
            steps, exchange = order
            world.maximum(0.0)
            began = time.perf_counter()
            for _ in range(steps):
                world.maximum(0.0)  # the agreement on stopping
                loop.step(state, together if exchange else apart)
            world.maximum(0.0)
            pipe.send(time.perf_counter() - began)


class Group:
    """A group of processes that train together."""

    def __init__(self, pipes: list[Connection]) -> None:
        self.pipes = pipes
        self.parameters, self.batch_size = [pipe.recv() for pipe in pipes].pop()  # each process sends them

    def seconds(self, steps: int, exchange: bool) -> float:
        """Mean seconds per step over `steps` consecutive steps."""
        for pipe in self.pipes:
            pipe.send((steps, exchange))
        spent: list[float] = [pipe.recv() for pipe in self.pipes]
        return max(spent) / steps


@contextmanager
def started(size: int, tree: Path) -> Iterator[Group]:
    """Start a group of `size` processes, which end with the block."""
    context = multiprocessing.get_context("spawn")
    with tempfile.TemporaryDirectory() as directory:
        pipes, running = [], []
        for rank in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=work, args=(rank, size, tree, Path(directory) / "store", theirs))
            process.start()
            theirs.close()  # so that the pipe closes when the process exits
            pipes.append(ours)
            running.append(process)
        try:
            yield Group(pipes)
            for pipe in pipes:
                pipe.send(None)
        except BaseException:
            for process in running:
                process.kill()
            raise
        finally:
            for process in running:
                process.join()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tree", type=Path, default=Path(), help="working tree with data/pairs and params.yaml")
    parser.add_argument("--turns", type=int, default=9, help="number of turns")
    parser.add_argument("--steps", type=int, default=20, help="steps per turn")
    parser.add_argument("--sizes", type=int, nargs="+", default=[2, 4], help="numbers of processes to compare with 1")
    arguments = parser.parse_args()

    sizes = [1, *arguments.sizes]
    found: dict[int, list[tuple[float, float]]] = {size: [] for size in sizes}
    with ExitStack() as running:
        groups = {size: running.enter_context(started(size, arguments.tree)) for size in sizes}
        for group in groups.values():
            group.seconds(2, exchange=True)  # the first steps are slower
        for turn in range(arguments.turns):
            for size, group in groups.items():
                found[size].append(tuple(group.seconds(arguments.steps, exchange) for exchange in (True, False)))  # type: ignore[arg-type]
            print(f"turn {turn + 1}:", {size: round(found[size][-1][0], 4) for size in sizes}, file=sys.stderr)
        batch_size, weights = groups[1].batch_size, groups[1].parameters
    rows = []
    for size in sizes:
        shares = [alone / (size * spent) for (spent, _), (alone, _) in zip(found[size], found[1], strict=True)]
        rates = [batch_size / spent for spent, _ in found[size]]
        rows.append(
            {
                "processes": size,
                "images_per_s": round(statistics.median(rates), 1),
                "images_per_s_from_to": [round(min(rates), 1), round(max(rates), 1)],
                "efficiency": round(statistics.median(shares), 3),
                "efficiency_from_to": [round(min(shares), 3), round(max(shares), 3)],
                "ms_per_step": round(1e3 * statistics.median(spent for spent, _ in found[size]), 1),
                "ms_of_exchange": round(1e3 * statistics.median(spent - bare for spent, bare in found[size]), 1),
            }
        )
    for row in rows:
        print("  ".join(f"{name} {value}" for name, value in row.items()), file=sys.stderr)
    facts = {"cores": len(os.sched_getaffinity(0)), "batch_size": batch_size, "parameters": weights, "rows": rows}
    print(json.dumps({"benchmark": "scaling", **facts}))


if __name__ == "__main__":
    main()
