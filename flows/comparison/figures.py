"""Figures of several runs side by side, and whether they differ beyond the noise of the measurement.

Some figures are known for each image. If two runs were scored on the same pairs, let d_i be the difference of their
figures on image i; the interval of the mean of d_i is its mean ± 1.96 standard errors. Of the others only intervals are
known. With half-widths h_1 and h_2, the interval of their difference is ± sqrt(h_1^2 +
h_2^2), as for independent measurements. Where both runs were measured on the same images, it is too wide, so that
differences may be missed, but seldom made up. Neither interval covers the variation between trainings with different
seeds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np

from diffusion.evaluation import quality
from diffusion.evaluation.likelihood import mean
from flows.pages.contents import Contents, Row

LOWER, HIGHER = "lower", "higher"
FIGURES = {
    "val_mse": ("MSE on val", LOWER),
    "mse": ("MSE on test", LOWER),
    "mae": ("MAE on test", LOWER),
    "r2": ("R² on test", HIGHER),
    "bits_per_dim": ("bits/dim, estimated bound", LOWER),
    "bits_per_dim_exact": ("bits/dim, exact bound", LOWER),
}
"""Figures of reports/evaluate.json with intervals: title, and which direction is better."""
BETTER = {
    "frechet_distance": LOWER,
    "kid": LOWER,
    "near_copies": LOWER,
    **dict.fromkeys(("precision", "recall", "density", "coverage", "class_agreement"), HIGHER),
}
"""Figures of reports/evaluation/quality.csv: which direction is better; neither, if not listed."""
BY_IMAGE = {"val_mse": ("val_errors", "mse"), "bits_per_dim": ("bits_per_dim", "bits_per_dim")}
"""The table of figures with a value for each image, and its column; older evaluations lack the second."""
TEST_PAIRS, VAL_PAIRS = "pairs_sha256", "val_pairs_sha256"

Word = Literal["better", "worse", "not told apart", "equal", "lower", "higher", "other data"]


class Value(NamedTuple):
    """A figure with its 95 % interval."""

    value: float
    low: float
    high: float


class Difference(NamedTuple):
    """What a run's figure is above that of the first run, with its 95 % interval."""

    value: float
    low: float
    high: float
    word: Word
    paired: bool


@dataclass(frozen=True)
class Figure:
    """A figure of all runs."""

    title: str
    values: list[Value | None]
    """Of each run; None where it lacks the figure."""
    differences: list[Difference | None]
    """Of each run but the first, from it; None where one of the two lacks the figure."""


def compare(runs: Sequence[Contents]) -> list[Figure]:
    """The figures that at least one run has, and their differences from the first run."""
    found = []
    for name, (title, better) in FIGURES.items():
        values = [_value(run, name) for run in runs]
        keys = [VAL_PAIRS if name == "val_mse" else TEST_PAIRS]
        keys += ["bits_per_dim_values"] if name.startswith("bits_per_dim") else []  # a likelihood of other values
        same = [all(run.figures.get(key) == runs[0].figures.get(key) for key in keys) for run in runs]
        rows = [_by_image(run, name) for run in runs]
        found.append(Figure(title, values, _differences(values, same, rows, better)))
    for metric, features in dict.fromkeys((row["metric"], row["features"]) for run in runs for row in _samples(run)):
        label = quality.LABELS.get(metric, metric.replace("_", " "))
        title = label if features == quality.PIXELS else f"{label} ({features})"
        values = [_quality(run, metric, features) for run in runs]
        same = [_compared_with(run) == _compared_with(runs[0]) for run in runs]
        found.append(Figure(title, values, _differences(values, same, [None] * len(runs), BETTER.get(metric, ""))))
    return [figure for figure in found if any(figure.values)]


def independent(new: Value, old: Value) -> tuple[float, float, float]:
    """The difference of two figures and its interval, from their intervals."""
    difference = new.value - old.value
    below = float(np.hypot(new.value - new.low, old.high - old.value))
    above = float(np.hypot(new.high - new.value, old.value - old.low))
    return difference, difference - below, difference + above


def paired(new: Sequence[float], old: Sequence[float]) -> tuple[float, float, float]:
    """The mean difference of figures of the same images and its interval; a single image tells nothing."""
    found = mean("d", np.asarray(new) - np.asarray(old))
    if len(new) == 1:
        return found["d"], -np.inf, np.inf
    return found["d"], found["d_low"], found["d_high"]


def _differences(
    values: list[Value | None], same: list[bool], errors: list[list[float] | None], better: str
) -> list[Difference | None]:
    found: list[Difference | None] = []
    old = values[0]
    for new, on_same, rows in zip(values[1:], same[1:], errors[1:], strict=True):
        if new is None or old is None:
            found.append(None)
            continue
        first = errors[0]
        by_image = on_same and rows is not None and first is not None and len(rows) == len(first)
        interval = paired(rows or [], first or []) if by_image else independent(new, old)
        word: Word = "other data" if not on_same else "equal" if new == old else _word(*interval[1:], better)
        found.append(Difference(*interval, word, by_image))
    return found


def _word(low: float, high: float, better: str) -> Word:
    if not (low > 0 or high < 0):  # or one is no number
        return "not told apart"
    direction: Word = "lower" if high < 0 else "higher"
    if not better:
        return direction
    return "better" if direction == better else "worse"


def _value(run: Contents, name: str) -> Value | None:
    try:
        return Value(*(float(run.figures[f"{name}{end}"]) for end in ("", "_low", "_high")))
    except KeyError:
        return None


def _by_image(run: Contents, name: str) -> list[float] | None:
    table, column = BY_IMAGE.get(name, ("", ""))
    return [row[column] for row in run.tables.get(table, [])] or None


def _samples(run: Contents) -> list[Row]:
    return [row for row in run.tables.get("quality", []) if row["set"] == "samples"]


def _compared_with(run: Contents) -> tuple[Any, ...]:
    """What samples were compared with: the images, in which features, and how many; distances depend on their number.

    The distance of held-out images depends on the images, at their size, and on the features alone.
    """
    keys = ("quality_images", "quality_reference_images", "frechet_distance_heldout")
    return run.pairs.shards_sha256, *(run.figures.get(key) for key in keys)


def _quality(run: Contents, metric: str, features: str) -> Value | None:
    rows = [row for row in _samples(run) if (row["metric"], row["features"]) == (metric, features)]
    return Value(*(float(rows[0][name]) for name in ("value", "low", "high"))) if rows else None
