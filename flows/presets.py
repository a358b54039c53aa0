"""Presets: parameters for a kind of data, as files to lay over params.yaml."""

from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from flows.yaml_files import overlay, read_yaml


def names(directory: Path) -> list[str]:
    """Names of the presets in a directory."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def laid_over(document: Any, directory: Path, name: str) -> Any:
    """The parameters `document` with preset `name` laid over it; raises UserError listing the presets there are."""
    known = names(directory)
    if name not in known:
        raise UserError(f"preset {name!r}: no such preset; there are {', '.join(known)} (in {directory}/)")
    return overlay(document, read_yaml(directory / f"{name}.yaml"))
