"""A run's description: what was trained on what, the key figures, and the verdict on its model.

A user may edit it in MLflow: from then on it is left alone.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.errors import counted
from flows import mlflow_pages as pages
from flows.params import Params
from flows.paths import Paths
from flows.tracking.names import HIDDEN
from flows.tracking.results import Results

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

NOTE, WRITTEN = "mlflow.note.content", f"{HIDDEN}note_sha256"
VERDICT, CARD = "**Verdict on", "[Model card]"
FIGURES = (
    ("mse", "held-out MSE"),
    ("r2", "R²"),
    ("bits_per_dim", "bits/dim"),
    ("val_mse", "val MSE"),
    ("wiener_mse", "MSE of a linear denoiser"),
)
STUDENT_FIGURES = (
    ("frechet_distance", "Fréchet distance"),
    ("recall", "recall"),
    ("drift", "drift"),
    ("teacher_frechet_distance_8", "Fréchet distance of the teacher in 8 steps"),
    ("teacher_mse", "held-out MSE of the teacher"),
)
STUDENT_GLOSSARY = """\
- Fréchet distance (`evaluate/frechet_distance`): of samples from training images, in features of a classifier.
- recall (`evaluate/recall`): fraction of training images that the samples cover; low if diversity was lost.
- drift (`evaluate/drift`): distance from the teacher's samples of the same noise, in grey levels.
- `evaluation/few_steps.json`: all of these for student and teacher, by number of steps.
- `curves/loss`: the loss of the distillation; `curves/heldout_mse`: the same of the averaged weights, on validation
  images, measured while training."""
GLOSSARY = """\
- held-out MSE (`evaluate/mse`): mean squared error of the predicted noise on the test pairs; predicting zero scores 1.
- R² (`evaluate/r2`): fraction of the noise's variance that the network explains.
- bits/dim (`evaluate/bits_per_dim`): variational bound on the negative log-likelihood of test images.
- val MSE (`evaluate/val_mse`): error on the validation pairs, which decides the champion.
- linear denoiser (`evaluate/wiener_mse`): Wiener filter fitted on the training images; baseline.
- `curves/loss`: the training loss, weighted; `loss_by_timestep/tA-B`: its mean over timesteps A to B.
- `curves/heldout_mse`: the averaged weights' error on up to 1,024 validation pairs, measured while training."""


def training(params: Params, paths: Paths, started: str) -> str:
    """The description of a run whose training has no results yet; `started` says what it started from, if anything."""
    if paths.student:
        steps = _steps(_most(params, paths))
        return (
            f"Distillation of a model of {_data(params, paths)}: at most {steps} of {_images(params, paths)}.\n\n"
            "No results have been recorded yet."
        )
    return (
        f"Training of {_network(params)} on {_data(params, paths)}: at most "
        f"{_steps(_most(params, paths))} of {_images(params, paths)}.{f' {started}' if started else ''}\n\n"
        "No results have been recorded yet."
    )


def results(found: Results, trained_in: str, verdict: str, started: str) -> str:
    """The description of a run that has results; MLflow's page shows only its first lines, until a user asks for more.

    Args:
        found: the results.
        trained_in: a link to the run whose weights were reused; empty if this run trained them.
        verdict: that of its model version; empty if there is none.
        started: says what the training started from; empty for random weights.
    """
    named = STUDENT_FIGURES if found.paths.student else FIGURES
    figures = _figures(found.evaluation.report, named) if found.evaluation else "Not evaluated yet."
    glossary = STUDENT_GLOSSARY if found.paths.student else GLOSSARY
    trained = " ".join(filter(None, [_trained(found, trained_in), started]))
    return "\n\n".join(filter(None, [trained, verdict, figures, glossary]))


def verdict(version: ModelVersion) -> str:
    """A paragraph with the latest judgment in a version's description."""
    number = str(version.version)
    last = (judgments(version) or [""])[-1]
    return f"{VERDICT} [{version.name} version {number}]({pages.version('', version.name, number)}):** {last}"


def card_link(experiment_id: str, run_id: str) -> str:
    """The first paragraph of a version's description: a link to its model card."""
    return f"{CARD}({pages.artifact('', experiment_id, run_id, 'onnx/README.md')})"


def judgments(version: ModelVersion) -> list[str]:
    """The paragraphs of a version's description without the link to its card, oldest first."""
    return [each for each in (version.description or "").split("\n\n") if each and not each.startswith(CARD)]


def run_link(experiment_id: str, run_id: str, name: str) -> str:
    """A markdown link to another run of the same server."""
    return f"[{name}]({pages.run('', experiment_id, run_id)})"


def write(client: MlflowClient, run_id: str, text: str) -> None:
    """Set a run's description, unless a user wrote or edited the one that it has."""
    from mlflow.entities import RunTag

    tags = client.get_run(run_id).data.tags
    if _ours(tags) and tags.get(NOTE) != text:
        client.log_batch(run_id, tags=[RunTag(NOTE, text), RunTag(WRITTEN, _digest(text))])


def rewrite_verdict(client: MlflowClient, version: ModelVersion) -> None:
    """Bring the verdict in the description of a version's run up to date, if there is such a description."""
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):  # the run was deleted
        run_id = version.run_id or ""
        before = client.get_run(run_id).data.tags.get(NOTE, "").split("\n\n")
        after = [verdict(version) if paragraph.startswith(VERDICT) else paragraph for paragraph in before]
        if after != before:
            write(client, run_id, "\n\n".join(after))


def _ours(tags: Mapping[str, str]) -> bool:
    if WRITTEN in tags:
        return _digest(tags.get(NOTE, "")) == tags[WRITTEN]
    return NOTE not in tags


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _trained(found: Results, trained_in: str) -> str:
    report, params = found.training, found.params
    size = f" ({report['parameters']:,} parameters)" if "parameters" in report else ""
    steps = report["steps"]
    most = _most(params, found.paths)
    ended = _steps(steps) + (f" (of at most {most:,})" if steps < most else "")
    student = f"student{size}, distilled by `{params.distill.method.kind}` from a model of"
    begin = student if found.paths.student else f"{_network(params)}{size} trained on"
    text = f"{begin} {_data(params, found.paths)}: {ended} of {_images(params, found.paths)}."
    text = _capital(text)
    if report.get("kept_step", steps) != steps:
        text += f" The weights are those of step {report['kept_step']:,}, which had the lowest held-out error."
    if report.get("augment"):
        text += f" The images were augmented with probability {report['augment']:g}."
    return f"{text} The weights were trained in {trained_in} and are reused here." if trained_in else text


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def _steps(count: int) -> str:
    return counted(count, "step", spec=",")


def _images(params: Params, paths: Paths) -> str:
    """Those of a batch."""
    return counted((params.distill if paths.student else params.train).batch_size, "image", spec=",")


def _network(params: Params) -> str:
    return f"network `{params.network.kind}`"


def _training_images(paths: Paths) -> int:
    manifest = json.loads((paths.pairs / "manifest.json").read_bytes())
    return int(manifest["splits"]["train"]["images"])


def _most(params: Params, paths: Paths) -> int:
    """The number of steps, unless training stops early."""
    options = params.distill if paths.student else params.train
    return options.for_images(_training_images(paths)).steps


def _data(params: Params, paths: Paths) -> str:
    channels, name = params.pairs.channels, Path(params.shard.source).stem
    colours = {1: "greyscale", 3: "RGB", 4: "RGBA"}.get(channels, f"{channels}-channel")
    size = f"{params.pairs.height}x{params.pairs.width}"
    return f"**{name}**, {counted(_training_images(paths), f'{colours} image', spec=',')} of {size} pixels"


def _figures(report: Mapping[str, float], named: Sequence[tuple[str, str]]) -> str:
    shown = [f"{title} {report[key]:.4f}{_interval(report, key)}" for key, title in named if key in report]
    if not shown:
        return ""
    return f"{_capital('; '.join(shown))}. In parentheses: 95 % confidence intervals."


def _interval(report: Mapping[str, float], key: str) -> str:
    low, high = report.get(f"{key}_low"), report.get(f"{key}_high")
    return "" if low is None or high is None else f" ({low:.4f} to {high:.4f})"
