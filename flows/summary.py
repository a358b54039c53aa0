"""A run's stages and results: `summary.json` in its workspace, and the table that `ddpm summary` prints."""

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from diffusion.storage.files import write_json
from flows import baselines, workspace
from flows.dvc_stage import Outcome
from flows.gate import Row
from flows.paths import Paths

METRICS = {"mse": "held-out MSE", "r2": "R²", "bits_per_dim": "bits/dim"}
STUDENT_METRICS = {
    "sampling_steps": "steps",
    "frechet_distance": "Fréchet distance",
    "teacher_frechet_distance_4": "teacher, 4 steps",
    "teacher_frechet_distance_8": "teacher, 8 steps",
    "recall": "recall",
    "drift": "drift",
}
"""Those of a distillation; the teacher's are Fréchet distances in DDIM steps."""


@dataclass(frozen=True)
class StageSummary:
    stage: str
    seconds: float
    outcome: Outcome


@dataclass(frozen=True)
class Summary:
    """A finished run."""

    run: str
    stages: list[StageSummary]
    metrics: dict[str, float]
    """All numbers of the evaluation: reports/evaluate.json, or reports/student/evaluate.json."""
    onnx: str
    """Path of the ONNX model, absolute."""
    prefect: str
    """Address of the run in Prefect's UI, empty if it ran without a server."""
    mlflow: str
    """Address of the run in MLflow's UI, empty if it could not be recorded."""
    gate: list[dict[str, Any]] = field(default_factory=list)
    """The decision whether the model becomes champion, by rule; empty if there was none."""
    quality: str = ""
    """The verdict on the samples; empty if they were not compared with real images."""
    teacher: str = ""
    """Name of the run whose model was distilled; empty for a training."""
    start: str = ""
    """Where the model comes from that a training started from; empty for random weights."""


def collect(
    directory: Path,
    page: str,
    stages: list[StageSummary],
    tracked: dict[str, Any] | None,
    teacher: Path | None = None,
) -> Summary:
    """The summary of a workspace in which all stages are done.

    Args:
        directory: the workspace.
        page: address of the run in Prefect's UI, empty without a server.
        stages: the outcome of each stage.
        tracked: the output of `ddpm track --json`, None if it failed.
        teacher: the workspace of the run whose model was distilled, if any.
    """
    paths = Paths(directory, student=teacher is not None)
    metrics = json.loads(paths.evaluate_report.read_text())
    quality = metrics.pop("quality", "")
    return Summary(
        run=directory.name,
        stages=stages,
        metrics=metrics,
        onnx=str(paths.sampler),
        prefect=page,
        mlflow=tracked["url"] if tracked else "",
        gate=tracked.get("gate", []) if tracked else [],
        quality=quality,
        teacher=teacher.name if teacher else "",
        start=workspace.Run.read(directory).start,
    )


def write(directory: Path, summary: Summary) -> None:
    write_json(directory / "summary.json", asdict(summary))


def read(directory: Path) -> Summary:
    """The summary in a workspace; raises UserError if its run is not finished, or the file is damaged."""
    file = directory / "summary.json"
    try:
        content = json.loads(file.read_text())
        for row in content.get("gate", []):
            Row(**row)
        return Summary(**content | {"stages": [StageSummary(**stage) for stage in content["stages"]]})
    except FileNotFoundError:
        state = workspace.state_of(directory, workspace.Run.read(directory))
        raise UserError(f"run {directory.name!r} has no summary: its state is {state}") from None
    except (ValueError, TypeError, KeyError):
        raise UserError(f"{file}: damaged; the run's results are in {directory / 'reports'}") from None


def show(run: str | None) -> None:
    """Print the table of a run, by default the last finished one."""
    directory = workspace.newest("completed") if run is None else workspace.find(run)
    if directory is None:
        raise UserError("no run has finished yet: `make train` starts one")
    summary = read(directory)
    begin = f", a distillation of {summary.teacher}" if summary.teacher else ""
    begin += f", started from {summary.start}" if summary.start else ""
    print(f"run {summary.run}{begin}\n")
    width = max(10, *(len(stage.stage) + 2 for stage in summary.stages))
    for stage in summary.stages:
        print(f"  {stage.stage:<{width}}{stage.seconds:>7.1f} s   {stage.outcome}")
    print()
    titles = STUDENT_METRICS if summary.teacher else METRICS
    lines = {title: number(summary.metrics[name]) for name, title in titles.items() if name in summary.metrics}
    if "bits_per_dim_gain_low" in summary.metrics:
        lines["bits/dim"] += f"   {baselines.verdict(summary.metrics)}"
    lines |= {"samples": summary.quality} if summary.quality else {}
    lines |= {"ONNX model": os.path.relpath(summary.onnx)}
    lines |= {"Prefect": summary.prefect} if summary.prefect else {}
    lines |= {"MLflow": summary.mlflow or f"not recorded; run `ddpm track {summary.run}`"}
    width = max(14, *(len(title) + 2 for title in lines))
    for title, value in lines.items():
        print(f"  {title:<{width}}{value}")


def number(value: float) -> str:
    """A figure as it is shown; counts have no decimals."""
    return str(value) if isinstance(value, int) else f"{value:.4f}"
