"""Rates of several that take turns, so that all see the machine fast and slow alike."""

import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from diffusion.errors import UserError
from diffusion.nn.counting import Counts
from gpu_measurements.bench import NO_TIME, Action, Bench, Facts

PEAKS = {
    r"NVIDIA H100 PCIe": {"bf16": 756e12, "tf32": 378e12},
    r"NVIDIA H100 80GB HBM3": {"bf16": 989e12, "tf32": 494e12},
    r"NVIDIA H200": {"bf16": 989e12, "tf32": 494e12},
    r"NVIDIA A100[- ](SXM4-\d+GB|PCIE-40GB|80GB PCIe)": {"bf16": 312e12, "tf32": 156e12},
}
"""FLOP/s of dense matrix products by the data sheet, by the card's whole name, and by precision.

Other cards of the family, and parts of a card (MIG), are slower.
"""


@dataclass(frozen=True)
class Ready:
    """What is timed, after it was made ready."""

    action: Action
    counts: Counts | None = None
    """Of the network that the action trains; None if it trains none."""


@dataclass(frozen=True)
class Contender:
    """One that takes turns with others."""

    facts: Facts
    """What tells it from the others."""
    images: int
    """Images of one action."""
    make: Callable[[], Ready]


def slices(bench: Bench, contenders: Sequence[Contender], rounds: int, seconds: float) -> Iterator[Facts]:
    """Images a second of each contender in turn: one line for each slice of some seconds, as soon as it has ended.

    Each is made ready at its first turn, whose line has the seconds that this and the first action took, and the
    device memory. One that fails, or for which no time is left, has a line that says so, and no further turns.
    """
    ready: dict[int, Ready] = {}
    waiting = dict(enumerate(contenders))
    for turn in range(2 if bench.rehearse else rounds):
        for number, contender in list(waiting.items()):
            found = dict(contender.facts)
            if bench.left() < 0:
                yield found | {"skipped": NO_TIME}
                del waiting[number]
                continue
            try:
                if number not in ready:
                    base, began = bench.watch_memory(), time.perf_counter()
                    ready[number] = contender.make()
                    ready[number].action()
                    bench.finish()
                    found["first_s"] = round(time.perf_counter() - began, 2)
                    found["peak_gib"] = bench.peak_gib(base)
                rate = contender.images / _seconds(bench, ready[number].action, seconds)
                found |= {"slice": turn, "images_per_s": float(f"{rate:.4g}")}
                yield found | utilization(bench, ready[number].counts, str(found.get("precision")), rate)
            except ModuleNotFoundError as error:
                yield found | {"skipped": f"no module named {error.name}"}
                del waiting[number]
            except (RuntimeError, UserError) as error:  # memory is too small, or the compiler fails
                yield found | {"error": first_line(error)}
                ready.pop(number, None)
                del waiting[number]


def _seconds(bench: Bench, action: Action, at_least: float) -> float:
    """Seconds of an action, the mean of as many as take `at_least` so long, after one that does not count."""
    bench.empty_cache()
    action()
    bench.finish()
    times, began = 0, time.perf_counter()
    while not times or (not bench.rehearse and time.perf_counter() - began < at_least):
        action()
        times += 1
    bench.finish()
    return (time.perf_counter() - began) / times


def utilization(bench: Bench, counts: Counts | None, precision: str, images_per_s: float) -> Facts:
    """FLOP/s of training as a share of the card's peak (`mfu`), and of what matrix products reach on it.

    A step takes three times the FLOPs of a forward pass. What is not known of the card or network is left out.
    """
    peak = next((peaks.get(precision) for name, peaks in PEAKS.items() if re.fullmatch(name, bench.card)), None)
    most = {"mfu": peak, "share_of_products": bench.products.get(precision)}
    flops = 3 * counts.flops * images_per_s if counts else None
    return {name: float(f"{flops / value:.3g}") for name, value in most.items() if value and flops}


def first_line(error: BaseException) -> str:
    """The kind of an error, and the first line of what it says."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
