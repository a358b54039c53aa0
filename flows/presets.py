"""Presets: parameters for a kind of data, as files that hold what differs from the defaults."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.errors import UserError
from flows.yaml_files import read_yaml

if TYPE_CHECKING:
    from flows.params import Params

NOT_IN_PRESETS = ("seed", "device", "tracking")
"""What no preset changes."""


def names(directory: Path) -> list[str]:
    """Names of the presets in a directory."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def load(path: Path) -> "Params":
    """The parameters of a preset's file, with the defaults for the rest."""
    from flows.changes import lay_over
    from flows.params import validate

    return validate(lay_over(_defaults(), _differences(path)), str(path))


def laid_over(document: Any, directory: Path, name: str) -> Any:
    """The parameters `document` with those of preset `name` in their place, and the defaults where it says nothing.

    What is the user's own stays: `NOT_IN_PRESETS`, and `shard.source` where the preset names none.
    Raises UserError listing the presets there are, or naming what no preset changes.
    """
    from flows.changes import lay_over

    known = names(directory)
    if name not in known:
        raise UserError(f"preset {name!r}: no such preset; there are {', '.join(known)} (in {directory}/)")
    preset = _differences(directory / f"{name}.yaml")
    defaults = {key: value for key, value in _defaults().items() if key not in NOT_IN_PRESETS}
    if "source" not in preset.get("shard", {}):
        del defaults["shard"]["source"]
    return lay_over(document, lay_over(defaults, preset))


def _defaults() -> dict[str, Any]:
    from flows.params import Params  # imports torch, which those who only list the names need not wait for

    return Params().model_dump(mode="json")


def _differences(path: Path) -> Any:
    """What a preset's file changes."""
    preset = read_yaml(path)
    if own := [name for name in NOT_IN_PRESETS if name in preset]:
        raise UserError(f"{path}: {', '.join(own)}: no preset changes that; set it in params.yaml")
    if wrong := [name for name, fields in preset.items() if not isinstance(fields, dict)]:
        raise UserError(f"{path}: {', '.join(wrong)}: must be a section with fields")
    return preset
