"""The stages and outputs that a lock file of DVC records, and sharing them between folders."""

import os
import shutil
from pathlib import Path
from typing import Any

from ruamel import yaml
from ruamel.yaml.error import YAMLError

from diffusion.errors import UserError
from flows import dvc_yaml

FILE = "dvc.lock"


def stages(path: Path, content: bytes | None) -> dict[str, Any]:
    """The stages in the content of a lock file, none for None; raises UserError naming `path` if it is damaged."""
    try:
        return dict(yaml.YAML(typ="safe").load(content)["stages"]) if content else {}
    except (YAMLError, ValueError, TypeError, KeyError):
        raise UserError(f"{path}: not a valid DVC lock file; restore or delete it") from None


def outputs(stages: dict[str, Any]) -> list[Path]:
    """The paths of all outputs, relative to the root."""
    return [Path(out["path"]) for stage in stages.values() for out in stage.get("outs", [])]


def outputs_of(root: Path) -> list[Path]:
    """The outputs that the dvc.lock in a folder records, relative to it."""
    file = root / FILE
    return outputs(stages(file, file.read_bytes() if file.exists() else None))


def link_teacher(source: Path, target: Path) -> None:
    """Put a teacher's dvc.lock, and all outputs that it records, into the workspace of a distillation, and turn it on.

    Files are linked: nothing writes outputs in place.
    """
    for path in outputs_of(source):
        (target / path).parent.mkdir(parents=True, exist_ok=True)
        if (source / path).is_dir():
            shutil.copytree(source / path, target / path, symlinks=True, copy_function=_link)
        else:
            _link(source / path, target / path)
    shutil.copy2(source / FILE, target / FILE)  # DVC writes it in place
    (target / ".dvcignore").write_bytes(dvc_yaml.turn_on_distillation(target / ".dvcignore"))


def _link(source: str | Path, target: str | Path) -> None:
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:  # on another file system, or one without hard links
        shutil.copy2(source, target, follow_symlinks=False)
