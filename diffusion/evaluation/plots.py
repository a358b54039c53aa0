"""Plots of the evaluation, as PNG: the same bytes for the same figures."""

import io
from collections.abc import Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from diffusion.evaluation.filmstrip import Frame

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


def vlb_by_t(curve: Sequence[Row]) -> bytes:
    """The terms of the bound over t, both on logarithmic scales: t = 0 stands at 1."""
    figure, axes = _axes("t + 1", "bits per dimension")
    axes.loglog([row["t"] + 1 for row in curve], [row["bits_per_dim"] for row in curve])
    return _png(figure)


def filmstrip(frames: Sequence[Frame]) -> bytes:
    """Pictures on their way from noise, left to right: of each a row of x_t, and one of x_0_hat below it."""
    images, _, height, width = frames[0].x_t.shape
    across, down = len(frames), 2 * images
    gap = 0.25  # between pictures, in heights
    bottoms = [row + gap * (row // 2) for row in range(down)]
    figure = Figure(figsize=(across + 0.5, (down + gap * images) * height / width + 0.5), dpi=80, layout="constrained")
    axes = figure.subplots()
    for column, frame in enumerate(frames):
        for index in range(images):
            for row, picture in ((2 * index, frame.x_t[index]), (2 * index + 1, frame.x_0_hat[index])):
                extent = (column + 0.02, column + 0.98, bottoms[row] + 0.98, bottoms[row] + 0.02)
                pixels = picture[0] if len(picture) == 1 else picture.transpose(1, 2, 0)
                axes.imshow(pixels, cmap="gray", vmin=0, vmax=255, extent=extent, interpolation="bicubic")
    axes.set_xlim(0, across)
    axes.set_ylim(bottoms[-1] + 1, 0)
    axes.set_aspect(height / width)
    labels = [f"t = {frame.t}" if frame.t >= 0 else "picture" for frame in frames]
    axes.set_xticks([column + 0.5 for column in range(across)], labels)
    axes.set_yticks([bottom + 0.5 for bottom in bottoms], ["$x_t$", r"$\hat{x}_0$"] * images)
    axes.tick_params(length=0, top=False, labeltop=True, labelbottom=False)
    axes.set_frame_on(False)
    return _png(figure)


def training(loss: Sequence[Row], heldout: Sequence[Row]) -> bytes:
    """Training loss and held-out error over the steps."""
    figure, axes = _axes("step", "")
    axes.plot(
        [row["step"] for row in loss],
        [row["loss"] for row in loss],
        linewidth=1,
        alpha=0.7,
        label="training loss, as weighted",
    )
    axes.plot(
        [row["step"] for row in heldout], [row["mse"] for row in heldout], "o-", label="held-out noise MSE, EMA weights"
    )
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
