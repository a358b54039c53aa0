"""A flow run's own workspace: a copy of the repository's files, in which DVC works on the repository's cache.

So several runs can go at once, and code edited meanwhile changes nothing. A workspace is `.ddpm/runs/NAME`; its own
`.ddpm` links to the repository's, so that checkpoints and the MLflow database are shared.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from diffusion import params
from diffusion.errors import UserError
from diffusion.files import write_json
from diffusion.paths import Paths

KEEP_RUNS = int(os.environ.get("DDPM_KEEP_RUNS", "20"))
KEEP_DAYS = float(os.environ.get("DDPM_KEEP_DAYS", "14"))
"""Finished workspaces are removed beyond the newest KEEP_RUNS, and when older than KEEP_DAYS."""

State = Literal["running", "completed", "failed", "cancelled", "crashed"]


@dataclass(frozen=True)
class Run:
    """What `run.json` in a workspace says."""

    name: str
    flow_run_id: str
    created: str
    """ISO 8601, UTC."""
    git_revision: str
    git_dirty: bool
    state: State

    @classmethod
    def read(cls, workspace: Path) -> "Run":
        return cls(**json.loads((workspace / "run.json").read_text()))

    def write(self, workspace: Path) -> None:
        write_json(workspace / "run.json", asdict(self))


def document(preset: str | None, changes: Mapping[str, Any]) -> Any:
    """params.yaml of the working tree with a preset and then `changes` laid over it.

    Raises: UserError naming the field, if the whole does not hold together.
    """
    paths = Paths()
    merged = params.read_yaml(paths.params)
    if preset:
        merged = params.with_preset(merged, paths.presets, preset)
    merged = params.overlay(merged, dict(changes))
    params.validate(merged, "parameters of the run")
    return merged


@contextmanager
def use(name: str, flow_run_id: str, parameters: Any) -> Iterator[Path]:
    """The workspace of a flow run, its own until the block ends; how it ends becomes the run's state.

    A flow run that is started again by the same id goes on in the workspace that it has.

    Args:
        name: the flow run's name.
        flow_run_id: its id, which tells two runs of one name apart.
        parameters: what `document` gave.
    Raises:
        UserError: the repository is no git repository, or the data cannot be had.
    """
    runs = Paths().runs.absolute()
    runs.mkdir(parents=True, exist_ok=True)
    _clean(runs)
    name = re.sub(r"[^\w.-]+", "-", name).lstrip(".") or flow_run_id
    if (runs / name / "run.json").exists() and Run.read(runs / name).flow_run_id != flow_run_id:
        name = f"{name}-{flow_run_id[:8]}"
    workspace = runs / name
    with _lock(workspace):
        if not workspace.exists():
            _create(workspace, flow_run_id, parameters)
        run = replace(Run.read(workspace), state="running")
        run.write(workspace)
        state: State = "completed"
        try:
            _bring_raw_data(workspace)
            yield workspace
        except Exception:
            state = "failed"
            raise
        except BaseException:  # Prefect's TerminationSignal, KeyboardInterrupt
            state = "cancelled"
            raise
        finally:
            replace(run, state=state).write(workspace)


def find(run: str) -> Path:
    """The workspace of a run, by its name or a beginning of it that no other has; raises UserError listing them."""
    names = [workspace.name for workspace in _workspaces(Paths().runs)]
    matches = [run] if run in names else [name for name in names if name.startswith(run)]
    match matches:
        case [name]:
            return Paths().runs / name
        case []:
            raise UserError(f"run {run!r}: no such run; there are {', '.join(names) or 'none yet'}")
        case _:
            raise UserError(f"run {run!r}: could be {', '.join(matches)}")


def newest(state: State, other_than: Path | None = None) -> Path | None:
    """The workspace of the newest run in a state."""
    found = [
        each
        for each in _workspaces(Paths().runs)
        if Run.read(each).state == state and each.name != (other_than and other_than.name)
    ]
    return found[-1] if found else None


def list_runs() -> None:
    """Print name, time, state and held-out MSE of each run that is kept, oldest first."""
    rows = [("RUN", "CREATED (UTC)", "STATE", "MSE")]
    for workspace in _workspaces(Paths().runs):
        run = Run.read(workspace)
        report = Paths(workspace).evaluate_report
        mse = f"{json.loads(report.read_text())['mse']:.4f}" if report.exists() else ""
        state = "crashed" if run.state == "running" and not _in_use(workspace) else run.state
        rows.append((run.name, run.created[:16].replace("T", " "), state, mse))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def dvc(root: Path, *arguments: str) -> str:
    """Run DVC in `root` and return what it prints; raises UserError with its error message in one line."""
    command = [sys.executable, "-m", "dvc", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        _, _, reason = done.stderr.partition("ERROR: ")
        raise UserError(f"dvc {' '.join(arguments)}: {' '.join((reason or done.stderr).split())}")
    return done.stdout.strip()


def git(*arguments: str) -> str:
    """Run git in the working tree and return what it prints; raises UserError with its last line."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("git: not found; install it, since a run records the code it used") from None
    if done.returncode:
        raise UserError(f"git {arguments[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def _create(workspace: Path, flow_run_id: str, parameters: Any) -> None:
    """Make the workspace beside its place, and move it there when it is whole."""
    temporary = _unfinished(workspace)
    shutil.rmtree(temporary, ignore_errors=True)
    revision = git("rev-parse", "HEAD").strip()
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        source, target = Path(name), temporary / name
        if source.is_symlink() or source.is_file():  # else deleted, or a submodule
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(source, target, follow_symlinks=False)
    (temporary / ".ddpm").symlink_to(Paths().state.absolute())
    local = f"""[core]
    no_scm = true
    site_cache_dir = {Paths().state.absolute() / "dvc"}
[cache]
    dir = {dvc(Path(), "cache", "dir")}
    type = "reflink,hardlink,symlink,copy"
"""
    (temporary / ".dvc" / "config.local").write_text(local)
    params.write_yaml(Paths(temporary).params, parameters)
    dirty = bool(git("status", "--porcelain").strip())
    created = datetime.now(UTC).isoformat(timespec="seconds")
    Run(workspace.name, flow_run_id, created, revision, dirty, "running").write(temporary)
    temporary.replace(workspace)


def _bring_raw_data(workspace: Path) -> None:
    """Check the raw data out of the DVC cache, where git does not hold them."""
    source = params.load(Paths(workspace).params).shard.source
    if (workspace / source).exists():
        return
    for tracked in sorted(Paths(workspace).raw.glob("*.dvc")):
        if (workspace / source).is_relative_to(tracked.with_suffix("")):
            file = str(tracked.relative_to(workspace))
            try:
                dvc(workspace, "checkout", file)
            except UserError:
                raise UserError(
                    f"{file}: its data are not in the DVC cache: `dvc pull {file}` fetches them from a remote, "
                    f"`dvc commit {file}` takes them from the working tree"
                ) from None
            return
    if Path(source).exists():
        raise UserError(
            f"shard.source: {source} is neither in git nor under DVC, so no run can have it; "
            "`ddpm import` brings it under DVC"
        )
    raise UserError(f"shard.source: {source}: no such file or folder")


def _clean(runs: Path) -> None:
    """Remove old workspaces, and what is left of half-made ones; never one in use."""
    workspaces = _workspaces(runs)
    oldest = datetime.now(UTC) - timedelta(days=KEEP_DAYS)
    for index, workspace in enumerate(reversed(workspaces)):
        if index >= KEEP_RUNS or datetime.fromisoformat(Run.read(workspace).created) < oldest:
            with suppress(Timeout), _lock(workspace):
                shutil.rmtree(_unfinished(workspace), ignore_errors=True)
                workspace.replace(_unfinished(workspace))
                shutil.rmtree(_unfinished(workspace))
    for unfinished in runs.glob(".*.part"):
        with suppress(Timeout), _lock(runs / unfinished.name[1:].removesuffix(".part")):
            shutil.rmtree(unfinished, ignore_errors=True)
    for lock in runs.glob(".*.lock"):
        workspace = runs / lock.name[1:].removesuffix(".lock")
        if not workspace.exists():
            with suppress(Timeout), _lock(workspace):
                lock.unlink(missing_ok=True)


def _workspaces(runs: Path) -> list[Path]:
    """All workspaces, oldest first."""
    found = [file.parent for file in runs.glob("[!.]*/run.json")]
    return sorted(found, key=lambda workspace: (Run.read(workspace).created, workspace.name))


def _lock(workspace: Path) -> FileLock:
    """The lock of a workspace, beside it; raises Timeout at once if another process holds it."""
    return FileLock(workspace.with_name(f".{workspace.name}.lock"), blocking=False)


def _unfinished(workspace: Path) -> Path:
    return workspace.with_name(f".{workspace.name}.part")


def _in_use(workspace: Path) -> bool:
    try:
        with _lock(workspace):
            return False
    except Timeout:
        return True
