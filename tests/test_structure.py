"""The architecture, as far as it can be checked: who may import whom, and what a stage depends on."""

import ast
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from diffusion import made_with
from diffusion.stages import train

ROOT = Path(__file__).parents[1]
MODULES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for package in ("diffusion", "flows")
    for path in (ROOT / package).rglob("*.py")
}
DVC: dict[str, Any] = YAML(typ="safe").load(ROOT / "dvc.yaml")

# Lower layers first: a module imports from its own layer or from lower ones.
LAYERS = [
    {
        "dvc_output",
        "environment",
        "errors",
        "files",
        "made_with",
        "params",
        "paths",
        "presets",
        "progress",
        "rules",
        "sections",
        "watch",
        "yaml_files",
    },
    {"process", "nn"},
    {"data"},
    {"model"},
    {"training", "evaluation", "export", "tracking"},
    {"stages", "commands", "exchange"},
    {"__main__"},
]
# Code that cannot change what a stage writes: values stand in params.yaml alone, and MLflow and progress only watch.
NOT_SHAPING = {"params", "rules", "sections", "paths", "environment", "errors", "progress", "tracking", "watch"}
NOT_SHAPING |= {"yaml_files"}


def imports(module: str) -> set[str]:
    """Full names of all that a module imports, wherever it does."""
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


def layer(module: str) -> int:
    part = module.split(".")[1]
    return next(index for index, parts in enumerate(LAYERS) if part in parts)


def importers_of(package: str) -> set[str]:
    return {module for module in MODULES if any(name.split(".")[0] == package for name in imports(module))}


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith("diffusion.")])
def test_imports_run_downwards(module: str) -> None:
    if module == "diffusion.__init__":
        assert not ours(module)
        return
    for name in ours(module):
        if name.startswith("flows"):
            assert module == "diffusion.__main__"
        elif name != "diffusion.__init__":
            assert layer(name) <= layer(module), f"{module} imports {name}"


def test_the_mathematics_knows_no_files() -> None:
    for module in MODULES:
        if module.startswith("diffusion.process."):
            assert not {"pathlib", "io", "os"} & imports(module), module


def test_mlflow_prefect_and_dvc_each_have_one_place() -> None:
    assert {module.split(".")[1] for module in importers_of("mlflow")} == {"tracking"}
    assert {module.split(".")[0] for module in importers_of("prefect")} == {"flows"}
    assert {module.split(".")[0] for module in importers_of("dvc")} == {"flows"}
    stages = {name for module in MODULES if module.startswith("flows.") for name in ours(module) if ".stages." in name}
    assert stages == set()


def test_nothing_unpickles() -> None:
    for module, path in MODULES.items():
        assert not {"pickle", "cloudpickle", "dill", "joblib"} & imports(module), module
        text = path.read_text(encoding="utf-8")
        assert "torch.load(" not in text, module
        assert "allow_pickle=True" not in text, module


def test_files_are_short() -> None:
    long = {str(path) for path in ROOT.glob("*/**/*.py") if ".venv" not in path.parts and _lines(path) > 350}
    assert long == set()


def _lines(path: Path) -> int:
    return len(path.read_text(encoding="utf-8").splitlines())


@pytest.mark.parametrize("stage", DVC["stages"])
def test_a_stage_records_the_parameters_that_it_depends_on(stage: str) -> None:
    assert set(made_with.PARAMETERS[stage]) == set(DVC["stages"][stage]["params"])
    assert f"reports/made_with/{stage}.json" in DVC["stages"][stage]["outs"]


@pytest.mark.parametrize("stage", DVC["stages"])
def test_a_stage_depends_on_the_code_that_it_imports(stage: str) -> None:
    needed, waiting = set[str](), [f"diffusion.stages.{stage}"]
    while waiting:
        module = waiting.pop()
        if module not in needed and module.split(".")[1] not in NOT_SHAPING:
            needed.add(module)
            waiting += ours(module)
    # A package's __init__ is empty, or what it imports is followed.
    files = {MODULES[module].relative_to(ROOT) for module in needed if MODULES[module].stat().st_size}
    code = [Path(dep) for dep in DVC["stages"][stage]["deps"] if str(dep).startswith("diffusion/")]
    missing = {str(file) for file in files if not any(file.is_relative_to(dep) for dep in code)}
    assert missing == set()
    superfluous = {str(dep) for dep in code if not any(file.is_relative_to(dep) for file in files)}
    assert superfluous == set()


def test_the_checkpoints_fingerprint_covers_the_code_that_training_depends_on() -> None:
    code = {str(dep) for dep in DVC["stages"]["train"]["deps"] if str(dep).startswith("diffusion/")}
    assert {f"diffusion/{part}" for part in train.CODE} == code
