"""Presets: parameters for a kind of data, as files that hold what differs from the defaults, `presets/digits.yaml`."""

from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from flows.params import Params, validate
from flows.yaml_files import overlay, read_yaml

DEFAULT = "digits"
"""The preset that holds every parameter."""
OWN = ("seed", "device", "tracking")
"""What no preset changes."""


def names(directory: Path) -> list[str]:
    """Names of the presets in a directory."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def load(path: Path) -> Params:
    """The parameters of a preset's file, with the defaults for the rest."""
    return validate(overlay(read_yaml(path.parent / f"{DEFAULT}.yaml"), _differences(path)), str(path))


def laid_over(document: Any, directory: Path, name: str) -> Any:
    """The parameters `document` with those of preset `name` in their place, and the defaults where it says nothing.

    What is the user's own stays: `OWN`, and `shard.source` where the preset names none.
    Raises UserError listing the presets there are, or naming what no preset changes.
    """
    known = names(directory)
    if name not in known:
        raise UserError(f"preset {name!r}: no such preset; there are {', '.join(known)} (in {directory}/)")
    defaults, preset = read_yaml(directory / f"{DEFAULT}.yaml"), _differences(directory / f"{name}.yaml")
    for own in OWN:
        del defaults[own]
    if name != DEFAULT and "source" not in preset.get("shard", {}):
        del defaults["shard"]["source"]
    return overlay(document, overlay(defaults, preset))


def _differences(path: Path) -> Any:
    """What a preset's file changes."""
    preset = read_yaml(path)
    if path.stem == DEFAULT:
        return {}
    if own := [name for name in OWN if name in preset]:
        raise UserError(f"{path}: {', '.join(own)}: no preset changes that; set it in params.yaml")
    return preset
