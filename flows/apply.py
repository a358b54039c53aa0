"""A run's parameters, dvc.lock and outputs, brought into the working tree."""

import shutil
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

from ruamel import yaml
from ruamel.yaml.error import YAMLError

from diffusion.errors import UserError
from diffusion.storage.files import write_atomic
from diffusion.upgrade import from_format_1
from flows import workspace, yaml_files
from flows.paths import Paths

FILES = ("params.yaml", "dvc.lock")


def apply(run: str, force: bool) -> None:
    """Do as `dvc exp apply` would; afterwards `dvc repro` has nothing to run, if the code is that of the run.

    Args:
        run: name of a flow run, or a unique prefix of it.
        force: whether to overwrite what is not committed.
    Raises:
        UserError: no such run, it is not completed, changes would be lost, or outputs are neither in the DVC cache nor
            in the run's folder. The working tree is then as it was, except for outputs that --force let DVC overwrite
            and its cache lacks.
    """
    source = workspace.find(run)
    state = workspace.state_of(source, workspace.Run.read(source))
    if state != "completed":
        raise UserError(f"run {source.name!r}: {state}; only a completed run can be applied")
    new = {"params.yaml": _parameters(source), "dvc.lock": (source / "dvc.lock").read_bytes()}
    old = {name: Path(name).read_bytes() if Path(name).exists() else None for name in FILES}
    lost = [name for name in FILES if old[name] not in (None, new[name], _committed(name))]
    if lost and not force:
        raise UserError(
            f"{' and '.join(lost)}: changes that are not committed would be lost; commit them, or repeat with --force"
        )
    stages = _stages(source / "dvc.lock", new["dvc.lock"])
    raw = [file for file in _raw_data(source) if not file.exists()]
    made = {*_outputs(stages), *(file.with_suffix("") for file in raw)}
    absent = [path for path in made if not path.exists()]
    kept = [path for path in _outputs(_stages(Path("dvc.lock"), old["dvc.lock"])) if path.exists()]
    _save_to_cache(source)
    try:
        for name, content in new.items():
            write_atomic(Path(name), content)
        for file in raw:
            write_atomic(file, (source / file).read_bytes())
        workspace.dvc(Path(), "checkout", *(["--force"] if force else []), *map(str, raw), *stages)
    except BaseException:
        for name, previous in old.items():
            write_atomic(Path(name), previous) if previous is not None else Path(name).unlink(missing_ok=True)
        for file in raw:
            file.unlink(missing_ok=True)
        for path in absent:
            shutil.rmtree(path) if path.is_dir() and not path.is_symlink() else path.unlink(missing_ok=True)
        for path in kept:
            with suppress(UserError):  # what is in no cache was not overwritten
                workspace.dvc(Path(), "checkout", str(path))
        raise
    print(f"params.yaml, dvc.lock and the outputs of {', '.join(stages)} are now those of the run {source.name}")
    if changed := _changed_inputs(source, stages):
        print(
            f"warning: {', '.join(changed)} differ from the run's: `dvc repro` will run the stages that use them",
            file=sys.stderr,
        )


def _parameters(source: Path) -> bytes:
    """A run's params.yaml, in the form of this version."""
    path = source / "params.yaml"
    document = yaml_files.read_yaml(path)
    return yaml_files.content(document) if from_format_1(document) else path.read_bytes()


def _save_to_cache(source: Path) -> None:
    """Put a run's files back into the DVC cache where `dvc gc` has removed them, if they are as its dvc.lock says."""
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
    """A file as the last commit has it."""
    try:
        return workspace.git("show", f"HEAD:./{name}").encode()
    except UserError:
        return None


def _raw_data(source: Path) -> list[Path]:
    """The .dvc files of a run's raw data."""
    return sorted(file.relative_to(source) for file in Paths(source).raw.glob("*.dvc"))


def _stages(path: Path, lock: bytes | None) -> dict[str, Any]:
    """The stages in a dvc.lock, given its content; raises UserError that names it if it is damaged."""
    try:
        return dict(yaml.YAML(typ="safe").load(lock)["stages"]) if lock else {}
    except (YAMLError, ValueError, TypeError, KeyError):
        raise UserError(f"{path}: not a lock file of DVC; delete it or restore it") from None


def _outputs(stages: dict[str, Any]) -> list[Path]:
    return [Path(out["path"]) for stage in stages.values() for out in stage.get("outs", [])]


def _changed_inputs(source: Path, stages: dict[str, Any]) -> list[str]:
    """Code and raw data of the run, outputs of stages aside, that are different in the working tree."""
    inputs = {Path(dep["path"]) for stage in stages.values() for dep in stage.get("deps", [])} - {*_outputs(stages)}
    files = {Path("dvc.yaml"), *_raw_data(source)}
    for name in inputs:
        for root in (Path(), source):
            entry = root / name
            found = [entry] if entry.is_file() else entry.rglob("*.py")
            files |= {file.relative_to(root) for file in found}
    return sorted(str(name) for name in files if _content(name) != _content(source / name))


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
