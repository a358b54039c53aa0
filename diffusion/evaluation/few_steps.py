"""Student and teacher compared by number of steps: quality, drift, and the pictures themselves."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from diffusion.errors import counted
from diffusion.evaluation import samplers
from diffusion.evaluation.charts import Chart, Line
from diffusion.evaluation.plots import strip
from diffusion.evaluation.quality import LABELS, Figure
from diffusion.evaluation.samplers import Drawn, Row
from diffusion.model import Model
from diffusion.pairs.pixels import visible
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import DdimOptions

STEPS = (1, 2, 4, 8, 16, 50)
"""Numbers of steps of both, as far as there are that many timesteps."""
SHOWN = (1, 2, 4, 8, 50)
"""Those in the picture."""
TEACHER, STUDENT = "teacher", "student"
COLUMNS = 10
"""Number of images in a row of the picture."""


class Drawing(NamedTuple):
    """Samples of one model with one number of steps."""

    model: str
    """TEACHER or STUDENT."""
    drawn: Drawn


def teacher_sampling(sample: SampleOptions, steps: int) -> SampleOptions:
    """How the teacher samples: `steps` steps of DDIM, even in the angle as those of the student."""
    changes = {"sampler": DdimOptions(), "steps": steps, "spacing": "angle", "variance": "fixed-small"}
    return sample.model_copy(update=changes)


def draw(
    models: Sequence[tuple[str, Model, Callable[[int], SampleOptions]]],
    steps: Sequence[int],
    seed: int,
    device: torch.device,
    labels: NDArray[np.int64],
    check_stop: Callable[[], None],
) -> list[Drawing]:
    """Sample with each model, given with its name and options, in each number of steps, from the same noise.

    `labels`: the class of each sample. `check_stop` is called after each step of a batch.
    """
    return [
        Drawing(name, samplers.draw(model, options(count), seed, device, labels, check_stop))
        for name, model, options in models
        for count in steps
    ]


def drift(drawings: Sequence[Drawing], resamples: NDArray[np.int64]) -> list[tuple[float, float, float]]:
    """For each drawing, the distance from the teacher's samples with the most steps, from the same noise.

    The root mean square over the pixels in grey levels, mean over images, and its 95 % bootstrap interval.
    resamples: how often each image is drawn, (R, n).
    """
    teacher = [each.drawn for each in drawings if each.model == TEACHER]
    reference = max(teacher, key=lambda drawn: drawn.options.steps).samples.pixels.astype(np.float64)
    found = []
    for each in drawings:
        distance = np.sqrt(np.square(each.drawn.samples.pixels - reference).mean(axis=(1, 2, 3)))
        low, high = np.quantile(resamples @ distance / len(distance), [0.025, 0.975])
        found.append((float(distance.mean()), float(low), float(high)))
    return found


def table(
    drawings: Sequence[Drawing], drifts: Sequence[tuple[float, float, float]], figures: Sequence[Sequence[Figure]]
) -> list[dict[str, Any]]:
    """The rows of few_steps.csv: model, sampler, steps and network evaluations, figures and drift with intervals.

    figures: those that compare features, for each drawing; empty if they were not measured.
    """
    rows = []
    for number, (each, (value, low, high)) in enumerate(zip(drawings, drifts, strict=True)):
        options = each.drawn.options
        row: dict[str, Any] = {"model": each.model, "sampler": options.sampler.kind, "steps": options.steps}
        row |= {"evaluations": each.drawn.evaluations, "drift": value, "drift_low": low, "drift_high": high}
        for figure in figures[number] if figures else ():
            row |= {
                figure.metric: figure.value,
                f"{figure.metric}_low": figure.low,
                f"{figure.metric}_high": figure.high,
            }
        rows.append(row | {"n": len(each.drawn.samples.labels)})
    return rows


def row_of(rows: Sequence[Row], model: str, steps: int) -> Row | None:
    """The row of a model with a number of steps; None if it was not drawn."""
    return next((row for row in rows if (row["model"], int(row["steps"])) == (model, steps)), None)


def chart(rows: Sequence[Row], metric: str) -> Chart:
    """A figure of teacher and student over the number of steps, with intervals; distances on a log axis."""
    lines = []
    for colour, model in enumerate((TEACHER, STUDENT)):
        own = sorted((row for row in rows if row["model"] == model), key=lambda row: row["steps"])
        x, y, low, high = ([row[key] for row in own] for key in ("steps", metric, f"{metric}_low", f"{metric}_high"))
        lines.append(Line(model, x, y, "o-", colour, low, high))
    shares = metric in ("precision", "recall", "density", "coverage")
    positive = all(end > 0 for line in lines for end in line.low)
    label = LABELS.get(metric, "drift, in grey levels")
    return Chart("sampling steps", label, tuple(lines), log_x=True, log_y=positive and not shares)


def picture(drawings: Sequence[Drawing], shown: tuple[int, ...] = ()) -> bytes:
    """PNG: a row of images for each of the SHOWN numbers of steps, first of the teacher, then of the student.

    A column shows what becomes of the same noise. shown: the channels to show; see `visible`.
    """
    chosen = [each for each in drawings if each.drawn.options.steps in SHOWN]
    rows = []
    for each in chosen:
        steps, images = each.drawn.options.steps, visible(each.drawn.samples.pixels[:COLUMNS], shown)
        rows.append((f"{each.model}\n{counted(steps, 'step')}", list(images)))
    return strip([""] * len(rows[0][1]), rows, len(chosen) // 2)
