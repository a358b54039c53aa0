"""What takes space here, what of it goes by a rule, and deleting that.

Nothing is written before the first files are deleted, so that a full disk does not matter.
"""

import re
import time
from collections.abc import Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import NamedTuple

from filelock import FileLock, Timeout

from diffusion.errors import UserError, counted
from diffusion.storage.files import sha256
from flows import dvc_add, workspace
from flows.fingerprint import lock_of
from flows.garbage import cache
from flows.garbage.rules import Rule
from flows.garbage.space import Part, measure
from flows.paths import Paths
from flows.tracking import garbage as mlflow_garbage
from flows.tracking.garbage import Deleted, Named
from flows.workspace import Run

SECONDS_TO_LEFTOVER = 24 * 60 * 60
"""An unfinished file that was not touched for this long is taken to be that of a command that was killed."""
_UNFINISHED = re.compile(r"\.(.+)\.[a-z0-9_]{8}(\.former)?")
"""Names that diffusion/storage/files.py gives to what it is writing, and flows/dvc_add.py to what it copies."""
BUT_BUSY = ", none while a run or stage is active"
Runs = Sequence[tuple[Path, Run]]


class Garbage(NamedTuple):
    """What takes space, and what of it goes."""

    parts: list[Part]
    runs: Runs
    """Those that go, with their workspaces."""
    stays: dict[str, str]
    """Names of the runs that the rule selects but that stay, and why."""
    deleted: list[Deleted]
    """The runs of MLflow that go."""

    @property
    def taken(self) -> int:
        return sum(part.space.taken for part in self.parts)

    @property
    def freed(self) -> int:
        return sum(part.space.freed for part in self.parts)


@contextmanager
def at_rest() -> Iterator[None]:
    """Keep runs from starting, and DVC from storing files in its cache, for the block; runs that are active go on."""
    runs = Paths().runs
    with suppress(OSError):  # on a full disk, on which no run can start, either
        runs.mkdir(parents=True, exist_ok=True)
    with workspace.exclusive(runs), cache.at_rest([*_folders(), *_unfinished_workspaces(busy=True)]):
        yield


def find(rule: Rule) -> Garbage:
    """Everything that takes space, and what goes by a rule.

    Raises:
        UserError: MLflow, git or a file cannot be read, so that it is not known what is needed.
    """
    paths = Paths()
    active = {directory for directory in _folders() if workspace.in_use(directory)}  # first: one that ends now is kept
    busy = bool(active) or cache.runs_stage()
    every = workspace.all_runs()
    versions = mlflow_garbage.named(paths)
    selected = rule.selects((each, _ended(each[1])) for each in every)
    needed = _needed(every, active, versions) if selected else {}
    going = [(directory, run) for directory, run in selected if directory.name not in needed]
    folders, gone = _folders(), {directory for directory, _ in going}
    kept = [directory for directory in folders if directory not in gone]
    deleted, hidden = mlflow_garbage.deleted(paths, rule.older_than)
    files = [folder for run in deleted for folder in run.folders]
    left = _leftovers(paths, kept, busy)
    parts = [
        _cache([*kept, *_unfinished_workspaces(busy=True)], versions),
        Part("runs", folders, gone, f"{len(gone)} of {len(folders)}: {rule}"),
        _checkpoints(paths, rule, busy),
        _features(paths, rule, busy),
        Part(
            "MLflow",
            [paths.mlflow_database, paths.mlflow_artifacts.resolve()],
            files,
            f"{len(deleted)} of {counted(hidden, 'run')} deleted there",
        ),
        left,
    ]
    elsewhere = {
        paths.runs,
        paths.mlflow_artifacts,
        paths.state / "dvc",
        *(root for part in parts for root in part.roots),
    }
    rest = [entry for entry in _entries(paths.state) if entry not in elsewhere]
    parts.append(Part("other", rest, (), "Prefect, logs, contact sheets of imports"))
    measure(parts)
    stays = {directory.name: needed[directory.name] for directory, _ in selected if directory.name in needed}
    return Garbage(parts, going, stays, deleted)


def delete(garbage: Garbage) -> None:
    """Delete what goes, inside `at_rest`; what has come into use since it was found stays."""
    paths = Paths()
    parts = {part.name: part.going for part in garbage.parts}
    _remove(path for path in parts["leftovers"] if path.parent != paths.runs)
    for directory, run in garbage.runs:
        workspace.remove(directory, run)
    workspace.remove_remains(paths.runs)
    for directory in parts["checkpoints"]:
        with suppress(Timeout), lock_of(directory).acquire(timeout=0):
            _remove([directory])
    _remove(parts["features"])
    _remove(parts["DVC cache"])
    if garbage.deleted:
        mlflow_garbage.delete(paths, garbage.deleted)


def _needed(every: Runs, active: Collection[Path], versions: Sequence[Named]) -> dict[str, str]:
    """The names of the runs that never go, and why: active ones, those of named models, and teachers of such runs."""
    found = {directory.name: "active" for directory, _ in every if directory in active}
    digests = {directory: _sampler(directory, run) for directory, run in every if versions}
    for version in versions:
        for directory, run in every:
            if run.flow_run_id in version.flow_runs or version.onnx in digests[directory]:
                found.setdefault(directory.name, version.name)
    teachers = {directory.name: run.teacher for directory, run in every if run.teacher}
    for name in list(found):
        if name in teachers:
            found.setdefault(teachers[name], f"teacher of {name}")
    return found


def _sampler(directory: Path, run: Run) -> list[str]:
    """The digest of the sampler that a run exported, if it did."""
    sampler = Paths(directory, student=bool(run.teacher)).sampler
    return [sha256(sampler)] if sampler.exists() else []


def _cache(kept: Iterable[Path], versions: Iterable[Named]) -> Part:
    folder = cache.folder()
    if folder is None:
        return Part("DVC cache", (), (), "outside of the repository, maybe used by others: see `dvc gc --projects`")
    unused = cache.unused(folder, kept, (lock for version in versions for lock in version.locks))
    return Part(
        "DVC cache",
        [folder],
        unused,
        f"{len(unused)} of {counted(cache.count(folder), 'file')}: not used by a commit, a run or this folder",
    )


def _checkpoints(paths: Paths, rule: Rule, busy: bool) -> Part:
    """Those of interrupted trainings; an active run may be about to resume one."""
    found = [path for path in _entries(paths.checkpoints) if path.is_dir()]
    free = [] if busy else rule.selects((path, _time(path)) for path in found)
    going = [path for path in free if not _locked(lock_of(path))]
    words = f"{len(going)} of {counted(len(found), 'interrupted training')}"
    return Part("checkpoints", [paths.checkpoints], going, f"{words}{BUT_BUSY if busy else ''}")


def _features(paths: Paths, rule: Rule, busy: bool) -> Part:
    """The features that `evaluate` has trained; only their age counts."""
    found = _entries(paths.features)
    going = [] if busy else rule._replace(keep=None).selects((p, _time(p)) for p in found)
    words = f"{len(going)} of {counted(len(found), 'file')} for comparing images"
    return Part("features", [paths.features], going, f"{words}{BUT_BUSY if busy else ''}")


def _leftovers(paths: Paths, kept: Sequence[Path], busy: bool) -> Part:
    """What killed commands left, and DVC's databases of workspaces that are gone."""
    parts = _unfinished_workspaces(busy=False)
    outputs = (paths.shards.parent, paths.raw, paths.imported, paths.model.parent, paths.data_report.parent)
    unfinished = [path for folder in outputs for path in _entries(folder) if _is_unfinished(path, paths)]
    downloads = list(paths.state.glob(".remote.*"))
    still = [] if busy else [path for path in (*unfinished, *downloads) if _age(path) > SECONDS_TO_LEFTOVER]
    first = min((_created(directory) for directory in kept), default=time.time())
    databases = _entries(paths.state / "dvc" / "repo")
    stale = [path for path in databases if time.time() - _age(path) < first]
    found, going = [*parts, *unfinished, *downloads, *databases], [*parts, *still, *stale]
    words = f"{len(going)} of {len(found)}: from killed commands, and from DVC in workspaces that are gone"
    return Part("leftovers", found, going, words)


def _folders() -> list[Path]:
    """All workspaces, damaged ones, too."""
    return sorted(file.parent for file in Paths().runs.glob("[!.]*/run.json"))


def _unfinished_workspaces(busy: bool) -> list[Path]:
    """Those that a process is making, such as `ddpm fetch`; or those of processes that were killed."""
    found = Paths().runs.glob(".*.part")
    return sorted(path for path in found if workspace.in_use(path.with_name(path.name[1:-5])) is busy)


def _is_unfinished(path: Path, paths: Paths) -> bool:
    """Whether a file or folder beside inputs and outputs is unfinished, and not a hidden one of the user."""
    if (found := _UNFINISHED.fullmatch(path.name)) is None:
        return False
    if path.parent in (paths.raw, paths.imported):
        return path.is_dir() and {each.name for each in _entries(path)} <= {found[1], "former"}
    ours = {paths.shards.name, paths.pairs.name, paths.licenses.name}
    return path.parent != paths.shards.parent or found[1] in ours


def _ended(run: Run) -> datetime:
    return datetime.fromisoformat(run.ended or run.created)


def _created(directory: Path) -> float:
    """When a workspace was created, in seconds since the epoch; 0 if that is not known."""
    try:
        return datetime.fromisoformat(Run.read(directory).created).timestamp()
    except UserError:
        return 0.0


def _entries(folder: Path) -> list[Path]:
    return sorted(folder.iterdir()) if folder.is_dir() else []


def _time(path: Path) -> datetime:
    return datetime.fromtimestamp(path.stat().st_mtime, UTC)


def _age(path: Path) -> float:
    """Seconds since a file, or anything in a folder, was changed."""
    times = [0.0]
    for each in (path, *path.rglob("*")):
        with suppress(FileNotFoundError):
            times.append(each.lstat().st_mtime)
    return time.time() - max(times)


def _locked(lock: FileLock) -> bool:
    try:
        with lock.acquire(timeout=0):
            return False
    except Timeout:
        return True


def _remove(paths: Iterable[Path]) -> None:
    for path in paths:
        with suppress(FileNotFoundError):
            dvc_add.remove(path)
