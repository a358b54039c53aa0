"""evaluate compares samples with real images; with a tiny network."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from diffusion.evaluation import quality
from diffusion.evaluation.quality import SETS
from flows.pages import contents
from flows.yaml_files import read_yaml
from tests.conftest import run_stages
from tests.evaluation.test_features import pooling
from tests.training import trees

TRAINED = "features of a classifier trained on this data"


def table(tree: Path) -> dict[tuple[str, str], list[str]]:
    """The rows of quality.csv by metric and set: features, value, low, high, n."""
    lines = (tree / "reports/evaluation/quality.csv").read_text(encoding="utf-8").splitlines()
    assert lines[0] == "metric,features,set,value,low,high,n"
    cells = [line.split(",") for line in lines[1:]]
    return {(metric, which): [features, *rest] for metric, features, which, *rest in cells}


def test_evaluate_compares_samples_with_real_images(whole_tree: Path) -> None:
    found = table(whole_tree)
    report = json.loads((whole_tree / "reports/evaluate.json").read_text())
    for metric in ("frechet_distance", "kid", "precision", "recall", "density", "coverage"):
        for which in SETS:
            features, *_, n = found[metric, which]
            assert (features, n) == (TRAINED, "40")
        for column, suffix in enumerate(("", "_low", "_high"), start=1):
            assert report[metric + suffix] == float(found[metric, "samples"][column])
    assert found["near_copies", "samples"][0] == "pixels"
    assert report["quality"] == "still learning"  # after 40 steps
    assert report["kid_se"] > 0
    assert float(found["class_agreement", "held-out"][1]) > 0.8
    assert ("class_agreement", "samples") not in found  # without classes in the network
    assert report["quality_images"] == 40
    assert (whole_tree / "reports/evaluation/nearest.png").stat().st_size > 1000
    assert len(list((whole_tree / ".ddpm/features").glob("*.safetensors"))) == 1


def test_evaluate_writes_the_same_bytes_again(whole_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(whole_tree, tmp_path / "tree")
    shutil.rmtree(tree / ".ddpm/features")
    done = trees.run(tree, "evaluate")
    assert done.returncode == 0, done.stderr
    assert "evaluate: samples: still learning; worse than held-out images (Fréchet distance " in done.stderr
    assert "training features" in done.stderr
    assert trees.digests(tree, "reports") == trees.digests(whole_tree, "reports")
    assert trees.digests(tree, ".ddpm/features") == trees.digests(whole_tree, ".ddpm/features")


def test_images_without_classes(digits_tree: Path) -> None:
    with np.load(digits_tree / "data/raw/digits.npz") as arrays:
        np.savez(digits_tree / "data/raw/plain.npz", images=arrays["images"][:400])
    trees.change(digits_tree, trees.TINY)
    trees.change(digits_tree, {"shard": {"source": "data/raw/plain.npz"}, "train": {"steps": 2, "preview_every": 2}})
    run_stages(digits_tree, "shard", "pairs", "train", "evaluate")
    found = table(digits_tree)
    assert found["frechet_distance", "samples"][0] == "features of a network trained on this data's rotations"
    assert not [metric for metric, _ in found if metric == "class_agreement"]


def test_features_of_a_file(whole_tree: Path, tmp_path: Path) -> None:
    tree = trees.copy(whole_tree, tmp_path / "tree")
    digest = pooling(tree / "pool.onnx", ("N", 1, 8, "W"), outputs=3)
    trees.change(tree, {"evaluate": {"features": "pool.onnx"}})
    for changes, message in (
        ({}, f"pool.onnx has the SHA-256 {digest}, not an empty one"),
        ({"features_sha256": digest}, "pool.onnx: its first output must be (N, D), here N = 32 (got (32, 1, 8))"),
        ({"features": "missing.onnx"}, "evaluate.features: missing.onnx: no such file here"),
    ):
        before = trees.digests(tree, "reports")
        trees.change(tree, {"evaluate": changes})
        done = trees.run(tree, "evaluate")
        assert done.returncode == 1
        assert message in done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr
        assert trees.digests(tree, "reports") == before
    digest = pooling(tree / "pool.onnx", ("N", 3, 20, 20))
    trees.change(tree, {"evaluate": {"features": str(tree / "pool.onnx"), "features_sha256": digest}})
    run_stages(tree, "evaluate")
    assert table(tree)["kid", "samples"][0] == "features of pool.onnx"


def test_nothing_is_compared_if_no_samples_are_wanted(
    whole_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "MIN_IMAGES", 41)
    tree = trees.copy(whole_tree, tmp_path / "tree")
    trees.change(tree, {"evaluate": {"quality_samples": 0}})
    done = trees.run(tree, "evaluate")
    assert done.returncode == 0, done.stderr
    assert "samples are not compared with real images" not in done.stderr
    assert_not_compared(tree)


def assert_not_compared(tree: Path) -> None:
    assert "frechet_distance" not in json.loads((tree / "reports/evaluate.json").read_text())
    assert not (tree / "reports/evaluation/quality.csv").exists()


SETTINGS = [
    {"steps": 4},  # that of `sample`
    {"sampler": {"kind": "ddim", "eta": 1.0}, "steps": 3, "spacing": "linspace"},
    {"sampler": "heun"},
]


def test_other_samplers_are_compared(whole_tree: Path, tmp_path: Path) -> None:
    tree, alone = (trees.copy(whole_tree, tmp_path / name) for name in ("tree", "alone"))
    trees.change(tree, {"evaluate": {"samplers": SETTINGS}})
    trees.change(alone, {"sample": SETTINGS[1]})
    done = trees.run(tree, "evaluate")
    assert done.returncode == 0, done.stderr
    assert "evaluate: 15/15 steps" in done.stderr
    assert "drawing 40 samples to compare with real images, in each of 4 settings" in done.stderr
    first, same, second, third = contents.table(tree / "reports/evaluation/samplers.csv")
    assert first == same
    assert (first["sampler"], first["spacing"], first["steps"], first["evaluations"]) == (
        "dpm-solver++-sde", "log-snr", 4, 4,
    )  # fmt: skip
    assert (second["sampler"], second["spacing"], second["steps"], second["n"]) == ("ddim (eta 1)", "linspace", 3, 40)
    assert (third["sampler"], third["steps"]) == ("heun", 4)
    assert 4 < third["evaluations"] < 8
    run_stages(alone, "evaluate")
    for row, measured in ((first, table(whole_tree)), (second, table(alone))):
        assert row["features"] == TRAINED
        for metric in ("frechet_distance", "kid", "precision", "recall", "density", "coverage"):
            _, value, low, high, _ = measured[metric, "samples"]
            assert [row[metric + end] for end in ("", "_low", "_high")] == [float(value), float(low), float(high)]
    assert table(tree) == table(whole_tree)  # the figures of the samples stay as they are
    assert (tree / "reports/evaluate.json").read_bytes() == (whole_tree / "reports/evaluate.json").read_bytes()
    page = (tree / "reports/report.html").read_text()
    for text in ("<h2>Samplers</h2>", "ddim (eta 1), linspace", "heun, log-snr", ">sampling steps</text>"):
        assert text in page
    assert "<h2>Samplers</h2>" not in (alone / "reports/report.html").read_text()


def test_samples_and_samplers_need_images_to_be_compared_with(
    whole_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quality, "MIN_IMAGES", 41)
    tree = trees.copy(whole_tree, tmp_path / "tree")
    trees.change(tree, {"evaluate": {"samplers": SETTINGS[:1]}})
    done = trees.run(tree, "evaluate")
    assert done.returncode == 0, done.stderr
    (line,) = [line for line in done.stderr.splitlines() if "not compared" in line]
    assert "samples are not compared with real images, which takes 41 held-out images" in line
    assert line.endswith("twice as many for training; so evaluate.samplers cannot be compared either")
    assert_not_compared(tree)
    assert not (tree / "reports/evaluation/samplers.csv").exists()


def test_the_features_rerun_evaluate(root: Path) -> None:
    assert "evaluate" in read_yaml(root / "dvc.yaml")["stages"]["evaluate"]["params"]  # with features_sha256
