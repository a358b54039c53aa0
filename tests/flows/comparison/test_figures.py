"""Figures of runs side by side, and whether they differ."""

from typing import Any

import numpy as np
import pytest
from scipy import stats

from diffusion.pairs.pairs import Manifest
from flows.comparison import figures
from flows.comparison.figures import Value
from flows.comparison.page import Compared, differing, same_noise
from flows.pages.contents import Contents

INTERVAL = {"": 0.0, "_low": -0.01, "_high": 0.01}


def run(val_errors: Any = (), pairs: str = "a", shards: str = "s", quality: Any = (), **values: float) -> Contents:
    found: dict[str, Any] = {
        f"{name}{end}": value + add for name, value in values.items() for end, add in INTERVAL.items()
    }
    tables: dict[str, Any] = {"quality": list(quality)}
    if len(val_errors):
        tables["val_errors"] = [{"image": image, "mse": mse} for image, mse in enumerate(val_errors)]
        mean = float(np.mean(val_errors))
        found |= {"val_mse": mean, "val_mse_low": mean - 0.2, "val_mse_high": mean + 0.2}
    manifest = Manifest(
        channels=1, height=8, width=8, seed=0, schedule="cosine", num_timesteps=10, draws=1, heldout_draws=1,
        classes=(), shards_sha256=shards, splits={}, alpha_bar=(),
    )  # fmt: skip
    digests = {"pairs_sha256": pairs, "val_pairs_sha256": pairs}
    return Contents(found | digests, tables, {}, {}, False, {}, {}, manifest, {})


def test_errors_on_the_same_pairs_are_compared_image_by_image() -> None:
    rng = np.random.default_rng(3)
    images = rng.uniform(0.1, 0.9, 400)  # images differ much more than the models do
    old, new = images + rng.normal(0, 0.01, 400), images + rng.normal(-0.004, 0.01, 400)
    (figure,) = figures.compare([run(old), run(new)])
    (difference,) = figure.differences
    assert difference is not None
    assert (figure.title, difference.word, difference.paired) == ("MSE on val", "better", True)
    assert difference.value == pytest.approx(new.mean() - old.mean())
    normal = stats.norm.interval(0.95, loc=(new - old).mean(), scale=stats.sem(new - old))
    assert (difference.low, difference.high) == pytest.approx(normal, abs=1e-6)
    (back,) = figures.compare([run(new), run(old)])[0].differences
    assert back is not None
    assert (back.word, back.value) == ("worse", -difference.value)


def test_the_paired_interval_holds_the_true_difference_in_95_of_100_cases() -> None:
    rng = np.random.default_rng(5)
    held = 0
    for _ in range(1000):
        images = rng.uniform(0, 1, 100)
        _, low, high = figures.paired(images + rng.normal(0.02, 0.1, 100), images)
        held += low <= 0.02 <= high
    assert held == pytest.approx(950, abs=25)


def test_bits_per_dim_are_compared_image_by_image_if_both_runs_have_them() -> None:
    old, new = run(bits_per_dim=3.0), run(bits_per_dim=2.995)
    (figure,) = figures.compare([old, new])
    assert figure.differences[0] is not None
    assert (figure.differences[0].word, figure.differences[0].paired) == ("not told apart", False)
    for each, by_image in ((old, [2.0, 3.0, 4.0]), (new, [1.995, 2.995, 3.995])):
        each.tables["bits_per_dim"] = [{"image": i, "bits_per_dim": bits} for i, bits in enumerate(by_image)]
    (figure,) = figures.compare([old, new])
    assert figure.differences[0] is not None
    assert (figure.differences[0].word, figure.differences[0].paired) == ("better", True)
    old.figures["bits_per_dim_values"], new.figures["bits_per_dim_values"] = 256, 17
    (figure,) = figures.compare([old, new])
    assert figure.differences[0] is not None
    assert figure.differences[0].word == "other data"


def test_one_image_tells_no_difference() -> None:
    (figure,) = figures.compare([run([0.5]), run([0.1])])
    assert figure.differences[0] is not None
    assert figure.differences[0].word == "not told apart"


def test_errors_on_other_pairs_are_not_compared() -> None:
    (figure,) = figures.compare([run([0.5, 0.6], pairs="a"), run([0.1, 0.2], pairs="b")])
    (difference,) = figure.differences
    assert difference is not None
    assert (difference.word, difference.paired) == ("other data", False)


def test_other_figures_are_compared_by_their_intervals() -> None:
    difference, low, high = figures.independent(Value(1.0, 0.7, 1.3), Value(2.0, 1.6, 2.4))
    assert (difference, low, high) == pytest.approx((-1.0, -1.5, -0.5))  # sqrt(0.3² + 0.4²) = 0.5
    difference, low, high = figures.independent(Value(1.0, 0.7, 2.2), Value(0.0, -0.5, 0.4))
    assert (difference, low, high) == pytest.approx((1.0, 0.5, 2.3))  # sqrt(0.3² + 0.4²), sqrt(1.2² + 0.5²)


@pytest.mark.parametrize(
    ("name", "new", "word"),
    [
        ("mse", 0.48, "better"),
        ("mse", 0.49, "not told apart"),
        ("mse", 0.5, "equal"),
        ("mse", float("nan"), "not told apart"),
        ("mse", 0.52, "worse"),
        ("r2", 0.52, "better"),
        ("r2", 0.48, "worse"),
        ("bits_per_dim", 0.48, "better"),
    ],
)
def test_what_is_better(name: str, new: float, word: str) -> None:
    (figure,) = figures.compare([run(**{name: 0.5}), run(**{name: new})])
    assert figure.differences[0] is not None
    assert figure.differences[0].word == word


@pytest.mark.parametrize(
    ("metric", "word"),
    [
        ("frechet_distance", "worse"),
        ("kid", "worse"),
        ("near_copies", "worse"),
        ("recall", "better"),
        ("new", "higher"),
    ],
)
def test_the_quality_of_samples(metric: str, word: str) -> None:
    def row(value: float, which: str = "samples", features: str = "own") -> dict[str, Any]:
        return {
            "metric": metric,
            "features": features,
            "set": which,
            "value": value,
            "low": value - 1,
            "high": value + 1,
        }

    (figure,) = figures.compare([run(quality=[row(1.0), row(99.0, "noise")]), run(quality=[row(5.0)])])
    assert figure.values == [Value(1, 0, 2), Value(5, 4, 6)]
    assert figure.differences[0] is not None
    assert figure.differences[0].word == word
    fewer = run(quality=[row(5.0)])
    fewer.figures["quality_images"] = 20
    for other in (run(quality=[row(5.0)], shards="t"), fewer):
        difference = figures.compare([run(quality=[row(1.0)]), other])[0].differences[0]
        assert difference is not None
        assert difference.word == "other data"
    apart = figures.compare([run(quality=[row(1.0)]), run(quality=[row(5.0, features="theirs")])])
    assert [figure.values for figure in apart] == [[Value(1, 0, 2), None], [None, Value(5, 4, 6)]]
    assert all(figure.differences == [None] for figure in apart)


def test_parameters_that_differ() -> None:
    one, two = {"a": 1, "b": [1, 2], "c": 0.5}, {"a": 1, "b": [1], "d": "x"}
    assert differing([one, two]) == [("b", ["[1, 2]", "[1]"]), ("c", ["0.5", "–"]), ("d", ["–", "x"])]
    assert differing([one, one]) == []


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({}, "Pictures at the same place in the grids start from the same noise (seed 0)."),
        ({"seed": 1}, "The pictures do not start from the same noise: seed 0, 1."),
        ({"sample.count": 9}, "Pictures of the same number, counted from the top left, start from the same noise"),
        ({"sample.steps": 9}, "start from the same noise (seed 0). The runs differ in how they sample."),
    ],
)
def test_whether_samples_start_from_the_same_noise(changes: dict[str, Any], words: str) -> None:
    parameters = {"seed": 0, "sample.count": 4, "sample.steps": 3}
    runs = [Compared("a", parameters, run()), Compared("b", parameters | changes, run())]
    assert words in same_noise(runs)
