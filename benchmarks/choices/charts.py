"""Charts of the results, as SVG files; the same results give the same bytes."""

import io
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import matplotlib as mpl
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator, ScalarFormatter

from choices.tables import Cell, Column

MARKS = "osD^vP"


class Point(NamedTuple):
    x: float
    y: float
    sd: float


def differences(rows: Sequence[tuple[str, Sequence[Cell]]], columns: Sequence[Column]) -> bytes:
    """Differences to the default with their intervals, a panel for each figure.

    Grey: within the interval; blue: better, red: worse.
    """
    figure = Figure(figsize=(3.2 * len(columns) + 3, 0.28 * len(rows) + 1), layout="constrained")
    axes = figure.subplots(1, len(columns), sharey=True, squeeze=False)[0]
    for number, (axis, column) in enumerate(zip(axes, columns, strict=True)):
        limit = _limit([cells[number] for _, cells in rows])
        axis.axvline(0, color="0.6", linewidth=0.8)
        axis.set_xlim(-limit, limit)
        for place, (_, cells) in enumerate(rows):
            cell = cells[number]
            good = cell.difference * column.better > 0
            colour = ("C0" if good else "C3") if cell.beyond else "0.5"
            if abs(cell.difference) < limit:
                axis.errorbar(cell.difference, place, xerr=cell.half, fmt="o", color=colour, markersize=4, capsize=2)
            else:
                edge = math.copysign(limit, cell.difference)
                text = f"{cell.difference:+.3g} →" if edge > 0 else f"← {cell.difference:+.3g}"
                side = "right" if edge > 0 else "left"
                axis.text(edge, place, text, color=colour, ha=side, va="center", fontsize="small")
        better = "left" if column.better < 0 else "right"
        axis.set_xlabel(f"{column.label}, difference ({better}: better)")
        axis.grid(axis="x", color="0.9")
    axes[0].set_yticks(range(len(rows)), [label for label, _ in rows])
    axes[0].invert_yaxis()
    return svg(figure)


def _limit(cells: Sequence[Cell]) -> float:
    """The end of an axis, beyond which a few large differences are written as numbers."""
    reach = sorted(abs(cell.difference) + cell.half for cell in cells if cell.half >= 0)
    return 1.05 * min(reach[-1], 4 * reach[len(reach) // 2]) or 1 if reach else 1


def lines(panels: Mapping[str, Mapping[str, Sequence[Point]]], references: Mapping[str, float], x: str) -> bytes:
    """For each figure, a line for each setting, with standard deviations; dashed: the figure of held-out images."""
    figure = Figure(figsize=(4.6 * len(panels), 4.2), layout="constrained")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axis, (label, settings) in zip(axes, panels.items(), strict=True):
        for mark, (name, points) in zip(MARKS, settings.items(), strict=False):
            xs, ys, spread = zip(*sorted(points), strict=True)
            axis.errorbar(xs, ys, yerr=spread, fmt=f"{mark}-", label=name, markersize=4, linewidth=1, capsize=2)
        axis.axhline(references[label], color="0.5", linestyle="--", label="held-out images")
        axis.set_xscale("log")
        axis.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axis.xaxis.set_major_formatter(ScalarFormatter())
        axis.xaxis.set_minor_locator(NullLocator())
        axis.set_xlabel(x)
        axis.set_ylabel(label)
        axis.grid(color="0.9")
    axes[0].legend(fontsize="small")
    return svg(figure)


def svg(figure: Figure) -> bytes:
    with mpl.rc_context({"svg.hashsalt": "choosing", "svg.fonttype": "none"}):
        buffer = io.BytesIO()
        figure.savefig(buffer, format="svg", metadata={"Date": None})
    return buffer.getvalue()
