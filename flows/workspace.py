"""The workspace of a flow run: a copy of the repository's files that uses the repository's DVC cache.

Several runs can thus be active at the same time, unaffected by edits to the code. A workspace is `.ddpm/runs/NAME`; its
`.ddpm` is a link to that of the repository, so checkpoints and the MLflow database are shared.
"""

import io
import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, Literal

from filelock import FileLock, Timeout
from pydantic import Field

from diffusion.errors import UserError
from diffusion.progress import say
from diffusion.storage.files import write_atomic, write_json, writing
from flows import dvc_add, dvc_config, dvc_lock, dvc_output, presets, yaml_files
from flows.environment import setting
from flows.paths import Paths

State = Literal["running", "completed", "failed", "cancelled", "crashed"]


@dataclass(frozen=True)
class Run:
    """The content of `run.json` in a workspace."""

    name: str
    flow_run_id: str
    created: str
    """ISO 8601, UTC."""
    git_revision: str
    git_dirty: bool
    """Whether tracked files other than dvc.lock had uncommitted changes."""
    state: State
    ended: str = ""
    """ISO 8601, UTC; empty while the run is active, or if it was killed."""
    teacher: str = ""
    """Name of the run whose model this one distils; empty for a training."""
    start: str = ""
    """Where the model comes from that a training started from; empty for random weights."""
    sweep: str = ""
    """Name of the sweep whose trial this is; empty if it is none."""

    @classmethod
    def read(cls, workspace: Path) -> "Run":
        file = workspace / "run.json"
        try:
            run = cls(**json.loads(file.read_text()))
            max(datetime.now(UTC), *map(datetime.fromisoformat, (run.created, run.ended or run.created)))  # have zones
            return run
        except (ValueError, TypeError):
            raise UserError(f"{file}: damaged; delete {workspace}, which is no longer usable") from None

    def write(self, workspace: Path) -> None:
        write_json(workspace / "run.json", asdict(self))


class StoppedEarly(Exception):
    """The run was not worth finishing."""


def document(preset: str | None, changes: Mapping[str, Any]) -> Any:
    """The parameters of a run: params.yaml, then the preset if any (see presets.py), then `changes`.

    Raises:
        UserError: the result is invalid; names the field.
    """
    from flows.changes import lay_over  # imports torch, which `ddpm runs` does not need
    from flows.params import read, validate

    paths = Paths()
    merged = read(paths.params)
    if preset is not None:
        merged = presets.laid_over(merged, paths.presets, preset)
    merged = lay_over(merged, changes)
    validate(merged, "parameters of the run")
    return merged


@contextmanager
def use(name: str, flow_run_id: str, parameters: Any, teacher: Path | None = None, sweep: str = "") -> Iterator[Path]:
    """Create the workspace of a flow run and lock it for the block; how the block ends sets the run's state.

    A flow run that is started again with the same id continues in its existing workspace, and so does a sweep's trial
    with the same parameters, whatever its id.

    Args:
        name: name of the flow run.
        flow_run_id: its id, which distinguishes runs of the same name.
        parameters: the result of `document`.
        teacher: the workspace of the run whose model is distilled, if any; its results are linked.
        sweep: name of the sweep whose trial the run is, if any.
    Raises:
        UserError: this is not a git repository, the data are missing, or the run is active in another process.
        OSError: the teacher has been deleted in the meantime.
    """
    runs = Paths().runs.absolute()
    with writing(runs):
        runs.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "-", name).lstrip(".") or flow_run_id
    with ExitStack() as held:
        with exclusive(runs):
            _clean(runs, keep=teacher)
            if (runs / name).exists() and not _continues(runs / name, flow_run_id, parameters, sweep):
                name = f"{name}-{flow_run_id[:8]}"
            workspace = runs / name
            try:
                held.enter_context(_lock(workspace))
            except Timeout:
                raise UserError(f"run {name!r} is running in another process; wait for it or cancel it") from None
            if not workspace.exists():
                _create(workspace, flow_run_id, parameters, teacher, sweep)
        run = replace(Run.read(workspace), flow_run_id=flow_run_id, state="running", ended="")
        run.write(workspace)
        state: State = "completed"
        try:
            if not run.teacher:
                from flows.inputs import check_out  # imports torch, which `ddpm runs` does not need

                run = replace(run, start=check_out(workspace))
                run.write(workspace)
            yield workspace
        except BaseException as error:
            state = _state_after(error)
            raise
        finally:
            replace(run, state=state, ended=_now()).write(workspace)


def _continues(workspace: Path, flow_run_id: str, parameters: Any, sweep: str) -> bool:
    """Whether a flow run, or a trial of a sweep, has begun in a workspace."""
    run = Run.read(workspace)
    again = bool(sweep) and run.sweep == sweep and yaml_files.read_yaml(Paths(workspace).params) == parameters
    return again or run.flow_run_id == flow_run_id


def exclusive(runs: Path) -> FileLock:
    """The lock to hold while creating or removing workspaces."""
    return FileLock(runs / ".lock")


def _state_after(error: BaseException) -> State:
    from prefect.exceptions import TerminationSignal  # imported here, since it takes a second

    if isinstance(error, StoppedEarly):
        return "cancelled"
    if isinstance(error, Exception):
        return "failed"
    by_signal = isinstance(error, SystemExit) and isinstance(error.code, int) and error.code > 128
    return "cancelled" if by_signal or isinstance(error, TerminationSignal | KeyboardInterrupt) else "crashed"


def find(run: str) -> Path:
    """The workspace of a run, by name or unique prefix; raises UserError listing the names, or if it is damaged."""
    names = sorted(file.parent.name for file in Paths().runs.glob("[!.]*/run.json"))
    matches = [run] if run in names else [name for name in names if name.startswith(run)]
    match matches:
        case [name]:
            Run.read(Paths().runs / name)
            return Paths().runs / name
        case []:
            available = f"available: {', '.join(names)}" if names else "there are no runs yet"
            raise UserError(f"run {run!r}: not found; {available}")
        case _:
            raise UserError(f"run {run!r}: ambiguous; matches {', '.join(matches)}")


def newest(state: State, other_than: Path | None = None, distilled: bool | None = None) -> Path | None:
    """The workspace of the run that ended most recently in a state; None if there is none.

    `distilled` restricts them to distillations, or to trainings; by default they are of either kind.
    """
    found = [
        workspace
        for workspace, run in all_runs()
        if run.state == state
        and workspace.name != (other_than and other_than.name)
        and distilled in (None, bool(run.teacher))
    ]
    return found[-1] if found else None


def state_of(workspace: Path, run: Run) -> State:
    """The state of a run; one recorded as running without a process has crashed."""
    return "crashed" if run.state == "running" and not in_use(workspace) else run.state


def retention() -> tuple[int, float]:
    """How many of the latest runs to keep, and for how many days after their end."""
    runs = setting("DDPM_KEEP_RUNS", 20, Annotated[int, Field(ge=0)])
    days = setting("DDPM_KEEP_DAYS", 14.0, Annotated[float, Field(ge=0, le=36_500)])
    return runs, days


def dvc(root: Path, *arguments: str) -> str:
    """Run DVC in `root` and return its output; raises UserError with its error in one line."""
    command = [sys.executable, "-m", "dvc", "--wait-for-lock", *arguments]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    if done.returncode:
        raise UserError(f"dvc {' '.join(arguments)}: {dvc_output.reason(done.stderr)}")
    return done.stdout.strip()


def git(*arguments: str) -> str:
    """Run git in the working tree and return its output; raises UserError with the last line of its error."""
    try:
        done = subprocess.run(["git", *arguments], capture_output=True, text=True)
    except FileNotFoundError:
        raise UserError("git: not found; install it, since runs record the revision of the code") from None
    if done.returncode:
        raise UserError(f"git {arguments[0]}: {(done.stderr.strip().splitlines() or ['failed'])[-1]}")
    return done.stdout


def _create(workspace: Path, flow_run_id: str, parameters: Any, teacher: Path | None, sweep: str) -> None:
    """Create the workspace under a temporary name, and rename it once it is complete."""
    temporary = _unfinished(workspace)
    shutil.rmtree(temporary, ignore_errors=True)
    revision = git("rev-parse", "HEAD").strip()
    for name in git("ls-files", "-z", "--cached", "--others", "--exclude-standard").split("\0"):
        source, target = Path(name), temporary / name
        if source.is_symlink() or source.is_file():  # otherwise deleted, or a submodule
            with writing(target):
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy2(source, target, follow_symlinks=False)
    _share_state(temporary)
    yaml_files.write_yaml(Paths(temporary).params, parameters)
    dirty = bool(git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!*dvc.lock").strip())
    if teacher:
        dvc_lock.link_teacher(teacher, temporary)
    of = teacher.name if teacher else ""
    Run(workspace.name, flow_run_id, _now(), revision, dirty, "running", teacher=of, sweep=sweep).write(temporary)
    temporary.replace(workspace)


def adopt(run: Run, files: bytes, own: Mapping[str, bytes], targets: Sequence[str], teacher: Path | None) -> Path:
    """Create the workspace of a run that another machine completed; raises UserError if DVC does not have its outputs.

    files: a tar of its commit. own: contents of files that differ, by path. targets: its stages. teacher: as in `use`.
    """
    workspace = Paths().runs.absolute() / run.name
    with writing(workspace.parent):
        workspace.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(_lock(workspace).lock_file):  # waits for another process that fetches the same
        if workspace.exists():
            return workspace
        temporary = _unfinished(workspace)
        try:
            with exclusive(workspace.parent):  # before it pulls, `ddpm gc` must know what it needs
                shutil.rmtree(temporary, ignore_errors=True)
                with tarfile.open(fileobj=io.BytesIO(files)) as archive:
                    archive.extractall(temporary, filter="data")
                _share_state(temporary)
                if teacher:
                    dvc_lock.link_teacher(teacher, temporary)
                for name, content in own.items():
                    write_atomic(temporary / name, content)
            dvc(temporary, "pull", *targets)
            with exclusive(workspace.parent):
                run.write(temporary)
                temporary.replace(workspace)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    return workspace


def _share_state(workspace: Path) -> None:
    """Link a workspace's `.ddpm` to that of the repository, and have DVC use the repository's cache."""
    (workspace / ".ddpm").symlink_to(Paths().state.absolute())
    dvc_config.write(workspace)


def _clean(runs: Path, keep: Path | None) -> None:
    """Remove old workspaces and the remains of unfinished ones, but never one in use, or `keep`."""
    most, days = retention()
    oldest = datetime.now(UTC) - timedelta(days=days)
    for index, (workspace, run) in enumerate(reversed(all_runs())):
        old = index >= most or datetime.fromisoformat(run.ended or run.created) < oldest
        if old and workspace.name != (keep and keep.name):
            remove(workspace, run)
    remove_remains(runs)


def remove(workspace: Path, run: Run) -> bool:
    """Remove the workspace of a run, unless it is in use or the run has just ended; returns whether it did."""
    with suppress(Timeout), _lock(workspace):
        if Run.read(workspace) == run:
            shutil.rmtree(_unfinished(workspace), ignore_errors=True)
            workspace.replace(_unfinished(workspace))
            dvc_add.remove(_unfinished(workspace))
            return True
    return False


def remove_remains(runs: Path) -> None:
    """Remove what is left of workspaces that were being created or removed when the process was killed."""
    for unfinished in runs.glob(".*.part"):
        with suppress(OSError), _lock(runs / unfinished.name[1:-5]):  # OSError: Timeout, too
            dvc_add.remove(unfinished)
    for lock in runs.glob(".*.lock"):
        workspace = runs / lock.name[1:].removesuffix(".lock")
        if not workspace.exists():
            with suppress(Timeout), _lock(workspace):
                lock.unlink(missing_ok=True)


def all_runs() -> list[tuple[Path, Run]]:
    """All workspaces, sorted by the end of their runs; damaged ones are reported and skipped."""
    found = []
    for file in Paths().runs.glob("[!.]*/run.json"):
        try:
            found.append((file.parent, Run.read(file.parent)))
        except FileNotFoundError:  # deleted in the meantime
            pass
        except UserError as error:
            say(str(error))
    return sorted(found, key=lambda each: (each[1].ended or each[1].created, each[0].name))


def _lock(workspace: Path) -> FileLock:
    """The lock of a workspace, next to it; acquiring raises Timeout if another process holds it."""
    return FileLock(workspace.with_name(f".{workspace.name}.lock"), blocking=False)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="milliseconds")


def _unfinished(workspace: Path) -> Path:
    return workspace.with_name(f".{workspace.name}.part")


def in_use(workspace: Path) -> bool:
    """Whether a process runs in a workspace."""
    try:
        with _lock(workspace):
            return False
    except Timeout:
        return True
