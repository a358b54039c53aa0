"""`ddpm fetch`: the workspace of a run that another machine completed."""

import re
import subprocess
import sys
from pathlib import Path

from diffusion.errors import UserError
from flows import dvc_lock, workspace
from flows.params import load
from flows.paths import Paths
from flows.stages import STAGES
from flows.tracking import fetching


def fetch(run: str) -> Path:
    """Create the workspace of a training that ran elsewhere: code from git, parameters from MLflow, outputs from DVC.

    Raises:
        UserError: it is here already, or MLflow, git or the DVC remote lacks a part of it.
    """
    paths = Paths()
    if not re.fullmatch(r"\w[\w.-]*", run):
        raise UserError(f"run {run!r}: not the name of a flow run")
    if (paths.runs / run / "run.json").exists():
        raise UserError(f"run {run!r}: already here; `ddpm apply {run}` brings it into the working tree")
    found = fetching.find(run, load(paths.params), paths)
    made = dvc_lock.stages(Path(fetching.LOCK), found.lock)
    if not made.keys() & STAGES.keys():
        raise UserError(f"run {run!r}: is a distillation, which cannot be fetched; fetch its teacher, and distil that")
    if not re.fullmatch("[0-9a-f]{40,64}", found.commit):
        raise UserError(f"run {run!r}: MLflow does not know its commit, without which it cannot be fetched")
    if found.dirty:
        print(f"warning: run {run} had changes that its commit {found.commit[:12]} lacks", file=sys.stderr)
    record = workspace.Run(
        run, found.flow_run_id, found.created, found.commit, found.dirty, "completed", ended=found.ended
    )
    directory = workspace.adopt(record, _archive(found.commit), found.parameters, found.lock)
    print(f"Fetched run {run}: the outputs of {', '.join(made)}, in {directory.relative_to(Path.cwd())}")
    return directory


def _archive(commit: str) -> bytes:
    """The files of a commit as a tar, fetched from the remote if it is not here; raises UserError."""
    try:
        workspace.git("cat-file", "-e", f"{commit}^{{commit}}")
    except UserError:
        workspace.git("fetch", "--quiet", "origin", commit)
    done = subprocess.run(["git", "archive", "--format=tar", commit], capture_output=True)
    if done.returncode:
        raise UserError(f"git archive: {done.stderr.decode(errors='replace').strip() or 'failed'}")
    return done.stdout
