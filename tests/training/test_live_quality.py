"""The figures of quality at previews, which change no output."""

import re
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusion.evaluation import distances, quality, sets
from diffusion.evaluation.features import trained_features
from diffusion.evaluation.live import LiveQuality
from diffusion.model import Model
from diffusion.pairs.pairs import Pairs
from diffusion.training.hooks import preview_options
from flows.stages.training import PREVIEW_QUALITY
from tests.training import trees

CPU = torch.device("cpu")
LINE = re.compile(
    r"train: step (\d+): held-out MSE [\d.]+ ± [\d.]+, KID (-?[\d.]+) ± [\d.]+, Fréchet distance ([\d.]+) ± [\d.]+"
)


@pytest.fixture
def compared(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setenv(PREVIEW_QUALITY, "32")
        yield


def outputs(tree: Path) -> dict[str, str]:
    digests = trees.digests(tree, "models/ddpm", "reports/train_curves", "reports/previews")
    return digests | {"train.json": (tree / "reports/train.json").read_text()}


@pytest.mark.slow
@pytest.mark.usefixtures("compared")
def test_the_outputs_are_the_same_bytes_also_after_a_resumption(
    pairs_tree: Path, whole_tree: Path, tmp_path: Path
) -> None:
    tree = trees.copy(pairs_tree, tmp_path / "tree")
    before = LINE.findall(trees.stopped(tree, steps=23).stderr)
    done = trees.run(tree)
    assert done.returncode == 0, done.stderr
    assert "resuming from step 23" in done.stderr
    assert [step for step, *_ in before + LINE.findall(done.stderr)] == ["20", "40"]
    assert "training features" not in done.stderr  # kept
    assert outputs(tree) == outputs(whole_tree)
    ((_, kid, frechet),) = LINE.findall(done.stderr)
    model, train = Model.load(tree / "models/ddpm"), Pairs(tree / "data/pairs", "train")
    real, features = sets.chosen([train], 32), trained_features(train, tree / ".ddpm/features")
    drawn = sets.samples(model, preview_options(model.config.process), 0, CPU, real.labels)
    x, y = features(drawn.pixels), features(real.pixels)
    assert float(kid) == pytest.approx(distances.kid(x, y)[0], abs=6e-5)
    assert float(frechet) == pytest.approx(distances.frechet(x, y)[0], abs=6e-4)


def test_the_standard_errors_are_those_of_evaluate(whole_tree: Path) -> None:
    train, options = Pairs(whole_tree / "data/pairs", "train"), preview_options
    live = LiveQuality.prepare(40, train, whole_tree / ".ddpm/features", "train")
    model = Model.load(whole_tree / "models/ddpm")
    found = live(model, options(model.config.process), 0, CPU, lambda: None)
    x = live.features(sets.samples(model, options(model.config.process), 0, CPU, live.labels).pixels)
    value, low, _ = quality._spread(distances.kid(x, live.real, live.counts), 40)
    assert (found.kid, found.kid_se) == (pytest.approx(value), pytest.approx((value - low) / 1.96))
    assert found.frechet_distance_se > 0
    assert live.counts.sum(axis=1).tolist() == [40] + [32] * 50
    assert len(np.unique(live.counts, axis=0)) == 51


def test_at_most_all_training_images_are_compared(whole_tree: Path) -> None:
    train = Pairs(whole_tree / "data/pairs", "train")
    assert len(LiveQuality.prepare(100_000, train, whole_tree / ".ddpm/features", "train").real) == train.images
