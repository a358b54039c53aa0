"""Samples of a finished model with one change at a time to its sampling options, and samplers by steps."""

import json
import time
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch

from choices.results import Row, of_quality
from choices.training import with_assignments
from diffusion.evaluation import quality, samplers, sets
from diffusion.evaluation.features import Features, trained_features
from diffusion.model import Model, load_model
from diffusion.pairs.pairs import Pairs
from diffusion.process.denoiser import THRESHOLDS
from diffusion.process.variance import VARIANCES
from diffusion.samples import save_grid
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import SAMPLERS
from diffusion.sampling.spacing import SPACINGS
from flows import params as parameters
from flows.params import Params
from flows.paths import Paths

CPU = torch.device("cpu")
GROUPS = ("sampler", "spacing", "threshold", "guidance", "variance")
STEPS = (5, 10, 20, 50, 250)
MANY = 100
"""More steps than this are taken by `ddpm` alone."""
SPACING_STEPS = (10, 20)
GUIDANCE = (1.0, 1.5, 2.0, 3.0)
SHOWN = 8
"""Number of samples in a picture."""
Change = dict[str, Any]
"""Sampling options that differ from those of the tree's params.yaml, by name."""


@dataclass(frozen=True)
class Draw:
    """One set of samples."""

    tree: Path
    data: str
    base: str
    """Assignments that change the tree's sampling options for all sets."""
    change: str
    """A `Change`, as JSON."""
    seed: int
    samples: int

    @property
    def key(self) -> tuple[str, str, int, int]:
        return self.base, self.change, self.seed, self.samples

    @property
    def options(self) -> SampleOptions:
        return options(sample_section(self.tree, self.base), json.loads(self.change))


def sample_section(tree: Path, base: str) -> SampleOptions:
    """The sampling options of a tree, with changes as typed after `ddpm set`."""
    return with_assignments(parameters.read(Paths(tree).params), base).sample


def options(base: SampleOptions, change: Change) -> SampleOptions:
    return SampleOptions.model_validate(base.model_dump() | change)


def settings(
    base: SampleOptions, groups: Iterable[str], steps: Iterable[int], classes: bool, learned: bool
) -> list[str]:
    """The changes of each group, as JSON, without repetitions; the base itself comes first."""
    steps = list(steps)
    few = [number for number in SPACING_STEPS if number in steps]
    of_group: dict[str, list[Change]] = {
        "sampler": [
            {"sampler": name, "steps": number}
            for name in SAMPLERS
            for number in steps
            # `consistency` is for distilled models; with others, it does as `ddim`.
            if name != "consistency" and (number <= MANY or name == "ddpm")
        ],
        "spacing": [{"spacing": name, "steps": number} for name in SPACINGS for number in few],
        "threshold": [{"threshold": name} for name in THRESHOLDS],
        "guidance": [{"guidance": scale} for scale in GUIDANCE] if classes else [],
        "variance": [{"sampler": "ddpm", "variance": name} for name in VARIANCES if name != "learned" or learned],
    }
    changes = [{}, *(change for group in GROUPS if group in groups for change in of_group[group])]
    as_is = base.model_dump()
    as_is["sampler"] = base.sampler.kind
    differing = [{name: value for name, value in change.items() if as_is[name] != value} for change in changes]
    return list(dict.fromkeys(json.dumps(change, sort_keys=True) for change in differing))


@dataclass(frozen=True)
class Measured:
    """A tree's model and what its samples are compared with."""

    params: Params
    model: Model
    real: quality.References
    features: Features


@cache
def opened(tree: Path, samples: int) -> Measured:
    paths = Paths(tree)
    train, *held_out = (Pairs(paths.pairs, split) for split in ("train", "val", "test"))
    real = quality.references(samples, train, held_out)
    return Measured(
        parameters.load(paths.params), load_model(paths.model, CPU), real, trained_features(train, paths.features)
    )


def measure(draw: Draw) -> Row:
    """Draw samples and compare them with real images."""
    on, began = opened(draw.tree, draw.samples), time.process_time()
    drawn = samplers.draw(on.model, draw.options, draw.seed, CPU, on.real.others.labels)
    seconds = time.process_time() - began
    found = quality.measure(on.real, drawn.samples, on.features, on.params.evaluate.resamples)
    tree_options = sample_section(draw.tree, draw.base)
    base = tree_options.model_dump(mode="json", exclude={"count"}) | {"sampler": tree_options.sampler.kind}
    return {
        "data": draw.data,
        "base": base,
        "set": draw.base,
        "change": json.loads(draw.change),
        "seed": draw.seed,
        "samples": len(drawn.samples.labels),
        "evaluations": drawn.evaluations,
        "cpu_seconds": round(seconds, 1),
        "figures": of_quality(found),
        "held_out": of_quality(found, "held-out"),
        "features": found.figures[0].features,
    }


def save_picture(draw: Draw, directory: Path) -> None:
    """Save the first samples of a draw as a row."""
    on, options = opened(draw.tree, draw.samples), draw.options
    drawn = sets.samples(on.model, options, draw.seed, CPU, on.real.others.labels[:SHOWN])
    save_grid(drawn.pixels, directory / f"{options.sampler.kind}-{options.steps}.png", columns=SHOWN)
