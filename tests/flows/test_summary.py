"""A run's summary and report."""

import base64
import io
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import UserError
from diffusion.samples import grid_png
from diffusion.sources.duplicates import Between
from diffusion.sources.rejections import Remark
from diffusion.sources.shards import MANIFEST, Contents, Manifest
from diffusion.storage.files import write_json, write_sums
from diffusion.storage.tar import SPLITS, Split
from flows import report, summary, workspace
from flows.gate import Row
from flows.paths import Paths
from flows.summary import StageSummary, Summary

STAGES = [StageSummary("shard", 0.5, "cached"), StageSummary("train", 42.0, "run")]
METRICS = {"images": 190, "mse": 0.25, "mse_low": 0.2, "mse_high": 0.3, "r2": 0.75} | {
    "bits_per_dim": 4.5,
    "bits_per_dim_se": 0.05,
    "bits_per_dim_low": 4.402,
    "bits_per_dim_high": 4.598,
}


def finished(run: str, metrics: dict[str, float]) -> Summary:
    addresses = ("http://p/run", "http://m/run")
    return Summary(run, STAGES, metrics, "/somewhere/sampler.onnx", *addresses, quality="still learning")


@pytest.fixture
def done(repository: Path) -> Path:
    """The workspace of a run that is finished."""
    assert Path.cwd() == repository
    with workspace.use("one", "id", workspace.document(None, {})) as directory:
        summary.write(directory, finished("one", METRICS))
    return directory


@pytest.mark.usefixtures("repository")
def test_a_run_without_server_and_tracking_has_no_addresses(capsys: pytest.CaptureFixture[str]) -> None:
    with workspace.use("one", "id", workspace.document(None, {})) as directory:
        summary.write(directory, replace(finished("one", METRICS), prefect="", mlflow=""))
    summary.show("one")
    output = capsys.readouterr().out
    assert "Prefect" not in output
    assert "not recorded; run `ddpm track one`" in output
    assert "http" not in output


def test_the_verdict_on_samples_is_no_metric(tmp_path: Path) -> None:
    write_json(Paths(tmp_path).evaluate_report, {"mse": 0.25, "quality": "good"})
    workspace.Run("one", "id", "2026-01-01T00:00:00+00:00", "", False, "running").write(tmp_path)
    found = summary.collect(tmp_path, "", [], None)
    assert (found.metrics, found.quality) == ({"mse": 0.25}, "good")


def test_it_is_read_as_it_was_written(done: Path) -> None:
    assert summary.read(done) == finished("one", METRICS)


@pytest.mark.usefixtures("done")
def test_the_table_of_the_last_run(capsys: pytest.CaptureFixture[str]) -> None:
    summary.show(None)
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    for row in (
        ["run", "one"],
        ["train", "42.0", "s", "run"],
        ["held-out", "MSE", "0.2500"],
        ["R²", "0.7500"],
        ["bits/dim", "4.5000"],
        ["samples", "still", "learning"],
        ["Prefect", "http://p/run"],
        ["MLflow", "http://m/run"],
    ):
        assert row in rows


@pytest.mark.parametrize(
    ("low", "high", "words"),
    [(0.4, 0.6, "better than"), (-0.6, -0.4, "worse than"), (-0.1, 0.1, "no different, within its noise, from")],
)
def test_bits_per_dim_stand_beside_the_best_baseline(
    done: Path, capsys: pytest.CaptureFixture[str], low: float, high: float, words: str
) -> None:
    baselines = {"uniform": 8.0, "histogram": 6.0, "pixel_histogram": 5.0, "gain_low": low, "gain_high": high}
    figures = METRICS | {f"bits_per_dim_{name}": value for name, value in baselines.items()}
    summary.write(done, finished("one", figures))
    summary.show("one")
    assert f"  bits/dim      4.5000   {words} the histogram of each pixel (5.0000)\n" in capsys.readouterr().out


def test_a_damaged_summary_is_named(done: Path) -> None:
    summary.write(done, replace(finished("one", METRICS), gate=[{"figure": "val MSE", "rules": "better"}]))
    with pytest.raises(UserError, match=r"summary\.json: damaged; the run's results are in "):
        summary.show("one")


@pytest.mark.usefixtures("repository")
def test_a_run_that_is_not_finished_has_none() -> None:
    with pytest.raises(UserError, match="no run has finished yet"):
        summary.show(None)
    with pytest.raises(RuntimeError), workspace.use("bad", "id", workspace.document(None, {})):
        raise RuntimeError
    with pytest.raises(UserError, match=r"run 'bad' has no summary: its state is failed"):
        summary.show("bad")
    dead = workspace.find("bad")
    replace(workspace.Run.read(dead), state="running").write(dead)
    with pytest.raises(UserError, match=r"run 'bad' has no summary: its state is crashed"):
        summary.show("bad")


def write_manifest(directory: Path) -> None:
    splits: dict[Split, Contents] = {
        split: Contents(samples=samples, per_class=(), shards=())
        for split, samples in zip(SPLITS, (8, 1, 1), strict=True)
    }
    rejected = tuple(Remark(file="a", reason=reason) for reason in ("HEIC", "damaged", "damaged"))
    manifest = Manifest(
        source="data/raw/a", classes=(), splits=splits, statistics={}, smallest=(1, 1), largest=(1, 1), own_splits={},
        rejected=rejected, warnings=(), copies=0, multipage=0,
        near_duplicates=(Between(first="train", second="test", images=3, pairs=()),),
    )  # fmt: skip
    write_json(directory / MANIFEST, manifest.model_dump())
    write_sums(directory)


def test_the_report_compares_with_the_last_run_and_shows_the_samples(tmp_path: Path) -> None:
    evaluation = tmp_path / "reports" / "evaluation"
    evaluation.mkdir(parents=True)
    (evaluation / "bands.csv").write_text("t_from,t_to,mse,mse_low,mse_high,r2,wiener_mse\n0,99,0.5,0.4,0.6,0.5,0.7\n")
    Image.new("L", (8, 8)).save(evaluation / "samples.png")
    exported = {"denoiser": {"mse": 0.25}, "sampler": {"images": 64}, "int8": {"mse": 0.255, "loss": 0.02}}
    sizes = {"denoiser": 3_000_000, "sampler": 3_170_000, "sampler_int8": 1_000_000}
    write_json(tmp_path / "reports" / "export.json", exported | {"bytes": sizes})
    write_json(tmp_path / "reports" / "train.json", {"augment": 0.12})
    write_manifest(tmp_path / "data" / "shards")
    text = report.markdown(tmp_path, finished("two", METRICS), finished("one", METRICS | {"mse": 0.3}))
    assert "- 8 train, 1 val, 1 test images\n- rejected: 2, damaged\n- rejected: 1, HEIC\n- near-duplicates: " in text
    assert "- near-duplicates: 3 of test resemble one of train\n- augmented in training with probability 0.12\n" in text
    assert "\n- all of this with pictures: `" in text
    assert "| held-out MSE | 0.2500 | 0.2000 to 0.3000 | 0.3000 | -0.05 |" in text
    assert "| test images | 190 |  | 190 | +0 |" in text
    assert "| bits/dim (bound) | 4.5000 | 4.4020 to 4.5980 | 4.5000 | +0 |" in text
    assert "bits_per_dim_" not in text
    assert "previous run (one)" in text
    assert "| 0 to 99 | 0.5000 | 0.4000 to 0.6000 | 0.5000 | 0.7000 |" in text
    assert "| sampler.onnx | 3.17 | 0.2500 |  |\n| sampler_int8.onnx | 1.00 | 0.2550 | +2.00% |" in text
    assert "![samples](data:image/png;base64,iVBOR" in text
    assert "[Open in MLflow](http://m/run)" in text
    assert "Promotion" not in text
    assert "Likelihood" not in text  # of an older evaluation
    gain = {"uniform": 8.0, "histogram": 6.0, "pixel_histogram": 5.0, "gain": 0.5, "gain_low": 0.4, "gain_high": 0.6}
    beside = METRICS | {f"bits_per_dim_{name}": value for name, value in gain.items()}
    better = report.markdown(tmp_path, finished("two", beside), None)
    assert "Likelihood: **better than the histogram of each pixel (5.0000)**." in better
    rule = Row(
        "val MSE", "significantly lower", 0.0, 0.25, 0.3, -0.05, -0.1, -0.01, "not met", "the difference is small"
    )
    judged = report.markdown(tmp_path, replace(finished("two", METRICS), gate=[rule._asdict()]), None)
    assert "## Promotion\n\nNot promoted: the difference is small.\n\n" in judged
    assert "| val MSE | significantly lower | 0.2500 | 0.3000 | not met |" in judged
    write_json(tmp_path / "reports" / "train.json", {"augment": 0.0})
    alone = report.markdown(tmp_path, replace(finished("two", METRICS | {"new_figure": 0.5}), mlflow=""), None)
    assert (
        "| metric | value | 95 % interval |\n| --- | --- | --- |\n| held-out MSE | 0.2500 | 0.2000 to 0.3000 |" in alone
    )
    assert "| new_figure | 0.5000 |" in alone
    assert "`ddpm track two`" in alone
    assert "\n- not augmented in training\n" in alone


def test_a_picture_of_noise_is_shrunk_until_prefect_can_keep_it(tmp_path: Path) -> None:
    """A grid of 64 colour images of 64x64 pixels, the worst that can be compressed: over the limit even as a JPEG."""
    noise = np.random.default_rng(0).integers(0, 256, (64, 3, 64, 64), dtype=np.uint8)
    png = grid_png(noise)
    assert len(png) > report.LARGEST_PICTURE
    (tmp_path / "samples.png").write_bytes(png)
    shown_as = report._picture(tmp_path / "samples.png")
    kind, encoded = re.findall(r"^!\[samples\]\(data:image/(\w+);base64,(.*)\)$", shown_as)[0]
    shown = base64.b64decode(encoded)
    assert len(shown) <= report.LARGEST_PICTURE
    with Image.open(io.BytesIO(shown)) as image, Image.open(io.BytesIO(png)) as whole:
        assert (kind, image.format, image.mode) == ("jpeg", "JPEG", "RGB")
        assert image.width >= whole.width // 2
