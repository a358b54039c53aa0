"""Plots of the evaluation, as PNG; deterministic."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from diffusion.evaluation.charts import decimal_ticks
from diffusion.evaluation.filmstrip import Frame, Noised

Row = dict[str, float]


def mse_by_t(curve: Sequence[Row]) -> bytes:
    """MSE of the predicted noise over t, on a log scale, with the baselines."""
    figure, axes = _axes("timestep t", "MSE of the predicted noise")
    t = [row["t"] for row in curve]
    lines = (("zero", "predicting zero", ":"), ("wiener", "linear Wiener denoiser", "--"), ("model", "model", "-"))
    for name, label, style in lines:
        axes.plot(t, [row[name] for row in curve], style, label=label)
    axes.set_yscale("log")
    decimal_ticks(axes.yaxis)
    axes.legend()
    return _png(figure)


def vlb_by_t(curve: Sequence[Row]) -> bytes:
    """Terms of the variational bound over t, on log scales; t = 0 is at 1."""
    figure, axes = _axes("timestep t + 1", "bits per dimension")
    axes.loglog([row["t"] + 1 for row in curve], [row["bits_per_dim"] for row in curve], nonpositive="mask")
    decimal_ticks(axes.xaxis)
    decimal_ticks(axes.yaxis)
    return _png(figure)


def filmstrip(frames: Sequence[Frame]) -> bytes:
    """Sampling trajectories from left to right; each image has a row of x_t and a row of x_0_hat below it."""
    rows = [
        (label, [pictures[image] for pictures in columns])
        for image in range(len(frames[0].x_t))
        for label, columns in (
            ("$x_t$", [frame.x_t for frame in frames]),
            (r"$\hat{x}_0$", [frame.x_0_hat for frame in frames]),
        )
    ]
    return strip([f"t = {frame.t}" if frame.t >= 0 else "image" for frame in frames], rows, 2)


def noising(frames: Sequence[Noised]) -> bytes:
    """The forward process from left to right, a row for each image."""
    rows = [("$x_t$", [frame.x_t[image] for frame in frames]) for image in range(len(frames[0].x_t))]
    return strip([f"t = {frame.t}" if frame.t >= 0 else "image" for frame in frames], rows, 1)


def strip(
    titles: Sequence[str],
    rows: Sequence[tuple[str, Sequence[NDArray[np.uint8]]]],
    grouped: int,
) -> bytes:
    """Labelled rows of images (C, H, W) below the titles of their columns, `grouped` rows at a time."""
    _, height, width = rows[0][1][0].shape
    across, down = len(titles), len(rows)
    gap = 0.25  # between groups, as a fraction of the height of an image
    bottoms = [row + gap * (row // grouped) for row in range(down)]
    tall = (down + gap * (down // grouped - 1)) * height / width
    figure = Figure(figsize=(across + 0.5, tall + 0.5), dpi=80, layout="constrained")
    axes = figure.subplots()
    for bottom, (_, pictures) in zip(bottoms, rows, strict=True):
        for column, picture in enumerate(pictures):
            extent = (column + 0.02, column + 0.98, bottom + 0.98, bottom + 0.02)
            pixels = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
            axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=extent)
    axes.set_xlim(0, across)
    axes.set_ylim(bottoms[-1] + 1, 0)
    axes.set_aspect(height / width)
    axes.set_xticks([column + 0.5 for column in range(across)], titles)
    axes.set_yticks([bottom + 0.5 for bottom in bottoms], [label for label, _ in rows])
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.set_frame_on(False)
    return _png(figure)


def training(loss: Sequence[Row], heldout: Sequence[Row]) -> bytes:
    """Training loss and held-out error over the steps."""
    figure, axes = _axes("step", "loss, MSE")
    axes.plot(
        [row["step"] for row in loss],
        [row["loss"] for row in loss],
        linewidth=1,
        alpha=0.7,
        label="training loss (weighted)",
    )
    axes.plot(
        [row["step"] for row in heldout],
        [row["mse"] for row in heldout],
        "o-",
        label="held-out noise MSE (EMA weights)",
    )
    axes.set_yscale("log")
    decimal_ticks(axes.yaxis)
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
