"""The page that shows several runs side by side."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from diffusion.evaluation import charts
from flows.comparison.figures import Figure
from flows.pages.contents import Contents
from flows.pages.rendering import parameter, render

ABSENT = "–"
"""In place of a parameter that a run does not have."""


@dataclass(frozen=True)
class Compared:
    """A run with its results."""

    name: str
    parameters: dict[str, Any]
    """All, by dotted name."""
    contents: Contents


def page(runs: Sequence[Compared], figures: Sequence[Figure]) -> str:
    """Render the page."""
    names = [run.name for run in runs]
    return render(
        "compare.html",
        names=names,
        runs=runs,
        parameters=differing([run.parameters for run in runs]),
        figures=figures,
        noise=same_noise(runs),
        same_val=len({run.contents.figures.get("val_pairs_sha256") for run in runs}) == 1,
        charts=[
            (chart, caption) for table, draw, caption in CHARTS if (chart := _overlaid(runs, table, draw)) is not None
        ],
    )


CHARTS: tuple[tuple[str, Callable[[Mapping[str, charts.Rows]], charts.Chart], str], ...] = (
    ("heldout", charts.heldout, "Held-out error while training."),
    ("loss", charts.loss, "Training loss; only runs with the same weighting can be compared."),
    ("mse_by_t", charts.mse_by_t, "MSE of the predicted noise over t, on the test pairs."),
    ("vlb_by_t", charts.vlb_by_t, "Terms of the exact bound over t."),
)


def differing(parameters: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[str]]]:
    """The parameters that are not the same in all runs: name, and the value in each."""
    found = []
    for name in sorted({name for each in parameters for name in each}):
        values = [parameter(each[name]) if name in each else ABSENT for each in parameters]
        if len(set(values)) > 1:
            found.append((name, values))
    return found


def same_noise(runs: Sequence[Compared]) -> str:
    """A sentence that says whether pictures at the same place in the grids start from the same noise."""
    told = {
        "seed": [str(run.parameters.get("seed", ABSENT)) for run in runs],
        "image size": [f"{run.contents.pairs.width}x{run.contents.pairs.height}" for run in runs],
        "channels": [str(run.contents.pairs.channels) for run in runs],
    }
    if different := [f"{name} {', '.join(values)}" for name, values in told.items() if len(set(values)) > 1]:
        return f"The pictures do not start from the same noise: {'; '.join(different)}."
    counts = {run.parameters.get("sample.count", ABSENT) for run in runs}
    place = "at the same place in the grids" if len(counts) == 1 else "of the same number, counted from the top left,"
    sampled = [{k: v for k, v in run.parameters.items() if k.startswith("sample.")} for run in runs]
    also = "" if all(each == sampled[0] for each in sampled) else " The runs differ in how they sample."
    return f"Pictures {place} start from the same noise (seed {told['seed'][0]}).{also}"


def _overlaid(
    runs: Sequence[Compared], table: str, draw: Callable[[Mapping[str, charts.Rows]], charts.Chart]
) -> charts.Chart | None:
    """A chart with a line for each run that has the table; None if fewer than two have it."""
    rows = {run.name: run.contents.tables.get(table) or [] for run in runs}
    return draw(rows) if sum(map(bool, rows.values())) > 1 else None
