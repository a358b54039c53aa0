"""The parameters that made the results in a folder."""

from typing import Any

from diffusion.errors import FileFault
from flows import dvc_yaml, made_with, yaml_files
from flows.pages.contents import read_record
from flows.paths import Paths
from flows.stages import STAGES

DESCRIBED = tuple(f"sample.{name}" for name in ("sampler", "variance", "steps", "spacing", "threshold", "guidance"))
"""Parameters without which samples cannot be described."""


def read_parameters(paths: Paths) -> dict[str, Any]:
    """All parameters by dotted name: those that each stage ran with; without its record, those of params.yaml.

    Those of the training are left out if the model was imported.

    Raises:
        UserError: params.yaml lacks parameters that describe the results, or cannot be read; names the file.
    """
    found = dict(made_with.leaves(yaml_files.read_yaml(paths.params)))
    if not paths.train_report.exists():
        found = {
            name: value for name, value in found.items() if not name.startswith(("process.", "network.", "train."))
        }
    for stage in sorted(STAGES, key="evaluate".__eq__):  # last, as its parameters describe the results
        if ran_with := read_record(paths, stage)["params"]:
            sections = tuple(f"{name}." for name in dvc_yaml.parameters(stage))
            found = {name: value for name, value in found.items() if not f"{name}.".startswith(sections)} | ran_with
    if missing := [name for name in DESCRIBED if name not in found]:
        raise FileFault(paths.params, f"lacks {', '.join(missing)}; restore it (`ddpm params` lists all parameters)")
    return found
