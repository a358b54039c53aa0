"""Compare contenders that take turns, so that fluctuations of the machine affect them equally."""

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
"""Peak FLOP/s of dense matrix products from the data sheets, by the full name of the card and by precision.

Other cards of the family, and MIG slices, are slower.
"""


@dataclass(frozen=True)
class Ready:
    """An action that is set up and can be timed."""

    action: Action
    counts: Counts | None = None
    """Counts of the network that the action trains; None if it trains none."""


@dataclass(frozen=True)
class Contender:
    """A candidate in a comparison."""

    facts: Facts
    """Fields that identify it."""
    images: int
    """Images per action."""
    make: Callable[[], Ready]


def slices(bench: Bench, contenders: Sequence[Contender], rounds: int, seconds: float) -> Iterator[Facts]:
    """Measure images per second of each contender in turn; yields a line after each slice of about `seconds`.

    A contender is set up at its first turn, whose line includes the time for this and the first action, and the peak
    device memory. One that fails or runs out of time gets a line that says so, and no further turns.
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
            except (RuntimeError, UserError) as error:  # out of memory, or the compiler fails
                yield found | {"error": first_line(error)}
                ready.pop(number, None)
                del waiting[number]


def _seconds(bench: Bench, action: Action, at_least: float) -> float:
    """Mean seconds per action over at least `at_least` seconds, after an untimed one."""
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
    """FLOP/s of training relative to the card's peak (`mfu`) and to the measured matrix products.

    A training step takes three times the FLOPs of a forward pass. Unknown values are omitted.
    """
    peak = next((peaks.get(precision) for name, peaks in PEAKS.items() if re.fullmatch(name, bench.card)), None)
    most = {"mfu": peak, "share_of_products": bench.products.get(precision)}
    flops = 3 * counts.flops * images_per_s if counts else None
    return {name: float(f"{flops / value:.3g}") for name, value in most.items() if value and flops}


def first_line(error: BaseException) -> str:
    """Type and first line of an error."""
    return f"{type(error).__name__}: {str(error).strip().partition(chr(10))[0]}"[:300]
