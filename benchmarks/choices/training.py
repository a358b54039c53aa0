"""Models trained with one change at a time to the default parameters, with several seeds, on the digits."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from choices.results import ROOT, Row, of_quality
from diffusion.errors import UserError
from diffusion.evaluation import likelihood, noise_prediction, quality, sets
from diffusion.evaluation.features import trained_features
from diffusion.evaluation.heldout import predictions, x_0_mse
from diffusion.evaluation.histograms import values_of
from diffusion.model import Model
from diffusion.pairs.memory import Images
from diffusion.pairs.pairs import Pairs
from diffusion.storage.tar import SPLITS
from diffusion.training.fit import fit
from flows import params as parameters
from flows import yaml_files
from flows.changes import lay_over, with_field
from flows.params import Params
from flows.paths import Paths
from flows.stages import pairs as pairs_stage
from flows.stages import shard as shard_stage

CPU = torch.device("cpu")
DEFAULT = "default"
PAPERS = "train.optimizer=adamw train.timesteps=uniform"
"""Adam and uniform timesteps, as in the DDPM paper."""
GROUPS: dict[str, list[str]] = {
    DEFAULT: [""],
    "schedule": [
        "process.schedule=linear",
        "process.schedule=sigmoid",
        "process.schedule=scaled-linear",
        "process.zero_terminal_snr=true process.weighting=snr-plus-one",
    ],
    "parameterization": ["process.parameterization=eps", "process.parameterization=x_0"],
    "weighting": [f"process.weighting={name}" for name in ("vlb", "snr-plus-one", "truncated-snr", "min-snr", "p2")],
    "timesteps": [
        f"train.timesteps={name}" for name in ("stored", "uniform", "loss-second-moment", "log-snr-normal", "angle")
    ],
    "variance": ["process.learned_variance=true"],
    "network": [
        "network.fourier_features=[]",
        "network.blocks_per_level=2",
        "network.base_channels=16",
        "network.conditioning=add",
        "network.patch_size=2",
        "network.kind=uvit network.conditioning=adaln",
        "network.kind=uvit network.conditioning=token",
    ],
    "objectives": [
        f"{PAPERS} process.parameterization=mu process.weighting=vlb-large",
        f"{PAPERS} process.parameterization=mu process.weighting=posterior-mean",
        f"{PAPERS} process.parameterization=eps process.weighting=vlb-large",
        f"{PAPERS} process.parameterization=eps process.weighting=simple",
    ],
}
"""Variants by what they change, as typed after `ddpm set`, from the default parameters."""
EVERY_VARIANCE = {DEFAULT, "variance", "objectives"}
"""Groups whose bits/dim are measured with each variance of the reverse step that a model has."""


@dataclass(frozen=True)
class Run:
    """One training, and what to measure."""

    group: str
    variant: str
    seed: int
    steps: int
    images: int
    """Number of test images for bits/dim."""
    samples: int
    root: Path
    """Where the data are prepared."""

    @property
    def key(self) -> tuple[str, int, int]:
        return self.variant, self.seed, self.steps

    @property
    def params(self) -> Params:
        return with_assignments(
            parameters.read(ROOT / "params.yaml"), f"{self.variant} train.steps={self.steps} train.compile=false"
        )

    @property
    def tree(self) -> Paths:
        """The working tree with the pairs of this run's process, which may differ in its schedule."""
        process = self.params.process
        return Paths(self.root / f"{process.schedule.kind}-{process.num_timesteps}-{process.zero_terminal_snr}")


def with_assignments(document: object, assignments: str) -> Params:
    """Parameters with changes as typed after `ddpm set`; raises UserError if they are invalid."""
    given: object = {}
    for text in assignments.split():
        name, _, value = text.partition("=")
        given = with_field(given, name.split("."), yaml_files.scalar(value))
    assert isinstance(given, dict)
    return parameters.validate(lay_over(document, given), f"params.yaml with {assignments}")


def prepare(runs: list[Run]) -> None:
    """Make the pairs that the runs need, and the features."""
    for root, params in {run.tree.root: run.params for run in runs}.items():
        paths = Paths(root)
        source = params.shard.model_copy(update={"source": str(ROOT / params.shard.source)})
        shard_stage.run(params.model_copy(update={"shard": source}), paths)
        pairs_stage.run(params, paths)
    for run in runs[:1]:
        trained_features(Pairs(run.tree.pairs, "train"), run.root)


def measure(run: Run) -> Row:
    """Train a model and measure it."""
    params, paths = run.params, run.tree
    train, val, test = (Pairs(paths.pairs, split) for split in SPLITS)
    row: Row = {"data": Path(params.shard.source).stem, "group": run.group, "variant": run.variant}
    row |= {"seed": run.seed, "steps": run.steps, "images": min(run.images, test.images)}
    blocks = range(train.blocks)
    pixels, labels = (np.concatenate([of(block) for block in blocks]) for of in (train.x_0, train.labels))
    classes = train.manifest.classes
    model = Model.new(train.shape, params.network, params.process, classes, run.seed)
    row["parameters"] = sum(parameter.numel() for parameter in model.net.parameters())
    began = time.process_time()
    try:
        model = fit(model, Images(pixels, labels, classes), params.train, run.seed)
    except UserError as error:
        return row | {"finite": False, "failed": str(error), "figures": {}}
    row |= {"cpu_seconds": round(time.process_time() - began, 1)}
    squares = x_0_mse(model, val, CPU, run.seed, lambda: None)
    model = Model(model.net, model.process, model.config.model_copy(update={"x_0_mse": squares}))
    errors = noise_prediction.by_image(predictions(model, test, CPU), test.images)
    figures = {"mse": interval(errors)}
    draws = likelihood.Draws(row["images"], likelihood.strata(params.process.num_timesteps), params.seed)
    values = values_of([train, val, test])
    variances = ["analytic"]
    if run.group in EVERY_VARIANCE:
        variances += ["fixed-small", "fixed-large"] + ["learned"] * params.process.learned_variance
    for name in variances:
        terms = likelihood.measure(model, model.variance(name), test, draws, CPU, values=values)
        figures[f"bits_per_dim {name}"] = interval(terms.total)
    real = quality.references(run.samples, train, [val, test])
    drawn = sets.samples(model, params.sample, run.seed, CPU, real.others.labels)
    measured = quality.measure(real, drawn, trained_features(train, run.root), params.evaluate.resamples)
    row |= {"finite": True, "samples": real.n, "figures": figures | of_quality(measured)}
    return row | {"held_out": of_quality(measured, "held-out"), "features": measured.figures[0].features}


def interval(values: likelihood.Array) -> list[float]:
    """The mean over images, and its 95 % interval."""
    found = likelihood.mean("mean", values)
    return [found["mean"], found["mean_low"], found["mean_high"]]
