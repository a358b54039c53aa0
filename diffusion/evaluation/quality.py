"""How good the samples of a model are: distances to the training images, beside those of real images and of noise.

Four sets of n images each are compared with the same m training images: samples, other training images, held-out images
(val and test) and noise. The training images are split anew into n and m for each of DRAWS draws, so that the spread
over draws shows what a difference means. All but the samples depend on nothing but the data.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import UserError
from diffusion.evaluation import distances, memorisation, sets
from diffusion.evaluation.features import Features, OwnFeatures
from diffusion.evaluation.memorisation import Nearest
from diffusion.evaluation.sets import Images
from diffusion.pairs.noise import Purpose, stream
from diffusion.pairs.pairs import Pairs
from diffusion.pairs.pixels import visible

LABELS = {
    "frechet_distance": "Fréchet distance",
    "kid": "kernel distance (KID)",
    "precision": "precision",
    "recall": "recall",
    "density": "density",
    "coverage": "coverage",
    "class_agreement": "class agreement",
    "nearest_distance": "distance to the nearest training image, in grey levels",
    "near_copies": "near-copies of training images",
}
COMPARED = {"frechet_distance": 1, "kid": 1, "precision": -1, "recall": -1, "density": -1, "coverage": -1}
"""The figures behind the verdict, and the sign of a difference for the worse."""
PIXELS = "pixels"
"""What is compared where it is no features."""
SETS = ("samples", "train", "held-out", "noise")

MIN_IMAGES = 20
"""Below this number of held-out images, nothing is measured."""
MAX_REFERENCE = 4096
"""Number of training images that sets are compared with, unless a set has more images."""
DRAWS = 10
"""Number of independent draws of training images."""
SUBSETS, KEPT = 200, 0.8
"""Number of random subsets of a set, at most, and the share of its images in each."""
NEAR_COPY = 1 / 3
"""An image is a near-copy if its distance to the nearest training image is at most this fraction of that to the
second-nearest one (Gu et al. 2023, after Yoon et al. 2023). Blurred images are near to many, so they are not."""
COPYING = 0.05
"""Share of near-copies above which a model copies."""

NOISE, RESAMPLING, LEAVING_OUT, DRAWING = range(4)
"""Purposes of random numbers."""

Interval = tuple[float, float, float]
"""Value, and lower and upper limit."""
Array = NDArray[np.float64]


class Figure(NamedTuple):
    """One row of quality.csv."""

    metric: str
    features: str
    """Whose features are compared, or PIXELS."""
    set: str
    value: float
    low: float
    high: float
    n: int
    """Number of images in the set."""

    @property
    def error(self) -> float:
        """Standard error, from the longer side of the 95 % interval."""
        return max(self.high - self.value, self.value - self.low) / 1.96

    @property
    def label(self) -> str:
        """The metric's name in tables, which says which features it compares."""
        name = LABELS[self.metric]
        return name if self.features == PIXELS else f"{name} ({self.features})"


@dataclass(frozen=True)
class Quality:
    """The figures of all sets, and what they mean."""

    figures: list[Figure]
    reference_images: int
    """m, the number of training images that all sets are compared with."""
    picture: bytes
    """PNG: samples above their nearest training images, then held-out images above theirs."""
    others: Sequence[Sequence[Figure]] = ()
    """The figures of further sets of samples that compare features."""

    def __getitem__(self, key: str | tuple[str, str]) -> Figure:
        """The figure of a metric, of the samples or of another set; raises KeyError if there is none."""
        metric, which = (key, "samples") if isinstance(key, str) else key
        return {(figure.metric, figure.set): figure for figure in self.figures}[metric, which]

    @property
    def of_samples(self) -> list[Figure]:
        """The figures of the samples that compare features, as in `others`."""
        return [self[metric] for metric in COMPARED]

    @property
    def report(self) -> dict[str, Any]:
        """The figures of the samples, for reports/evaluate.json, and what the verdict compares them with."""
        figures = {figure.metric: figure for figure in self.figures if figure.set == "samples"}
        figures["frechet_distance_heldout"] = self["frechet_distance", "held-out"]
        found: dict[str, Any] = {"quality": self.verdict[0], "kid_se": self["kid"].error}
        for name, figure in figures.items():
            found |= {name: figure.value, f"{name}_low": figure.low, f"{name}_high": figure.high}
        return found | {"quality_images": self["kid"].n, "quality_reference_images": self.reference_images}

    @property
    def verdict(self) -> tuple[str, str]:
        """`copying`, `good` or `still learning`, and why.

        copying: the share of near-copies among the samples is, beyond its interval, above 5 %, above that among the
        training images, each compared with the others, and above that among the held-out images, which no model has
        copied: images of one pixel, for example, mostly occur among the training images. good: no figure of the samples
        is worse than that of held-out images by more than 2.58 standard errors of the difference, which for equal sets
        happens in 0.5 % of the comparisons.
        """
        near, train, held_out = (self["near_copies", name] for name in ("samples", "train", "held-out"))
        if near.low > max(COPYING, train.high, held_out.high):
            return "copying", (
                f"{near.value:.0%} are near-copies of training images, as are {train.value:.0%} of the training "
                f"images and {held_out.value:.0%} of the held-out ones"
            )
        worse = []
        for metric, sign in COMPARED.items():
            ours, real = self[metric], self[metric, "held-out"]
            if sign * (ours.value - real.value) > 2.58 * np.hypot(ours.error, real.error):
                worse.append(f"{LABELS[metric]} {ours.value:.3g} against {real.value:.3g}")
        if worse:
            return "still learning", f"worse than held-out images ({', '.join(worse)}; {self.figures[0].features})"
        ours, real = self["frechet_distance"], self["frechet_distance", "held-out"]
        against = f"{ours.value:.3g} against {real.value:.3g}"
        return "good", f"not told apart from held-out images (Fréchet distance {against}; {ours.features})"


class References(NamedTuple):
    """The real images that samples are compared with, a function of the data and n alone."""

    train: Pairs
    pool: Images
    """n + m training images."""
    held_out: Images
    """n images of val and test."""

    @property
    def n(self) -> int:
        return len(self.held_out.labels)

    @property
    def others(self) -> Images:
        """n training images, that are compared with the m others; samples have their classes."""
        return self.pool.part(slice(0, self.n))

    def generator(self, purpose: int) -> np.random.Generator:
        """Random numbers for a purpose, the same for all models."""
        return stream(sets.data_seed(self.train.manifest), Purpose.QUALITY, high=purpose)


def references(wanted: int, train: Pairs, held_out: Sequence[Pairs]) -> References:
    """The real images, n = `wanted` in each set, or as many as there are held out, or half of the training images."""
    n = min(wanted, sum(pairs.images for pairs in held_out), train.images // 2)
    return References(train, sets.chosen([train], n + max(n, MAX_REFERENCE)), sets.chosen(held_out, n))


def measure(
    real: References,
    samples: Images,
    features: Features,
    resamples: int,
    shown: tuple[int, ...] = (),
    others: Sequence[Images] = (),
) -> Quality:
    """Compare n samples and the other sets with the training images.

    Args:
        real: at least MIN_IMAGES in each set.
        samples: as many as there are in each set, with the classes they were generated for.
        features: in which images are compared.
        resamples: number of bootstrap resamples for means over images.
        shown: the channels to show in the picture; see `visible`.
        others: further sets of n samples.
    """
    noise = sets.noise(real.others, real.n, real.generator(NOISE))
    compared = {"samples": samples, "held-out": real.held_out, "noise": noise}
    further = {f"samples {number}": images for number, images in enumerate(others)}
    figures = _feature_figures(features, compared | further, real, resamples)
    of_others = [[figure for figure in figures if figure.set == name] for name in further]
    figures = [figure for figure in figures if figure.set not in further]
    if isinstance(features, OwnFeatures) and features.supervised:
        for name in ("samples", "held-out"):
            if (compared[name].labels >= 0).any():
                recognized = features.recognized(compared[name])
                agreement = _mean(recognized.astype(float), resamples, real)
                figures.append(Figure("class_agreement", features.description, name, *agreement, len(recognized)))
    compared["train"] = real.others
    nearest = {name: memorisation.nearest(compared[name].pixels, real.train, name == "train") for name in SETS}
    for name in SETS:
        distance, second = nearest[name].distance, nearest[name].second
        of_images = {"nearest_distance": distance, "near_copies": (distance <= NEAR_COPY * second).astype(float)}
        figures += [
            Figure(metric, PIXELS, name, *_mean(values, resamples, real), real.n)
            for metric, values in of_images.items()
        ]
    order = list(LABELS)
    figures.sort(key=lambda figure: (order.index(figure.metric), SETS.index(figure.set)))
    return Quality(figures, len(real.pool.labels) - real.n, _picture(compared, nearest, shown), of_others)


def _feature_figures(
    features: Features, compared: Mapping[str, Images], real: References, resamples: int
) -> list[Figure]:
    """The figures that compare features: of the sets given, and of draws of training images."""
    n, of_pool = real.n, features(real.pool.pixels)
    if (of_pool == of_pool[0]).all():  # every set would look as good as any other
        raise UserError(
            f"evaluate.features: {features.description} are the same for all training images; use another file, or set "
            "evaluate.quality_samples to 0"
        )
    figures = []
    kept = np.tile(np.arange(n) < int(KEPT * n), (min(resamples, SUBSETS), 1))
    counts = np.concatenate([np.ones((1, n), bool), real.generator(LEAVING_OUT).permuted(kept, axis=1)])
    for name, images in compared.items():
        x, y = features(images.pixels), of_pool[n:]
        near = distances.neighbours(x, y, counts)
        found = {
            "frechet_distance": _spread(distances.frechet(x, y, counts), n, least=0.0),
            "kid": _spread(distances.kid(x, y, counts), n),
            "precision": _mean(near.precision, resamples, real),
            "recall": _spread(near.recall, n, least=0.0, most=1.0),
            "density": _mean(near.density, resamples, real),
            "coverage": _spread(near.coverage, n, least=0.0, most=1.0),
        }
        figures += [Figure(metric, features.description, name, *interval, n) for metric, interval in found.items()]
    drawn: dict[str, list[float]] = {}
    draws = real.generator(DRAWING)
    for _ in range(DRAWS):
        order = draws.permutation(len(of_pool))
        x, y = of_pool[order[:n]], of_pool[order[n:]]
        both = {"frechet_distance": distances.frechet(x, y), "kid": distances.kid(x, y)}
        for metric, values in (both | distances.neighbours(x, y)._asdict()).items():
            drawn.setdefault(metric, []).append(float(values.mean()))
    return figures + [
        Figure(metric, features.description, "train", float(np.mean(values)), min(values), max(values), n)
        for metric, values in drawn.items()
    ]


def _spread(values: Array, n: int, least: float = -np.inf, most: float = np.inf) -> Interval:
    """A figure of a set of n images and its 95 % interval, ± 1.96 standard errors, within the limits given.

    values: the figure of the set, then those of random subsets with KEPT of it, whose spread is half the standard error
    (the delete-d jackknife, Shao & Wu 1989). In bootstrap resamples, copies of images would shift these figures.
    """
    kept = int(KEPT * n)
    value, error = float(values[0]), 1.96 * float(values[1:].std()) * float(np.sqrt(kept / (n - kept)))
    return value, max(value - error, least), min(value + error, most)


def _mean(values: Array, resamples: int, real: References) -> Interval:
    """The mean over images, and its 95 % bootstrap interval."""
    counts = real.generator(RESAMPLING).multinomial(len(values), np.full(len(values), 1 / len(values)), size=resamples)
    low, high = np.quantile(counts @ values / len(values), [0.025, 0.975])
    return float(values.mean()), float(low), float(high)


def _picture(compared: Mapping[str, Images], nearest: Mapping[str, Nearest], shown: tuple[int, ...]) -> bytes:
    rows = [
        visible(images, shown)[: 2 * memorisation.COLUMNS]
        for name in ("samples", "held-out")
        for images in (compared[name].pixels, nearest[name].images)
    ]
    return memorisation.picture(np.concatenate(rows[::2]), np.concatenate(rows[1::2]))
