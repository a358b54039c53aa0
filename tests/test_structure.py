"""Dependencies of the stages, and rules for all code. Import rules are checked by import-linter (`make lint`)."""

import ast
from pathlib import Path

import pytest

from flows import dvc_yaml
from flows.stages import STAGES, STUDENT_STAGES
from flows.yaml_files import read_yaml

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in ("diffusion", "flows")
    for path in (ROOT / package).rglob("*.py")
}
NOT_SHAPING = (
    "diffusion.__init__",
    "diffusion.errors",
    "diffusion.progress",
    "diffusion.sections",
    "diffusion.upgrade",
    "flows.dvc_yaml",
    "flows.environment",
    "flows.fingerprint",
    "flows.launching",
    "flows.nodes",
    "flows.origin",
    "flows.params",
    "flows.parent",
    "flows.paths",
    "flows.rules",
    "flows.tracking",
    "flows.workers",
)
"""Code that cannot change what a stage writes: all values are in params.yaml, and the rest checks, passes on
or monitors them."""

DRAWING = ("diffusion.sampling", "diffusion.samples", "diffusion.evaluation.live")
"""Code that samples previews, and measures their quality. Previews may come from an earlier version of it; the
weights do not depend on it."""


def imports(module: str) -> set[str]:
    """Full names of all imports of a module, at any level."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def ours(module: str) -> set[str]:
    """The project's modules among a module's imports."""
    return {name for name in imports(module) if name in MODULES} | {
        f"{name}.__init__" for name in imports(module) if f"{name}.__init__" in MODULES
    }


def test_nothing_unpickles() -> None:
    for module, path in MODULES.items():
        assert not {"pickle", "cloudpickle", "dill", "joblib"} & imports(module), module
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text, module
        assert "allow_pickle=True" not in text, module


def test_files_are_short() -> None:
    long = {str(path) for path in _python_files() if _lines(path) > 350}
    assert long == set()


def _python_files() -> list[Path]:
    return [
        path
        for folder in ("benchmarks", "deploy", "diffusion", "flows", "tests")
        for path in (ROOT / folder).rglob("*.py")
    ]


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("stage", [*STAGES, *STUDENT_STAGES])
def test_a_stage_depends_on_the_code_that_it_imports(stage: str) -> None:
    needed, waiting = set[str](), [f"flows.stages.{stage.replace('-', '_')}"]
    drawing = {"train": DRAWING, "distill": ("diffusion.evaluation.live",)}  # students are trained by sampling steps
    left_out = (*NOT_SHAPING, *drawing.get(stage, ()))
    while waiting:
        module = waiting.pop()
        if module not in needed and not module.startswith(left_out):
            needed.add(module)
            waiting += ours(module)
    # A package's __init__ is empty, or what it imports is followed.
    files = {MODULES[module].relative_to(ROOT) for module in needed if MODULES[module].stat().st_size}
    listed = {file.relative_to(ROOT) for file in dvc_yaml.code(stage) if file.stat().st_size}
    assert files - listed == set()
    parts = {Path(dep) for dep in dvc_yaml.dependencies(stage)}
    assert {part for part in parts if not any(file.is_relative_to(part) for file in files)} == set()


def test_a_new_sampler_does_not_retrain() -> None:
    sampler = ROOT / "diffusion" / "sampling" / "sampler.py"
    depending = [stage for stage in STAGES if sampler in dvc_yaml.code(stage)]
    assert depending == ["evaluate", "export"]


@pytest.mark.parametrize("stage", [*STAGES, *STUDENT_STAGES])
def test_a_stage_records_what_it_was_made_with(stage: str) -> None:
    described = read_yaml(ROOT / dvc_yaml.file_of(stage))["stages"][stage]
    assert f"reports/made_with/{stage}.json" in described["outs"]
