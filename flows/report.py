"""The markdown report of a run, for Prefect's UI."""

import base64
import csv
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

from diffusion.sources.shards import MANIFEST, Manifest
from flows import baselines, gate
from flows.paths import Paths
from flows.summary import Summary, number

LARGEST_PICTURE = 300_000
"""Bytes; Prefect keeps artifacts in its database."""
JPEG_QUALITIES = (90, 75)
TITLES = {
    "mse": "held-out MSE",
    "rmse": "held-out RMSE",
    "mae": "held-out MAE",
    "r2": "R²",
    "zero_mse": "MSE of predicting zero",
    "wiener_mse": "MSE of a linear denoiser",
    "val_mse": "validation MSE",
    "bits_per_dim": "bits/dim (bound)",
    "bits_per_dim_exact": "bits/dim (bound, all timesteps)",
    "bits_per_dim_uniform": "bits/dim of a uniform distribution over the values present",
    "bits_per_dim_histogram": "bits/dim of a histogram of all pixels",
    "bits_per_dim_pixel_histogram": "bits/dim of a histogram of each pixel",
    "bits_per_dim_gain": "bits/dim below the best of these",
    "frechet_distance": "Fréchet distance of samples",
    "frechet_distance_heldout": "Fréchet distance of held-out images",
    "kid": "kernel distance (KID) of samples",
    "precision": "precision of samples",
    "recall": "recall of samples",
    "density": "density of samples",
    "coverage": "coverage of samples",
    "class_agreement": "samples of the class asked for",
    "nearest_distance": "samples' distance to the nearest training image, in grey levels",
    "near_copies": "near-copies among samples",
    "drift": "drift from the teacher's samples, in grey levels",
    "teacher_frechet_distance_4": "Fréchet distance of the teacher in 4 DDIM steps",
    "teacher_frechet_distance_8": "Fréchet distance of the teacher in 8 DDIM steps",
    "teacher_mse": "held-out MSE of the teacher",
    "teacher_val_mse": "validation MSE of the teacher",
    "teacher_bits_per_dim": "bits/dim of the teacher (bound)",
    "bits_per_dim_prior": "bits/dim: prior term",
    "bits_per_dim_diffusion": "bits/dim: diffusion terms",
    "bits_per_dim_decoder": "bits/dim: decoder term",
    "sampling_steps": "steps of the student",
    "images": "test images",
    "pairs": "test pairs",
    "val_mse_images": "validation images",
    "quality_images": "samples compared",
    "quality_reference_images": "training images that samples are compared with",
    "bits_per_dim_values": "pixel values that occur",
    "bits_per_dim_images": "images for bits/dim",
    "bits_per_dim_exact_images": "images for bits/dim at all timesteps",
}
"""Of the metrics of an evaluation, in the order in which they are shown; counts come last."""


def markdown(directory: Path, summary: Summary, last: Summary | None) -> str:
    """The report of a finished run, with the previous run's metrics for comparison."""
    results = _of_student if summary.teacher else _of_training
    parts = [
        f"# {summary.run}",
        f"[Open in MLflow]({summary.mlflow})"
        if summary.mlflow
        else f"Not recorded in MLflow; run `ddpm track {summary.run}` to record it.",
        *results(directory, summary, last),
        "## Stages",
        _table(
            ["stage", "seconds", "outcome"],
            [[stage.stage, f"{stage.seconds:.1f}", stage.outcome] for stage in summary.stages],
        ),
        "## Files",
        f"- ONNX model: `{summary.onnx}`\n- workspace: `{directory}`",
    ]
    return "\n\n".join(parts)


def _of_training(directory: Path, summary: Summary, last: Summary | None) -> list[str]:
    return [
        *([f"Started from the weights of {summary.start}."] if summary.start else []),
        "## Held-out evaluation",
        _metrics(summary, last),
        *([f"Likelihood: **{baselines.verdict(summary.metrics)}**."] if "bits_per_dim_gain" in summary.metrics else []),
        *(["## Promotion", gate.sentence(summary.gate), _promotion(summary.gate)] if summary.gate else []),
        "## Samples",
        *([f"Compared with held-out images: **{summary.quality}**."] if summary.quality else []),
        _picture(Paths(directory).evaluation / "samples.png"),
        "## Error by timestep",
        _bands(Paths(directory).evaluation / "bands.csv"),
        "## ONNX models",
        _table(["file", "MB", "held-out MSE", "change from sampler.onnx"], precisions(Paths(directory).export_report)),
        "## Data",
        _data(Paths(directory)),
    ]


def _of_student(directory: Path, summary: Summary, last: Summary | None) -> list[str]:
    paths = Paths(directory, student=True)
    return [
        f"Distilled from the model of run `{summary.teacher}`, its teacher.",
        "## Evaluation",
        _metrics(summary, last),
        *(["## Promotion", gate.sentence(summary.gate), _promotion(summary.gate)] if summary.gate else []),
        "## Samples by number of steps",
        *([f"Compared with held-out images: **{summary.quality}**."] if summary.quality else []),
        _picture(paths.evaluation / "rows.png"),
        _by_steps(paths.evaluation / "few_steps.csv"),
        "## ONNX models",
        _table(["file", "MB"], [row[:2] for row in precisions(paths.export_report)]),
    ]


def _by_steps(file: Path) -> str:
    """Figures of teacher and student for each number of steps."""
    with file.open(newline="") as lines:
        rows = list(csv.DictReader(lines))
    shown = [name for name in ("frechet_distance", "recall", "drift") if name in rows[0]]
    return _table(
        ["model", "steps", *(TITLES[name] for name in shown)],
        [[row["model"], row["steps"], *(f"{float(row[name]):.4f}" for name in shown)] for row in rows],
    )


def _data(paths: Paths) -> str:
    """The images in each split, rejected files by reason, near-duplicates, and augmentation in training."""
    manifest = Manifest.read(paths.shards / MANIFEST)
    lines = [", ".join(f"{contents.samples} {split}" for split, contents in manifest.splits.items()) + " images"]
    lines += [f"rejected: {count}, {reason}" for reason, count in manifest.reasons]
    for each in manifest.near_duplicates or ():
        lines.append(f"near-duplicates: {each.images} of {each.second} resemble one of {each.first}")
    augment = json.loads(paths.train_report.read_text(encoding="utf-8"))["augment"]
    lines.append(f"augmented in training with probability {augment:g}" if augment else "not augmented in training")
    return "\n".join(f"- {line}" for line in [*lines, f"all of this with pictures: `{paths.data_report}`"])


def _promotion(rows: list[dict[str, Any]]) -> str:
    """The figures that the decision on the model compared."""
    shown = [
        [row["figure"], row["rule"], *map(_figure, (row["challenger"], row["champion"])), row["verdict"]]
        for row in rows
    ]
    return _table(["figure", "rule", "this model", "champion", "verdict"], shown)


def _figure(value: float | None) -> str:
    return "" if value is None else f"{value:.4f}"


def _metrics(summary: Summary, last: Summary | None) -> str:
    before = last.metrics if last else {}
    rows = []
    known = [name for name in TITLES if name in summary.metrics]
    for name in [*known, *(name for name in summary.metrics if name not in TITLES)]:
        value = summary.metrics[name]
        if name.endswith(("_low", "_high", "_se")):
            continue
        low, high = summary.metrics.get(f"{name}_low"), summary.metrics.get(f"{name}_high")
        interval = f"{low:.4f} to {high:.4f}" if low is not None and high is not None else ""
        row = [TITLES.get(name, name), number(value), interval]
        if last:
            old = before.get(name)
            row += [number(old), f"{value - old:+.4g}"] if old is not None else ["", ""]
        rows.append(row)
    compared = [f"previous run ({last.run})", "change"] if last else []
    return _table(["metric", "value", "95 % interval", *compared], rows)


def _bands(file: Path) -> str:
    with file.open(newline="") as lines:
        rows = [
            [
                f"{row['t_from']} to {row['t_to']}",
                f"{float(row['mse']):.4f}",
                f"{float(row['mse_low']):.4f} to {float(row['mse_high']):.4f}",
                f"{float(row['r2']):.4f}",
                f"{float(row['wiener_mse']):.4f}",
            ]
            for row in csv.DictReader(lines)
        ]
    return _table(["timesteps", "MSE", "95 % interval", "R²", "MSE of a linear denoiser"], rows)


def precisions(file: Path) -> list[list[str]]:
    """Name, MB, held-out MSE and its change of the sampler and its variants, from reports/export.json.

    Their speeds depend on the machine and are in MLflow.
    """
    report = json.loads(file.read_text(encoding="utf-8"))
    rows = [["sampler.onnx", _megabytes(report["bytes"]["sampler"]), f"{report['denoiser']['mse']:.4f}", ""]]
    for name, scores in report.items():
        if "loss" in scores:
            size = _megabytes(report["bytes"][f"sampler_{name}"])
            rows.append([f"sampler_{name}.onnx", size, f"{scores['mse']:.4f}", f"{scores['loss']:+.2%}"])
    return rows


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"


def _picture(file: Path) -> str:
    """The picture as a data URI: as it is if small enough, else as a JPEG, at half the size as often as needed."""
    content, kind = file.read_bytes(), "png"
    if len(content) > LARGEST_PICTURE:
        content, kind = _shrunk(file), "jpeg"
    return f"![samples](data:image/{kind};base64,{base64.b64encode(content).decode()})"


def _shrunk(file: Path) -> bytes:
    with Image.open(file) as png:
        image = png.convert("RGB")
    while True:
        for quality in JPEG_QUALITIES:
            buffer = io.BytesIO()
            image.save(buffer, "JPEG", quality=quality)
            if buffer.tell() <= LARGEST_PICTURE:
                return buffer.getvalue()
        image = image.resize((max(1, image.width // 2), max(1, image.height // 2)), Image.Resampling.LANCZOS)


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
