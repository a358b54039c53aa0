"""The parameters and code that each stage depends on, according to dvc.yaml and distill/dvc.yaml."""

from functools import cache
from pathlib import Path
from typing import Any

from flows.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
"""The folder of dvc.yaml and both packages."""
DVC_YAML, DISTILLATION = "dvc.yaml", "distill/dvc.yaml"
IGNORED = b"/distill\n"
"""The line of .dvcignore that turns the distillation off for DVC's commands."""


def turn_on_distillation(ignore: Path) -> bytes:
    """The content of a .dvcignore without IGNORED; empty if there is no such file."""
    return ignore.read_bytes().replace(IGNORED, b"") if ignore.exists() else b""


def parameters(stage: str) -> tuple[str, ...]:
    """The parameters of a stage: sections (`train`) or fields (`seed`, `sample.guidance`)."""
    return tuple(_stages()[stage]["params"])


def file_of(stage: str) -> str:
    """The file that describes a stage."""
    return DVC_YAML if stage in read_yaml(ROOT / DVC_YAML)["stages"] else DISTILLATION


def target(stage: str) -> str:
    """A stage's name for DVC's commands."""
    return stage if file_of(stage) == DVC_YAML else f"{DISTILLATION}:{stage}"


def repro(student: bool) -> str:
    """The command that brings all results up to date, or with `student` those of the distillation."""
    return f"dvc repro {DISTILLATION}" if student else "dvc repro"


def code(stage: str) -> list[Path]:
    """The source files of this project that a stage depends on, below `ROOT`."""
    listed = [ROOT / part for part in dependencies(stage)]
    return sorted(file for part in listed for file in [part, *part.rglob("*.py")] if file.is_file())


def dependencies(stage: str) -> list[str]:
    """The source files and folders of this project listed as dependencies of a stage."""
    return [dep for dep in _stages()[stage]["deps"] if dep.startswith(("diffusion/", "flows/"))]


@cache
def _stages() -> dict[str, Any]:
    stages: dict[str, Any] = {}
    for file in (DVC_YAML, DISTILLATION):
        stages |= read_yaml(ROOT / file)["stages"]
    return stages
