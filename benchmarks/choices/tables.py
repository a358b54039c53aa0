"""Tables of means over seeds, with differences to a baseline that are paired by seed."""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from scipy.stats import t as student

from choices.results import Row
from diffusion.errors import counted

Values = dict[int, float]
"""A figure by seed."""
NONE = "–"


class Column(NamedTuple):
    """A figure as a table shows it."""

    name: str
    label: str
    decimals: int
    better: int
    """1 where higher is better, -1 where lower is."""


BITS = Column("bits_per_dim analytic", "bits/dim", 3, -1)
QUALITY = (
    Column("frechet_distance", "Fréchet distance", 2, -1),
    Column("kid", "KID", 3, -1),
    Column("density", "density", 2, 1),
    Column("coverage", "coverage", 3, 1),
)
TRAINED = (Column("mse", "noise MSE", 4, -1), BITS, *QUALITY)


class Entry(NamedTuple):
    """A row of a table: the runs of one setting."""

    label: str
    runs: Sequence[Row]
    baseline: Sequence[Row] = ()
    """The runs it is compared with; none for a baseline itself."""
    more: tuple[str, ...] = ()
    """Further cells."""
    names: Mapping[str, str] = {}
    """Names of figures that stand in a column in place of the column's own."""


class Cell(NamedTuple):
    """A figure over seeds."""

    n: int
    mean: float
    sd: float
    """Standard deviation over seeds; NaN for one."""
    difference: float
    """Mean difference to the baseline, over the seeds that both have; NaN without one."""
    half: float
    """Half the length of the 95 % interval of `difference`, from Student's t distribution; NaN below two seeds."""

    @property
    def beyond(self) -> bool:
        """Whether the interval of the difference excludes 0."""
        return abs(self.difference) > self.half

    def text(self, decimals: int) -> str:
        """`mean ± sd`, and below it the difference and its interval, bold if it is beyond that."""
        if not self.n:
            return NONE
        places = max(decimals - max(0, _magnitude(self.mean)), 0)

        def number(value: float, places: int, sign: str = "") -> str:
            return f"{value:{sign}.{places}f}".replace("-", "−")

        found = number(self.mean, places) + ("" if math.isnan(self.sd) else f" ± {number(self.sd, places)}")
        if math.isnan(self.half):
            return found
        fine = -_magnitude(self.half)  # decimals with which a small interval is not ± 0
        fine = fine if places < fine <= places + 2 else places
        against = f"{number(self.difference, fine, '+')} ± {number(self.half, fine)}"
        return f"{found}<br>{f'**{against}**' if self.beyond else against}"


def _magnitude(value: float) -> int:
    """The exponent of the first digit."""
    return math.floor(math.log10(abs(value) or 1))


def by_seed(runs: Sequence[Row], name: str) -> Values:
    """A figure of the runs that have it and where it is finite."""
    found = {run["seed"]: run["figures"][name][0] for run in _sorted(runs) if name in run["figures"]}
    return {seed: value for seed, value in found.items() if math.isfinite(value)}


def cell(values: Values, baseline: Values) -> Cell:
    """Mean and standard deviation over seeds, and the mean difference to the baseline, paired by seed."""
    own = np.array(list(values.values()))
    differences = np.array([values[seed] - baseline[seed] for seed in values if seed in baseline])
    mean, sd = _mean_and_sd(own)
    difference, spread = _mean_and_sd(differences)
    n = len(differences)
    half = float(student.ppf(0.975, n - 1)) * spread / math.sqrt(n) if n > 1 else math.nan
    return Cell(len(own), mean, sd, difference, half)


def _mean_and_sd(values: np.ndarray[tuple[int], np.dtype[np.float64]]) -> tuple[float, float]:
    mean = float(values.mean()) if len(values) else math.nan
    return mean, float(values.std(ddof=1)) if len(values) > 1 else math.nan


def table(heads: Sequence[str], entries: Sequence[Entry], columns: Sequence[Column]) -> str:
    """A Markdown table; then a line for each setting that differs from its baseline beyond the interval."""
    shown = [(entry, [compared(entry, column) for column in columns]) for entry in entries]
    labels = [column.label for column in columns]
    lines = [
        "| " + " | ".join([heads[0], *labels, *heads[1:]]) + " |",
        "|---" * (len(columns) + len(heads)) + "|",
    ]
    for entry, cells in shown:
        texts = [each.text(column.decimals) for each, column in zip(cells, columns, strict=True)]
        lines.append("| " + " | ".join([entry.label + _failed(entry), *texts, *entry.more]) + " |")
    return "\n".join([*lines, "", *_verdicts(shown, columns)])


def compared(entry: Entry, column: Column) -> Cell:
    """A figure of a setting, compared with its baseline."""
    name = entry.names.get(column.name, column.name)
    return cell(by_seed(entry.runs, name), by_seed(entry.baseline, column.name))


def grouped(runs: Sequence[Row], name: str) -> dict[Any, list[Row]]:
    """The runs by the value of a field."""
    found: dict[Any, list[Row]] = {}
    for run in runs:
        found.setdefault(run[name], []).append(run)
    return found


def held_out(runs: Sequence[Row], more: int) -> Entry:
    """The row of held-out images, which are the same for all runs."""
    real = [{"seed": 0, "figures": run["held_out"]} for run in _sorted(runs) if "held_out" in run]
    return Entry("*held-out images*", real[:1], more=(NONE,) * more)


def made_by(command: str, runs: Sequence[Row]) -> str:
    """What made a table: command, seeds, numbers of images, features, commits and processors."""

    def listed(name: str) -> str:
        return ", ".join(str(value) for value in sorted({run[name] for run in runs if name in run}))

    seeds = listed("seed").replace(",", "")
    parts = [f"`python benchmarks/choosing.py {command} --seeds {seeds}`", f"{listed('samples')} samples"]
    parts += [f"{images} test images for bits/dim"] if (images := listed("images")) else []
    parts += [listed("features"), f"commit {listed('commit')}", f"one thread, {listed('processor')}"]
    return f"*{'; '.join(parts)}.*\n"


def _sorted(runs: Sequence[Row]) -> list[Row]:
    return sorted(runs, key=lambda run: int(run["seed"]))


def _failed(entry: Entry) -> str:
    failed = sum(not run.get("finite", True) for run in entry.runs)
    return f" (diverged with {counted(failed, 'seed')} of {len(entry.runs)})" if failed else ""


def _verdicts(shown: Sequence[tuple[Entry, list[Cell]]], columns: Sequence[Column]) -> list[str]:
    """Which settings are better or worse than their baseline, and in which figures."""
    if all(math.isnan(each.half) for _, cells in shown for each in cells):
        return ["Differences have no interval yet: that takes two seeds."]
    lines = []
    for word, sign in (("Better", 1), ("Worse", -1)):
        found = []
        for entry, cells in shown:
            pairs = zip(cells, columns, strict=True)
            names = [
                column.label for each, column in pairs if each.beyond and each.difference * column.better * sign > 0
            ]
            found += [f"{entry.label} ({', '.join(names)})"] if names else []
        lines.append(f"- {word}: {'; '.join(found) or 'none'}.")
    return lines
