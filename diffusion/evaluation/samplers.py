"""Settings of sampling compared: samples of each, from the same noise and of the same classes, and their figures."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusion.evaluation import sets
from diffusion.evaluation.charts import Chart, Line
from diffusion.evaluation.quality import COMPARED, LABELS, Figure
from diffusion.evaluation.sets import Images
from diffusion.model import Model
from diffusion.sampling.build import SampleOptions

SETTING = ("sampler", "spacing", "variance", "threshold", "guidance")
"""The columns that tell settings apart, besides the number of steps; from the third on, only where they differ."""

Row = Mapping[str, Any]
"""Of samplers.csv."""


class Drawn(NamedTuple):
    """Samples, and what they took."""

    options: SampleOptions
    samples: Images
    evaluations: int
    """Number of network evaluations for each sample; guidance doubles it."""


def draw(
    model: Model,
    options: SampleOptions,
    seed: int,
    device: torch.device,
    labels: NDArray[Any],
    check_stop: Callable[[], None] = lambda: None,
) -> Drawn:
    """`sets.samples`, counting the network's evaluations."""
    evaluated = 0

    def count(_: nn.Module, arguments: tuple[Tensor, ...]) -> None:
        nonlocal evaluated
        evaluated += len(arguments[0])

    with model.net.register_forward_pre_hook(count):
        samples = sets.samples(model, options, seed, device, labels, check_stop)
    return Drawn(options, samples, evaluated // len(labels))


def table(drawn: Sequence[Drawn], figures: Sequence[Sequence[Figure]]) -> list[dict[str, Any]]:
    """The rows of samplers.csv: how each set of samples was drawn, and its figures with the ends of their intervals."""
    settings = [_setting(each.options) for each in drawn]
    differing = [name for name in SETTING[2:] if len({str(setting[name]) for setting in settings}) > 1]
    rows = []
    for each, setting, found in zip(drawn, settings, figures, strict=True):
        row = {name: setting[name] for name in (*SETTING[:2], *differing)}
        row |= {"steps": each.options.steps, "evaluations": each.evaluations}
        for figure in found:
            ends = {"": figure.value, "_low": figure.low, "_high": figure.high}
            row |= {figure.metric + end: value for end, value in ends.items()}
        rows.append(row | {"n": found[0].n, "features": found[0].features})
    return rows


def _setting(options: SampleOptions) -> dict[str, Any]:
    """The columns SETTING; a sampler has its fields behind its name, such as `ddim (eta 0.5)`."""
    found = options.model_dump()
    sampler = options.sampler.model_dump()
    if isinstance(sampler, dict):
        fields = ", ".join(f"{name} {value:g}" for name, value in sampler.items() if name != "kind" and value)
        found["sampler"] = sampler["kind"] + (f" ({fields})" if fields else "")
    return found


def settings(rows: Sequence[Row]) -> list[str]:
    """Each row's setting but for the number of steps, in words: the sampler, and what differs among the rows."""
    differing = [name for name in SETTING[1:] if len({row.get(name) for row in rows}) > 1]
    return [", ".join([row["sampler"], *(_words(name, row[name]) for name in differing)]) for row in rows]


def _words(name: str, value: Any) -> str:
    return value if name == "spacing" else f"{name} {value:g}" if name == "guidance" else f"{name} {value}"


def chart(rows: Sequence[Row], metric: str) -> Chart:
    """A figure over the number of steps, with intervals: a line for each setting, labelled as by `settings`."""
    lines: dict[str, list[Row]] = {}
    for name, row in zip(settings(rows), rows, strict=True):
        lines.setdefault(name, []).append(row)
    drawn = []
    for colour, (name, members) in enumerate(lines.items()):
        members = sorted(members, key=lambda row: row["steps"])
        x, y, low, high = (
            [row[key] for row in members] for key in ("steps", metric, f"{metric}_low", f"{metric}_high")
        )
        drawn.append(Line(name, x, y, "o-", colour, low, high))
    logarithmic = COMPARED[metric] > 0 and all(end > 0 for line in drawn for end in line.low)  # a distance, no share
    return Chart("sampling steps", LABELS[metric], tuple(drawn), log_x=True, log_y=logarithmic)
