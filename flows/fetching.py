"""`ddpm fetch`: the workspace of a run that another machine completed."""

import re
import subprocess
import sys
from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from flows import dvc_lock, dvc_yaml, workspace
from flows.apply import DISTILLATION
from flows.params import load
from flows.paths import Paths
from flows.stages import STUDENT_STAGES
from flows.tracking import fetching

NAME = re.compile(r"\w[\w.-]*")
"""Names of workspaces."""


def fetch(run: str) -> Path:
    """Create the workspace of a run that ran elsewhere: code from git, parameters from MLflow, outputs from DVC.

    A distillation needs that of its teacher, which is fetched too unless it is here.

    Raises:
        UserError: it is here already, or MLflow, git or the DVC remote lacks a part of it.
    """
    paths = Paths()
    if not NAME.fullmatch(run):
        raise UserError(f"run {run!r}: not the name of a flow run")
    if (paths.runs / run / "run.json").exists():
        raise UserError(f"run {run!r}: already here; `ddpm apply {run}` brings it into the working tree")
    found = fetching.find(run, load(paths.params), paths)
    made = dvc_lock.stages(Path(fetching.LOCK), found.lock)
    if not found.teacher and made.keys() & STUDENT_STAGES.keys():
        raise UserError(f"run {run!r}: MLflow does not know its teacher, without which it cannot be fetched")
    if not re.fullmatch("[0-9a-f]{40,64}", found.commit):
        raise UserError(f"run {run!r}: MLflow does not know its commit, without which it cannot be fetched")
    if found.dirty:
        print(f"warning: run {run} had changes that its commit {found.commit[:12]} lacks", file=sys.stderr)
    teacher = _teacher(run, found.teacher, made) if found.teacher else None
    record = workspace.Run(
        run,
        found.flow_run_id,
        found.created,
        found.commit,
        found.dirty,
        "completed",
        ended=found.ended,
        teacher=found.teacher,
    )
    own = {"params.yaml": found.parameters, DISTILLATION if teacher else dvc_lock.FILE: found.lock}
    directory = workspace.adopt(record, _archive(found.commit), own, [*map(dvc_yaml.target, made)], teacher)
    print(f"Fetched run {run}: the outputs of {', '.join(made)}, in {directory.relative_to(Path.cwd())}")
    return directory


def _teacher(run: str, name: str, made: dict[str, Any]) -> Path:
    """The workspace of a distillation's teacher; raises UserError unless it has what the stages in `made` depend on."""
    directory = Paths().runs / name
    if not NAME.fullmatch(name) or not (directory / "run.json").exists():
        fetch(name)
    file = directory / dvc_lock.FILE
    trained = dvc_lock.stages(file, file.read_bytes())
    has = {out["path"]: out["md5"] for stage in trained.values() for out in stage["outs"]}
    for dep in (dep for stage in made.values() for dep in stage["deps"]):
        if has.get(dep["path"], dep["md5"]) != dep["md5"]:
            raise UserError(f"run {run!r}: distilled from a run {name!r} with another {dep['path']} than the one here")
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
