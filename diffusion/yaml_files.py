"""YAML files that keep their comments when they are changed."""

from io import BytesIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from diffusion.errors import UserError
from diffusion.files import write_atomic


def overlay(base: Any, changes: Any) -> Any:
    """`changes` laid over `base`: mappings are merged key by key, in place; anything else is replaced."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    for key, value in changes.items():
        base[key] = overlay(base.get(key), value)
    return base


def read_yaml(path: Path) -> Any:
    """A YAML file as round-trip data: written again, it keeps its comments.

    Raises UserError if the file is missing, no YAML, or not a mapping.
    """
    try:
        document = _yaml().load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected sections with fields, found {type(document).__name__}")
    return document


def write_yaml(path: Path, document: Any) -> None:
    """Write what `read_yaml` gave, changed or not."""
    buffer = BytesIO()
    _yaml().dump(document, buffer)
    write_atomic(path, buffer.getvalue())


def _yaml() -> YAML:
    yaml = YAML(typ="rt", pure=True)
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml
