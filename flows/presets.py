"""Presets: parameters for a dataset, as files that list the differences from the defaults."""

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.errors import UserError
from flows.yaml_files import read_yaml

if TYPE_CHECKING:
    from flows.params import Params

NOT_IN_PRESETS = ("seed", "device", "tracking")
"""Sections and fields that presets cannot set."""


def names(directory: Path) -> list[str]:
    """Names of the presets in a directory."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def load(path: Path) -> "Params":
    """The parameters of a preset file, with defaults for the rest."""
    from flows.changes import lay_over
    from flows.params import validate

    return validate(lay_over(_defaults(), _differences(path)), str(path))


def laid_over(document: Any, directory: Path, name: str) -> Any:
    """Replace the parameters in `document` by those of preset `name`, and by the defaults where it sets nothing.

    The user's values of `NOT_IN_PRESETS` are kept, and so is `shard.source` if the preset does not set it.

    Raises:
        UserError: the preset does not exist, or sets a field that presets cannot set.
    """
    from flows.changes import lay_over

    known = names(directory)
    if name not in known:
        raise UserError(f"preset {name!r}: not found in {directory}/; available: {', '.join(known)}")
    preset = _differences(directory / f"{name}.yaml")
    defaults = {key: value for key, value in _defaults().items() if key not in NOT_IN_PRESETS}
    if "source" not in preset.get("shard", {}):
        del defaults["shard"]["source"]
    return lay_over(document, lay_over(defaults, preset))


def _defaults() -> dict[str, Any]:
    from flows.params import Params  # imports torch, which listing the names does not need

    return Params().model_dump(mode="json")


def _differences(path: Path) -> Any:
    """The content of a preset file."""
    preset = read_yaml(path)
    if own := [name for name in NOT_IN_PRESETS if name in preset]:
        raise UserError(f"{path}: {', '.join(own)}: presets cannot set this; set it in params.yaml")
    if wrong := [name for name, fields in preset.items() if not isinstance(fields, dict)]:
        raise UserError(f"{path}: {', '.join(wrong)}: must be a section with fields")
    return preset
