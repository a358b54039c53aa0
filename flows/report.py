"""The markdown report of a run, for Prefect's UI."""

import base64
import csv
import json
from pathlib import Path

from flows.paths import Paths
from flows.summary import Summary

LARGEST_PICTURE = 300_000
"""Bytes; Prefect keeps artifacts in its database."""


def markdown(directory: Path, summary: Summary, last: Summary | None) -> str:
    """The report of a finished run, its metrics beside those of the last one."""
    parts = [
        f"# {summary.run}",
        _table(
            ["stage", "seconds", ""],
            [[stage.stage, f"{stage.seconds:.1f}", stage.outcome] for stage in summary.stages],
        ),
        "## Held-out evaluation",
        _metrics(summary, last),
        "## By timestep",
        _bands(Paths(directory).evaluation / "bands.csv"),
        "## Samples",
        _picture(Paths(directory).evaluation / "samples.png"),
        "## ONNX",
        _precisions(Paths(directory).export_report),
        "## Files",
        f"- ONNX model: `{summary.onnx}`\n- workspace: `{directory}`",
        f"- [MLflow run]({summary.mlflow})" if summary.mlflow else f"- MLflow: none; `ddpm track {summary.run}`",
    ]
    return "\n\n".join(part for part in parts if part)


def _metrics(summary: Summary, last: Summary | None) -> str:
    before = last.metrics if last else {}
    rows = []
    for name, value in summary.metrics.items():
        if name.endswith(("_low", "_high", "_se")):
            continue
        low, high = summary.metrics.get(f"{name}_low"), summary.metrics.get(f"{name}_high")
        interval = f"{low:.4f} to {high:.4f}" if low is not None and high is not None else ""
        old = before.get(name)
        compared = [_number(old), f"{value - old:+.4g}"] if old is not None else ["", ""]
        rows.append([name, _number(value), interval, *compared])
    return _table(["metric", "value", "95 %", f"last run ({last.run})" if last else "last run", "change"], rows)


def _number(value: float) -> str:
    return str(value) if isinstance(value, int) else f"{value:.4f}"


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
    return _table(["t", "MSE", "95 %", "R²", "Wiener MSE"], rows)


def _precisions(file: Path) -> str:
    """The sampler and its variants; how fast they are depends on the machine, and is in MLflow."""
    report = json.loads(file.read_text(encoding="utf-8"))
    rows = [["sampler.onnx", _megabytes(report["bytes"]["sampler"]), f"{report['denoiser']['mse']:.4f}", ""]]
    for name, scores in report.items():
        if "loss" in scores:
            size = _megabytes(report["bytes"][f"sampler_{name}"])
            rows.append([f"sampler_{name}.onnx", size, f"{scores['mse']:.4f}", f"{scores['loss']:+.2%}"])
    return _table(["file", "MB", "held-out MSE", "more than sampler.onnx"], rows)


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.2f}"


def _picture(file: Path) -> str:
    content = file.read_bytes()
    if len(content) > LARGEST_PICTURE:
        return f"`{file}`"
    return f"![samples](data:image/png;base64,{base64.b64encode(content).decode()})"


def _table(head: list[str], rows: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(row)} |" for row in [head, ["---"] * len(head), *rows])
