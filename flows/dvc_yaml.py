"""What dvc.yaml says of the stages: which parameters and which code shape their outputs."""

from functools import cache
from pathlib import Path
from typing import Any

from flows.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
"""Where dvc.yaml and both packages are."""


def parameters(stage: str) -> tuple[str, ...]:
    """The parameters of a stage: sections (`train`) or fields (`seed`, `sample.guidance`)."""
    return tuple(_stages()[stage]["params"])


def code(stage: str) -> list[Path]:
    """The files of our own code that a stage depends on, below `ROOT`."""
    listed = [ROOT / part for part in dependencies(stage)]
    return sorted(file for part in listed for file in [part, *part.rglob("*.py")] if file.is_file())


def dependencies(stage: str) -> list[str]:
    """The files and folders of our own code that are listed for a stage."""
    return [dep for dep in _stages()[stage]["deps"] if dep.startswith(("diffusion/", "flows/"))]


@cache
def _stages() -> dict[str, Any]:
    stages: dict[str, Any] = read_yaml(ROOT / "dvc.yaml")["stages"]
    return stages
