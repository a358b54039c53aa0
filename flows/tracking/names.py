"""Names of tags, metrics and parameters in MLflow.

MLflow's pages hide tags that begin with `mlflow.`. They draw one section of charts for each prefix of the metrics'
names, in alphabetical order, and draw a metric as a curve if it has steps.
"""

import re
from collections.abc import Mapping
from typing import Any

HIDDEN, FORMER = "mlflow.ddpm.", "ddpm."
"""Prefix of the tags by which runs are found, and the prefix in earlier versions, which MLflow's pages show."""
GIT_DIRTY = "ddpm.git_dirty"
"""Tag, shown to users: whether tracked files had uncommitted changes."""


def former(tag: str) -> str:
    """The name of a hidden tag in earlier versions."""
    return FORMER + tag.removeprefix(HIDDEN)


def current(tags: Mapping[str, str]) -> dict[str, str]:
    """Tags, with those of earlier versions under their present names."""
    return {
        HIDDEN + key.removeprefix(FORMER) if key.startswith(FORMER) and key != GIT_DIRTY else key: value
        for key, value in tags.items()
    }


def curve(column: str) -> str:
    """The metric of a column of reports/train_curves (heldout.csv's `mse`: `heldout_mse`).

    The loss and the held-out error are in `curves/`, the first section of charts.
    """
    if column in ("loss", "heldout_mse"):
        return f"curves/{column}"
    if band := re.fullmatch(r"loss_t(\d+)_(\d+)", column):
        return f"loss_by_timestep/t{band[1]}-{band[2]}"
    return f"train/{column}"


def figures(stage: str, report: Mapping[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """The numbers in a stage's report: metrics, and those that become MLflow parameters.

    A report `train` gives `train/rollbacks` and `trained.images`, say, and the report's part `export/denoiser`
    `export/denoiser/mse` and `exported.denoiser.pairs`.
    """
    metrics, constants = {}, {}
    first, *rest = stage.split("/")
    for key, value in report.items():
        if key in _CONSTANT or key.endswith("_images"):
            constants[".".join([first.removesuffix("e") + "ed", *rest, key])] = value
        elif isinstance(value, int | float):
            metrics[_metric(stage, key)] = value
    return metrics, constants


_CONSTANT = ("parameters", "flops_per_image", "steps", "kept_step", "images", "pairs", "augment")


def _metric(stage: str, key: str) -> str:
    if stage == "train":
        return curve(key)
    if key.endswith(("_low", "_high", "_se")):
        return f"{stage}/intervals/{key}"
    return f"{stage}/likelihood/{key}" if key.startswith("bits_per_dim_") else f"{stage}/{key}"
