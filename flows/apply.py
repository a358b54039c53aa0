"""A run's parameters, dvc.lock and outputs, brought into the working tree."""

import sys
from pathlib import Path
from typing import Any

from diffusion import params
from diffusion.errors import UserError
from diffusion.files import write_atomic
from diffusion.paths import Paths
from flows import workspace

FILES = ("params.yaml", "dvc.lock")


def apply(run: str, force: bool) -> None:
    """Do as `dvc exp apply` would; afterwards `dvc repro` has nothing to run.

    Args:
        run: name of a flow run, or a beginning of it.
        force: whether to overwrite what is not committed.
    Raises:
        UserError: no such run, it has no results, or changes would be lost. The working tree is then as it was.
    """
    source = workspace.find(run)
    if not (source / "dvc.lock").exists():
        raise UserError(f"run {source.name!r}: no stage of it has finished")
    new = {name: (source / name).read_bytes() for name in FILES}
    old = {name: Path(name).read_bytes() if Path(name).exists() else None for name in FILES}
    lost = [name for name in FILES if old[name] not in (None, new[name], _committed(name))]
    if lost and not force:
        raise UserError(
            f"{' and '.join(lost)}: changes that are not committed would be lost; commit them, or repeat with --force"
        )
    for name, content in new.items():
        write_atomic(Path(name), content)
    try:
        stages = params.read_yaml(source / "dvc.lock")["stages"]
        workspace.dvc(Path(), "checkout", *(["--force"] if force else []), *_missing_raw_data(source), *stages)
    except BaseException:
        for name, previous in old.items():
            write_atomic(Path(name), previous) if previous is not None else Path(name).unlink()
        raise
    print(f"params.yaml, dvc.lock and the outputs of {', '.join(stages)} are now those of the run {source.name}")
    if changed := _changed_code(source, stages):
        print(
            f"warning: {', '.join(changed)} differ from the run's: `dvc repro` will run the stages that use them",
            file=sys.stderr,
        )


def _committed(name: str) -> bytes | None:
    """A file as the last commit has it."""
    try:
        return workspace.git("show", f"HEAD:./{name}").encode()
    except UserError:
        return None


def _missing_raw_data(source: Path) -> list[str]:
    """Bring the .dvc files of raw data that the working tree lacks, and name them."""
    brought = []
    for file in sorted(Paths(source).raw.glob("*.dvc")):
        target = file.relative_to(source)
        if not target.exists():
            write_atomic(target, file.read_bytes())
            brought.append(str(target))
    return brought


def _changed_code(source: Path, stages: dict[str, Any]) -> list[str]:
    """What the run's stages depend on, outputs of stages aside, that is different in the working tree."""
    outputs = {out["path"] for stage in stages.values() for out in stage.get("outs", [])}
    inputs = {dep["path"] for stage in stages.values() for dep in stage.get("deps", [])} - outputs
    files = {"dvc.yaml"}
    for name in inputs:
        for root in (Path(), source):
            entry = root / name
            found = [entry] if entry.is_file() else entry.rglob("*.py")
            files |= {str(file.relative_to(root)) for file in found}
    return sorted(name for name in files if _content(Path(name)) != _content(source / name))


def _content(path: Path) -> bytes | None:
    return path.read_bytes() if path.exists() else None
