"""Charts over timesteps and steps, as SVG that takes its colours from the page around it."""

import io
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import matplotlib as mpl
import numpy as np
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

Rows = Sequence[Mapping[str, float]]

COLOURS = 8
"""Number of different colours on a page, --series-0 to --series-7."""
TEXT, GRID, SERIES = "#010101", "#020202", "#0300{:02x}"
"""Colours that stand in the SVG only until `svg` replaces them by those of the page."""
SIZE = (5.4, 3.2)
"""Inches; small, so that the labels can be read on a phone."""


class Line(NamedTuple):
    """One line of a chart."""

    label: str
    x: Sequence[float]
    y: Sequence[float]
    style: str = "-"
    """As in matplotlib: `-`, `--`, `:`, or `o-` with a marker at each point."""
    colour: int = 0
    """Number of its colour; taken modulo COLOURS."""
    low: Sequence[float] = ()
    """Lower ends of the intervals of y, and upper ones; none if empty."""
    high: Sequence[float] = ()


class Chart(NamedTuple):
    """Lines with what their axes show."""

    x: str
    y: str
    lines: tuple[Line, ...]
    log_x: bool = False
    log_y: bool = True


def mse_by_t(runs: Mapping[str, Rows]) -> Chart:
    """MSE of the predicted noise over t, for runs by name; of a single run, beside the baselines."""
    lines = []
    for number, (name, rows) in enumerate(runs.items()):
        lines.append(_line(name, rows, "t", "model", colour=number))
    if len(runs) == 1:
        (rows,) = runs.values()
        lines.append(_line("linear Wiener denoiser", rows, "t", "wiener", "--", 1))
        lines.append(_line("predicting zero", rows, "t", "zero", ":", 2))
    return Chart("timestep t", "MSE of the predicted noise", tuple(lines))


def vlb_by_t(runs: Mapping[str, Rows]) -> Chart:
    """Terms of the variational bound over t, for runs by name; t = 0 is at 1."""
    lines = []
    for number, (name, rows) in enumerate(runs.items()):
        line = _line(name, rows, "t", "bits_per_dim", colour=number)
        lines.append(line._replace(x=[t + 1 for t in line.x]))
    return Chart("timestep t + 1", "bits per dimension", tuple(lines), log_x=True)


def loss(runs: Mapping[str, Rows]) -> Chart:
    """The weighted training loss over the steps, for runs by name."""
    lines = [_line(name, rows, "step", "loss", colour=number) for number, (name, rows) in enumerate(runs.items())]
    return Chart("step", "training loss (weighted)", tuple(lines))


def heldout(runs: Mapping[str, Rows]) -> Chart:
    """The held-out error of the EMA weights over the steps, for runs by name."""
    lines = [_line(name, rows, "step", "mse", "o-", number) for number, (name, rows) in enumerate(runs.items())]
    return Chart("step", "held-out noise MSE (EMA weights)", tuple(lines))


def svg(chart: Chart) -> str:
    """The chart as an SVG element for a page that defines --grid and --series-0 to --series-7; deterministic.

    Its text is text, in the page's font and colour. It has no legend.
    """
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axes = figure.subplots()
        axes.set_xlabel(chart.x)
        axes.set_ylabel(chart.y)
        axes.grid(True)
        for spine in ("top", "right"):
            axes.spines[spine].set_visible(False)
        for line in chart.lines:
            colour = SERIES.format(line.colour % COLOURS)
            axes.plot(line.x, line.y, line.style, color=colour, linewidth=1.6, markersize=4)
            if line.low:
                axes.vlines(line.x, line.low, line.high, color=colour, linewidth=1.6)
        if chart.log_y:
            axes.set_yscale("log", nonpositive="mask")
            decimal_ticks(axes.yaxis)
        if chart.log_x:
            axes.set_xscale("log")
            decimal_ticks(axes.xaxis)
        buffer = io.StringIO()
        figure.savefig(buffer, format="svg", transparent=True, metadata=dict.fromkeys(METADATA))
    return _for_page(buffer.getvalue())


STYLE: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "ddpm",  # otherwise ids are random
    "font.size": 11,
    "text.color": TEXT,
    "axes.labelcolor": TEXT,
    "axes.edgecolor": TEXT,
    "xtick.color": TEXT,
    "ytick.color": TEXT,
    "grid.color": GRID,
}
METADATA = ("Date", "Creator", "Format", "Type")


def decimal_ticks(axis: Axis) -> None:
    """Label a log axis with plain decimals, such as 0.06, 0.1 and 0.2, also if the data span less than a decade."""
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    if decades < 0.4:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 5, 10]))
    else:
        digits = {0.9: range(1, 10), 1.6: (1, 2, 4, 6), 3.5: (1, 2, 5), np.inf: (1,)}
        subs = next(subs for limit, subs in digits.items() if decades < limit)
        axis.set_major_locator(LogLocator(subs=subs, numticks=20))
    axis.set_minor_locator(NullLocator())
    axis.set_minor_formatter(NullFormatter())
    axis.set_major_formatter(lambda value, _: np.format_float_positional(value, precision=10, trim="-"))


def _for_page(document: str) -> str:
    """An SVG document of matplotlib as an element of a page."""
    element = document[document.index("<svg") :].strip()
    element = re.sub(r"<defs>\s*<style.*?</style>\s*</defs>", "", element, flags=re.DOTALL)
    element = re.sub(r' id="[a-z0-9.]+_\d+"', "", element)  # the same in every chart
    element = re.sub(r' (xmlns(:xlink)?="[^"]*"|(width|height)="[\d.]+pt")', "", element)
    element = re.sub(r" font-family: [^;\"]*;", "", element)
    element = element.replace(TEXT, "currentColor").replace(GRID, "var(--grid)")
    for number in range(COLOURS):
        element = element.replace(SERIES.format(number), f"var(--series-{number})")
    return "\n".join(line.rstrip() for line in element.splitlines())


def _line(name: str, rows: Rows, x: str, y: str, style: str = "-", colour: int = 0) -> Line:
    points = [(row[x], row[y]) for row in rows if y in row]
    style = style.replace("-", "--") if colour >= COLOURS and "--" not in style else style  # where colours repeat
    return Line(name, [point[0] for point in points], [point[1] for point in points], style, colour)
