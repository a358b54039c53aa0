"""The comparison of samples with real images: sets, figures, intervals and verdict."""

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffusion.errors import UserError
from diffusion.evaluation import distances, memorisation, quality, sets
from diffusion.evaluation.quality import PIXELS, Figure, Quality, References
from diffusion.evaluation.sets import Images, chosen
from diffusion.model import Model
from diffusion.nn.unet import UNetOptions
from diffusion.pairs.pairs import Pairs
from diffusion.samples import draw_samples
from diffusion.sampling.build import SampleOptions

N = 100
Splits = tuple[Pairs, list[Pairs]]


class Pixels:
    """Every second pixel as a feature."""

    description = "every second pixel"

    def __call__(self, images: NDArray[np.uint8]) -> NDArray[np.float64]:
        return images[..., ::2, ::2].reshape(len(images), -1) / 64


@pytest.fixture
def splits(pairs_tree: Path) -> Splits:
    directory = pairs_tree / "data/pairs"
    return Pairs(directory, "train"), [Pairs(directory, "val"), Pairs(directory, "test")]


@pytest.fixture
def real(splits: Splits) -> References:
    return quality.references(N, *splits)


def rows(images: NDArray[np.uint8]) -> set[bytes]:
    return {image.tobytes() for image in images}


def test_the_sets_of_real_images(splits: Splits, real: References) -> None:
    train, held_out = splits
    assert real.n == N
    assert len(rows(real.pool.pixels)) == len(real.pool.pixels) == train.images  # all, since there are few
    assert rows(real.held_out.pixels) <= {
        row for pairs in held_out for b in range(pairs.blocks) for row in rows(pairs.x_0(b))
    }
    assert not rows(real.held_out.pixels) & rows(real.pool.pixels)
    assert quality.references(10_000, *splits).n == held_out[0].images + held_out[1].images
    labels = {
        image.tobytes(): label
        for b in range(train.blocks)
        for image, label in zip(train.x_0(b), train.labels(b), strict=True)
    }
    assert [labels[image.tobytes()] for image in real.pool.pixels] == real.pool.labels.tolist()


def test_a_choice_does_not_depend_on_the_order(splits: Splits, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = splits[1][1]
    before = chosen([pairs], 50)
    x_0 = Pairs.x_0
    monkeypatch.setattr(Pairs, "x_0", lambda self, block: x_0(self, block)[::-1])
    np.testing.assert_array_equal(chosen([pairs], 50).pixels, before.pixels)
    np.testing.assert_array_equal(chosen([pairs], 20).pixels, before.pixels[:20])
    monkeypatch.undo()
    np.testing.assert_array_equal(chosen(splits[1], 10_000).pixels, chosen(splits[1][::-1], 10_000).pixels)


def test_noise_has_the_values_of_the_images_at_random_places() -> None:
    pixels = np.zeros((4, 1, 10, 10), np.uint8)
    pixels[:, :, :3] = 200  # 30 % of the pixels, all at the top
    found = sets.noise(Images(pixels, np.zeros(4, np.int64)), 50, np.random.default_rng(0))
    assert found.pixels.shape == (50, 1, 10, 10)
    assert set(np.unique(found.pixels)) == {0, 200}
    for half in (found.pixels[:, :, :5], found.pixels[:, :, 5:]):
        assert (half == 200).mean() == pytest.approx(0.3, abs=0.04)


def test_samples_are_those_of_the_seed_in_any_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sets, "BATCH", 3)
    net = UNetOptions(base_channels=8, channel_multipliers=(1,), attention_levels=(), classes=True)
    model = Model.new((1, 8, 8), net, classes=("a", "b"))
    for parameter in model.net.parameters():  # some begin with zero
        torch.nn.init.normal_(parameter, std=0.1)
    options, labels, steps = SampleOptions(steps=2, variance="fixed-small"), np.array([1, 0, -1, 1, 1]), []
    cpu = torch.device("cpu")
    found = sets.samples(model, options, 3, cpu, labels, lambda: steps.append(1))
    assert len(steps) == 2 * sets.batches(5) == 4
    np.testing.assert_array_equal(found.labels, labels)
    whole = options.model_copy(update={"count": 5})
    at_once = draw_samples(model, whole, 3, cpu, y=torch.from_numpy(labels))
    assert np.abs(found.pixels.astype(int) - at_once).max() <= 1  # convolutions round by batch size
    assert (draw_samples(model, whole, 3, cpu)[1] != at_once[1]).any()  # of class 1


def test_the_figures_of_every_set(real: References) -> None:
    found = quality.measure(real, real.held_out, Pixels(), 100)
    features = {"frechet_distance", "kid", "precision", "recall", "density", "coverage"}
    expected = {(metric, which) for metric in (*features, "nearest_distance", "near_copies") for which in quality.SETS}
    assert {(figure.metric, figure.set) for figure in found.figures} == expected
    assert len(found.figures) == len(expected)
    for figure in found.figures:
        assert figure.low <= figure.value <= figure.high
        assert figure.n == N
        assert figure.features == ("every second pixel" if figure.metric in features else PIXELS)
    assert found["frechet_distance"].label == "Fréchet distance (every second pixel)"
    for metric in features:  # the samples are the held-out images
        assert found[metric] == found[metric, "held-out"]._replace(set="samples")
    x, y = (Pixels()(images) for images in (real.held_out.pixels, real.pool.pixels[N:]))
    assert found["frechet_distance"].value == pytest.approx(distances.frechet(x, y)[0])
    assert found["recall"].value == pytest.approx(distances.neighbours(x, y).recall[0])
    assert found["frechet_distance", "noise"].low > 5 * found["frechet_distance", "held-out"].high
    assert found.reference_images == len(real.pool.labels) - N
    nearest = memorisation.nearest(real.held_out.pixels, real.train)
    assert found["near_copies"].value == (nearest.distance <= nearest.second / 3).mean()
    assert found["nearest_distance"].value == pytest.approx(nearest.distance.mean())
    assert quality.measure(real, real.held_out, Pixels(), 100) == found


def test_features_that_tell_nothing_apart_are_refused(real: References, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Pixels, "__call__", lambda _, images: np.ones((len(images), 4)))
    with pytest.raises(UserError, match=r"^evaluate\.features: .* are the same for all training images; use another"):
        quality.measure(real, real.held_out, Pixels(), 100)


def test_further_samples_have_the_figures_they_would_have_alone(real: References) -> None:
    noise = sets.noise(real.others, N, np.random.default_rng(0))
    both = quality.measure(real, real.held_out, Pixels(), 100, others=[noise, real.held_out])
    alone = quality.measure(real, noise, Pixels(), 100)
    assert both.figures == quality.measure(real, real.held_out, Pixels(), 100).figures
    assert [[figure[3:] for figure in figures] for figures in both.others] == [
        [figure[3:] for figure in measured.of_samples] for measured in (alone, both)
    ]
    assert [figure.metric for figure in both.others[0]] == list(quality.COMPARED)


def test_training_images_against_others_are_drawn_anew_each_time(real: References) -> None:
    figure = quality.measure(real, real.held_out, Pixels(), 100)["frechet_distance", "train"]
    generator = np.random.default_rng(0)
    x = Pixels()(real.pool.pixels)
    drawn = [
        distances.frechet(x[order[:N]], x[order[N:]])[0] for order in (generator.permutation(len(x)) for _ in range(50))
    ]
    assert figure.value == pytest.approx(np.mean(drawn), abs=3 * np.std(drawn) / np.sqrt(quality.DRAWS))
    assert figure.high - figure.low == pytest.approx(3.1 * np.std(drawn), rel=0.6)  # of 10 draws, 3.1 on average


def test_unseen_images_are_good_noise_is_not_and_training_images_are_copies(splits: Splits, real: References) -> None:
    unseen = chosen(splits[1], 2 * N).part(slice(N, 2 * N))
    word, reason = quality.measure(real, unseen, Pixels(), 200).verdict
    assert (word, reason.split(" (")[0]) == ("good", "not told apart from held-out images")
    noise = sets.noise(real.pool, N, np.random.default_rng(0))
    word, reason = quality.measure(real, noise, Pixels(), 200).verdict
    assert word == "still learning"
    assert reason.startswith("worse than held-out images (Fréchet distance ")
    slightly = Images(real.pool.pixels[:N] // 2 * 2, real.pool.labels[:N])
    copied = quality.measure(real, slightly, Pixels(), 200)
    blurred = Images(np.repeat(real.pool.pixels.mean(axis=0, keepdims=True).astype(np.uint8), N, axis=0), unseen.labels)
    assert quality.measure(real, blurred, Pixels(), 200)["near_copies"].value == 0
    word, reason = copied.verdict
    assert word == "copying"
    assert reason == (
        "100% are near-copies of training images, as are 0% of the training images and 0% of the held-out ones"
    )
    assert copied.report["near_copies"] == 1
    assert copied.report["quality"] == "copying"


def test_few_near_copies_are_no_copying() -> None:
    """Their share must be above 5 %, and above that among the training and held-out images, beyond its interval."""

    def verdict(low: float, train_high: float, held_out_high: float = 0.0) -> str:
        alike = [Figure(metric, "f", which, 1.0, 0.9, 1.1, 9) for metric in quality.COMPARED for which in quality.SETS]
        shares = [
            Figure("near_copies", PIXELS, "samples", 0.5, low, 0.6, 9),
            Figure("near_copies", PIXELS, "train", 0.1, 0.0, train_high, 9),
            Figure("near_copies", PIXELS, "held-out", 0.1, 0.0, held_out_high, 9),
        ]
        return Quality([*alike, *shares], 9, b"").verdict[0]

    assert [verdict(0.06, 0.04), verdict(0.04, 0.01), verdict(0.3, 0.31)] == ["copying", "good", "good"]
    assert [verdict(0.3, 0.1, 0.29), verdict(0.3, 0.1, 0.31)] == ["copying", "good"]


def test_a_difference_counts_beyond_the_intervals() -> None:
    def verdict(metric: str, value: float) -> str:
        figures = [
            Figure(name, "f", which, 1.0, 0.804, 1.196, 9) for name in quality.COMPARED for which in quality.SETS
        ]
        figures += [Figure("near_copies", PIXELS, which, 0.0, 0.0, 0.0, 9) for which in quality.SETS]
        found = Quality(figures, 9, b"")
        ours = found[metric]
        moved = ours._replace(value=value, low=value - 0.196, high=value + 0.196)  # standard error 0.1
        return Quality([moved if figure == ours else figure for figure in figures], 9, b"").verdict[0]

    beyond = 2.58 * np.hypot(0.1, 0.1)
    for metric, sign in quality.COMPARED.items():
        assert verdict(metric, 1 + sign * 1.01 * beyond) == "still learning", metric
        assert verdict(metric, 1 + sign * 0.99 * beyond) == "good", metric
        assert verdict(metric, 1 - sign * 9 * beyond) == "good", metric


def test_the_interval_of_a_mean_is_that_of_its_standard_error(real: References) -> None:
    value, low, high = quality._mean(np.repeat([0.0, 1.0], [600, 400]), 2000, real)
    error = 1.96 * np.sqrt(0.4 * 0.6 / 1000)
    assert value == 0.4
    assert [low, high] == pytest.approx([0.4 - error, 0.4 + error], abs=0.004)


def test_random_subsets_show_the_spread_of_independent_sets() -> None:
    generator = np.random.default_rng(0)
    y = generator.standard_normal((500, 4))
    drawn = [generator.standard_normal((60, 4)) * 0.9 + 0.5 for _ in range(150)]
    kept = generator.permuted(np.tile(np.arange(60) < 48, (200, 1)), axis=1)
    counts = np.concatenate([np.ones((1, 60), bool), kept])

    def both(x: NDArray[np.float64], counts: NDArray[np.bool_] | None = None) -> dict[str, NDArray[np.float64]]:
        near = distances.neighbours(x, y, counts)
        found = {"frechet": distances.frechet(x, y, counts), "kid": distances.kid(x, y, counts)}
        return found | {"recall": near.recall, "coverage": near.coverage}

    of_sets, estimates = [both(x) for x in drawn], [both(x, counts) for x in drawn[:20]]
    for metric in of_sets[0]:
        spread = np.std([found[metric][0] for found in of_sets])
        errors = [(high - value) / 1.96 for value, _, high in (quality._spread(e[metric], 60) for e in estimates)]
        assert np.mean(errors) == pytest.approx(spread, rel=0.3), metric
    assert quality._spread(np.array([0.95, 0.7, 1.0]), 60, least=0.8, most=1.0)[1:] == (0.8, 1.0)


def test_the_nearest_training_image_is_not_the_image_itself(splits: Splits, real: References) -> None:
    images = real.pool.pixels[:20]
    copies = memorisation.nearest(images, splits[0])
    np.testing.assert_array_equal(copies.images, images)
    np.testing.assert_array_equal(copies.distance, 0)
    others = memorisation.nearest(images, splits[0], itself=True)
    flat = real.pool.pixels.reshape(len(real.pool.pixels), -1).astype(float)
    ordered = np.sort(np.sqrt(np.square(flat[:20, None] - flat).mean(axis=2)), axis=1)
    np.testing.assert_allclose(others.distance, ordered[:, 1], rtol=1e-5)
    np.testing.assert_allclose(copies.second, ordered[:, 1], rtol=1e-5)
