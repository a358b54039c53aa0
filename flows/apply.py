"""Bring a run's parameters, lock files of DVC and outputs into the working tree."""

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from diffusion.storage.files import write_atomic
from diffusion.upgrade import from_earlier
from flows import dvc_lock, dvc_yaml, workspace, yaml_files
from flows.paths import Paths

DISTILLATION = str(Path(dvc_yaml.DISTILLATION).with_name(dvc_lock.FILE))
"""The lock file of the distillation."""


def apply(run: str, force: bool) -> None:
    """Apply a run to the working tree, like `dvc exp apply`; with a distillation, its teacher is applied too.

    If the code is the same as in the run, `dvc repro` has nothing to do afterwards.

    Args:
        run: name of a flow run, or a unique prefix of it.
        force: whether to overwrite uncommitted changes.
    Raises:
        UserError: the run does not exist or is not completed, changes would be lost, or outputs are in neither the DVC
            cache nor the folder of the run. The working tree is then unchanged, except for outputs that `force` let
            DVC overwrite and that are not in its cache.
    """
    source = workspace.find(run)
    ran = workspace.Run.read(source)
    state = workspace.state_of(source, ran)
    if state != "completed":
        raise UserError(f"run {source.name!r}: {state}; only completed runs can be applied (see `ddpm runs`)")
    locks = [dvc_lock.FILE, *([DISTILLATION] if ran.teacher else [])]
    new = {"params.yaml": _parameters(source)} | {lock: (source / lock).read_bytes() for lock in locks}
    old = {name: Path(name).read_bytes() if Path(name).exists() else None for name in new}
    modified = [name for name in new if old[name] not in (None, new[name], _committed(name))]
    if modified and not force:
        raise UserError(
            f"{' and '.join(modified)}: uncommitted changes would be lost; commit them, or use --force to discard them"
        )
    ignore = Path(".dvcignore")
    if ran.teacher and ignore.exists() and (on := dvc_yaml.turn_on_distillation(ignore)) != ignore.read_bytes():
        new[ignore.name], old[ignore.name] = on, ignore.read_bytes()
    stages = {name: stage for lock in locks for name, stage in dvc_lock.stages(source / lock, new[lock]).items()}
    raw = [file for file in _raw_data(source) if not file.exists()]
    made = {*dvc_lock.outputs(stages), *(file.with_suffix("") for file in raw)}
    absent = [path for path in made if not path.exists()]
    earlier = [path for lock in locks for path in dvc_lock.outputs(dvc_lock.stages(Path(lock), old[lock]))]
    kept = [path for path in earlier if path.exists()]
    _save_to_cache(source)
    try:
        for name, content in new.items():
            write_atomic(Path(name), content)
        for file in raw:
            write_atomic(file, (source / file).read_bytes())
        workspace.dvc(
            Path(), "checkout", *(["--force"] if force else []), *map(str, raw), *map(dvc_yaml.target, stages)
        )
    except BaseException:
        for name, previous in old.items():
            write_atomic(Path(name), previous) if previous is not None else Path(name).unlink(missing_ok=True)
        for file in raw:
            file.unlink(missing_ok=True)
        for path in absent:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        for path in kept:
            with suppress(UserError):  # outputs that are not in the cache were not overwritten
                workspace.dvc(Path(), "checkout", str(path))
        raise
    print(f"Applied run {source.name}: {', '.join(new)} and the outputs of {', '.join(stages)}")
    if changed := _changed_inputs(source, stages):
        print(
            f"warning: differs from the run: {', '.join(changed)}; `dvc repro` will rerun the stages that use it",
            file=sys.stderr,
        )


def _parameters(source: Path) -> bytes:
    """A run's params.yaml, converted to the current format, and with the field that dvc.yaml needs."""
    path = source / "params.yaml"
    document = yaml_files.read_yaml(path)
    old, train = bool(from_earlier(document)), document.get("train")
    if isinstance(train, dict) and "start_from" not in train:
        train["start_from"], old = "", True
    return yaml_files.content(document) if old else path.read_bytes()


def _save_to_cache(source: Path) -> None:
    """Restore cache entries that `dvc gc` has removed from the run's files, provided these still match its dvc.lock."""
    from dvc.exceptions import DvcException
    from dvc.repo import Repo, lock_repo

    try:
        with Repo(str(source)) as repo, lock_repo(repo):
            for out in repo.index.outs:
                if out.hash_info and out.changed_cache() and not out.workspace_status():
                    out.commit()
    except DvcException as error:
        raise UserError(f"{source}: {' '.join(str(error).split())}") from None


def _committed(name: str) -> bytes | None:
    """Content of a file in the last commit; None if it is not there."""
    try:
        return workspace.git("show", f"HEAD:./{name}").encode()
    except UserError:
        return None


def _raw_data(source: Path) -> list[Path]:
    """Paths of the .dvc files of a run's raw data, and of the models to start from."""
    paths = Paths(source)
    return sorted(file.relative_to(source) for folder in (paths.raw, paths.imported) for file in folder.glob("*.dvc"))


def _changed_inputs(source: Path, stages: dict[str, Any]) -> list[str]:
    """Code and raw data that differ between the run and the working tree; outputs of stages are ignored."""
    inputs = {Path(dep["path"]) for stage in stages.values() for dep in stage.get("deps", [])} - {
        *dvc_lock.outputs(stages)
    }
    files = {*map(Path, map(dvc_yaml.file_of, stages)), *_raw_data(source)}
    for name in inputs:
        for root in (Path(), source):
            entry = root / name
            found = [entry] if entry.is_file() else entry.rglob("*.py")
            files |= {file.relative_to(root) for file in found}
    return sorted(str(name) for name in files if _content(name) != _content(source / name))


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
