"""Plots of the evaluation, as PNG; deterministic."""

import io
from collections.abc import Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, NullLocator

from diffusion.evaluation.filmstrip import Frame

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
    axes.loglog([row["t"] + 1 for row in curve], [row["bits_per_dim"] for row in curve])
    decimal_ticks(axes.xaxis)
    decimal_ticks(axes.yaxis)
    return _png(figure)


def filmstrip(frames: Sequence[Frame]) -> bytes:
    """Sampling trajectories from left to right; each image has a row of x_t and a row of x_0_hat below it."""
    images, _, height, width = frames[0].x_t.shape
    across, down = len(frames), 2 * images
    gap = 0.25  # between images, as a fraction of their height
    bottoms = [row + gap * (row // 2) for row in range(down)]
    rows = (down + gap * (images - 1)) * height / width
    figure = Figure(figsize=(across + 0.5, rows + 0.5), dpi=80, layout="constrained")
    axes = figure.subplots()
    for column, frame in enumerate(frames):
        for index in range(images):
            for row, picture in ((2 * index, frame.x_t[index]), (2 * index + 1, frame.x_0_hat[index])):
                extent = (column + 0.02, column + 0.98, bottoms[row] + 0.98, bottoms[row] + 0.02)
                pixels = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
                axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=extent)
    axes.set_xlim(0, across)
    axes.set_ylim(bottoms[-1] + 1, 0)
    axes.set_aspect(height / width)
    labels = [f"t = {frame.t}" if frame.t >= 0 else "image" for frame in frames]
    axes.set_xticks([column + 0.5 for column in range(across)], labels)
    axes.set_yticks([bottom + 0.5 for bottom in bottoms], ["$x_t$", r"$\hat{x}_0$"] * images)
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
