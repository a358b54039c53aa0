"""`ddpm shard`, `ddpm pairs` and so on: one stage, in the working tree or in a run's workspace."""

import importlib
import resource
import subprocess
from pathlib import Path

from diffusion.errors import UserError
from diffusion.signals import deferred
from flows import dvc_yaml, yaml_files
from flows.parent import stop_with_parent
from flows.paths import Paths


def run(stage: str) -> None:
    """Run a stage with the parameters of params.yaml."""
    stop_with_parent()
    # Every tar file of a large data set stays open while it is read.
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))
    with deferred():  # PyTorch goes on without NumPy if a signal interrupts its import of it
        from flows.params import load

        module = importlib.import_module(f"flows.stages.{stage.replace('-', '_')}")
    paths = Paths()
    params = load(paths.params)
    check_untracked(stage)
    module.run(params, paths)


def check_untracked(stage: str) -> None:
    """Raise UserError if git tracks an output of a stage: DVC refuses it too, but only after the stage has run."""
    pipeline = Path(dvc_yaml.file_of(stage))
    described = yaml_files.read_yaml(pipeline).get("stages", {}).get(stage, {}) if pipeline.exists() else {}
    outputs = [*described.get("outs", []), *described.get("metrics", [])]
    tracked = [output for output in outputs if isinstance(output, str) and git_tracks(output)]  # else: cache: false
    if tracked:
        raise UserError(
            f"{', '.join(tracked)}: tracked by git, but written by the stage {stage} and kept by DVC; run "
            f"`git rm -r --cached {' '.join(tracked)}`, which deletes no file"
        )


def git_tracks(path: str) -> bool:
    """Whether git tracks a file, or one in a folder; false outside of a repository, and without git."""
    command = ["git", "--literal-pathspecs", "ls-files", "-z", "--", path]
    try:
        return bool(subprocess.run(command, capture_output=True, check=False).stdout)
    except FileNotFoundError:
        return False
