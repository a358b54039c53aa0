"""The files of deploy/team, by the validators of their formats; `python -m deploy.team.rehearse` runs them."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from deploy.team import stack

TEAM = Path(__file__).parents[2] / "deploy" / "team"
SERVICES: dict[str, Any] = YAML(typ="safe").load(TEAM / "compose.yaml")["services"]


def check(*command: str) -> str:
    """Run a validator; returns what it says."""
    program = Path(sys.executable).with_name(command[0])
    done = subprocess.run([str(program), *command[1:]], cwd=TEAM, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_images_follow_hadolints_rules() -> None:
    check("hadolint", "--failure-threshold", "info", *(file.name for file in TEAM.glob("*.Dockerfile")))


def test_compose_yaml_follows_its_schema() -> None:
    assert "validation done" in check("check-jsonschema", "--builtin-schema", "vendor.compose-spec", "compose.yaml")


def test_the_manifests_are_valid_for_kubernetes() -> None:
    files = [str(file) for file in TEAM.glob("kubernetes/*.yaml") if file.name != "kustomization.yaml"]
    assert len(files) >= 2
    check("kubernetes-validate", "--strict", *files)
    resources = YAML(typ="safe").load(TEAM / "kubernetes" / "kustomization.yaml")["resources"]
    assert sorted(resources) == sorted(Path(file).name for file in files)


def test_every_variable_is_in_the_example() -> None:
    text = (TEAM / "compose.yaml").read_text()
    used = set(re.findall(r"\$\{(\w+)", text))
    example = dict(re.findall(r"^(\w+)=(.*)$", (TEAM / "env.example").read_text(), re.MULTILINE))
    assert example.keys() == used
    assert sorted(name for name, value in example.items() if not value and "INDEX" not in name) == stack._asked()


def test_containers_have_few_rights_and_no_open_ports() -> None:
    """Only the proxy is reachable from other machines. Images of others keep their own users."""
    assert {name for name, service in SERVICES.items() if "ports" in service} == {"proxy"}
    for name, service in SERVICES.items():
        if str(service["image"]).startswith("ddpm-"):
            rights = [service[key] for key in ("read_only", "cap_drop", "security_opt")]
            assert rights == [True, ["ALL"], ["no-new-privileges:true"]], name
    for file in TEAM.glob("*.Dockerfile"):
        assert "\nUSER 10001\n" in file.read_text()


def test_read_only_containers_have_their_files_mounted() -> None:
    """Docker cannot write the content of `configs` into them."""
    for name, service in SERVICES.items():
        assert not (service.get("read_only") and "configs" in service), name


def test_kubernetes_runs_the_same_commands() -> None:
    """Of the service and of the worker with a GPU."""
    for file, service in (("service.yaml", "service"), ("workers.yaml", "worker-gpu")):
        manifest = next(iter(YAML(typ="safe").load_all((TEAM / "kubernetes" / file).read_text())))
        (container,) = manifest["spec"]["template"]["spec"]["containers"]
        assert container["command"] == SERVICES[service]["command"]
        assert container["image"] == SERVICES[service]["image"]


@pytest.mark.slow  # starts a process
def test_the_image_of_the_service_has_all_that_it_imports(tmp_path: Path, root: Path) -> None:
    copied = re.findall(r"^COPY (\S+) (\S+)$", (TEAM / "service.Dockerfile").read_text(), re.MULTILINE)
    assert copied == [("diffusion", "diffusion"), ("deploy/service", "deploy/service")]
    for source, target in copied:
        shutil.copytree(root / source, tmp_path / target)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    command = [sys.executable, "-P", "-c", IMPORTS]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    files = done.stdout.split()
    assert files
    assert all(Path(file).is_relative_to(tmp_path) for file in files)


IMPORTS = """
import os, sys
sys.path.insert(0, os.getcwd())
import deploy.service.__main__, deploy.service.app
ours = [module for name, module in sys.modules.items() if name.split(".")[0] in ("diffusion", "deploy", "flows")]
print(*(module.__file__ for module in ours if getattr(module, "__file__", None)))
"""


def test_addresses_are_those_of_this_machine(tmp_path: Path) -> None:
    team = stack.Team(tmp_path)
    port = team.ports
    assert team.here("http://prefect:4200/api") == f"http://127.0.0.1:{port['prefect']}/api"
    assert team.here("postgresql+asyncpg://ddpm:secret@postgres:5432/prefect").endswith(
        f"@127.0.0.1:{port['postgres']}/prefect"
    )
    assert (team.here("0.0.0.0"), team.here("4200")) == ("127.0.0.1", str(port["prefect"]))
    assert team.here("/etc/mlflow.sh") == str(TEAM / "mlflow.sh")
    home = tmp_path / "home"
    environment = team.environment("worker", home)
    assert environment["HOME"] == str(home)
    assert environment["MLFLOW_TRACKING_PASSWORD"] == team.given["MLFLOW_PASSWORD"]
    assert not [value for value in environment.values() if "${" in value]
    assert team.environment("mlflow", home)["MLFLOW_AUTH_CONFIG_PATH"] == f"{home}/mlflow-auth.ini"
    assert team.environment("prefect", home)["PREFECT_HOME"] == str(home)
