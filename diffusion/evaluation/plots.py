"""Plots of the evaluation, as PNG: the same bytes for the same figures."""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

Row = dict[str, float]


def mse_by_t(curve: Sequence[Row]) -> bytes:
    """The error of the predicted noise over t, on a logarithmic scale, beside the baselines."""
    figure, axes = _axes("timestep t", "MSE of the predicted noise")
    t = [row["t"] for row in curve]
    for name, label, style in (("zero", "no noise", ":"), ("wiener", "Wiener, linear", "--"), ("model", "model", "-")):
        axes.plot(t, [row[name] for row in curve], style, label=label)
    axes.set_yscale("log")
    axes.legend()
    return _png(figure)


def training(loss: Sequence[Row], heldout: Sequence[Row]) -> bytes:
    """Training loss and held-out error over the steps."""
    figure, axes = _axes("step", "noise MSE")
    axes.plot(
        [row["step"] for row in loss], [row["loss"] for row in loss], linewidth=1, alpha=0.7, label="training loss"
    )
    axes.plot([row["step"] for row in heldout], [row["mse"] for row in heldout], "o-", label="held-out, EMA weights")
    axes.set_yscale("log")
    axes.legend()
    return _png(figure)


def _axes(x: str, y: str) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(6.4, 3.6), dpi=110, layout="constrained")
    axes = figure.subplots()
    axes.set_xlabel(x)
    axes.set_ylabel(y)
    axes.grid(alpha=0.3)
    return figure, axes


def _png(figure: Figure) -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()
