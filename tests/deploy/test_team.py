"""The files of deploy/team, by the validators of their formats; `python -m deploy.team.rehearse` runs them."""

import asyncio
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from prefect.workers.base import BaseJobConfiguration
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


def test_every_service_says_whether_it_is_healthy() -> None:
    """`python -m deploy.team.rehearse` runs the checks. `bucket` runs once."""
    assert {name for name, service in SERVICES.items() if "healthcheck" not in service} == {"bucket"}
    for service in ("worker", "worker-gpu"):
        assert "--with-healthcheck" in SERVICES[service]["command"]
        given = SERVICES[service]["environment"]
        address = f"{given['PREFECT_WORKER_WEBSERVER_HOST']}:{given['PREFECT_WORKER_WEBSERVER_PORT']}"
        assert f"http://{address}/health" in SERVICES[service]["healthcheck"]["test"][-1]
    for service in ("dask-scheduler", "dask-worker"):
        assert "127.0.0.1:8080" in " ".join(SERVICES[service]["command"])
        assert "http://127.0.0.1:8080/health" in SERVICES[service]["healthcheck"]["test"][-1]


def kubernetes(kind: str, name: str) -> Any:
    """An object of the kustomization."""
    files = TEAM.glob("kubernetes/*.yaml")
    (found,) = (
        each
        for file in files
        for each in YAML(typ="safe").load_all(file.read_text())
        if (each["kind"], each.get("metadata", {}).get("name")) == (kind, name)
    )
    return found


def test_kubernetes_runs_the_same_service() -> None:
    pod = kubernetes("Deployment", "ddpm")["spec"]["template"]["spec"]
    (container,) = pod["containers"]
    (folder,) = (volume.split(":")[-2] for volume in SERVICES["service"]["volumes"])
    command = container["command"]
    assert command[command.index("--keys") + 1] == f"{folder}/keys"
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted["keys"] == folder
    assert {"name": "keys", "secret": {"secretName": "ddpm-keys"}} in pod["volumes"]
    assert container["command"] == SERVICES["service"]["command"]
    assert container["image"] == SERVICES["service"]["image"]


def test_kubernetes_restarts_a_worker_that_hangs() -> None:
    (container,) = kubernetes("Deployment", "ddpm-worker")["spec"]["template"]["spec"]["containers"]
    assert container["image"] == SERVICES["worker-gpu"]["image"]
    assert container["command"] == [
        word.replace("process", "kubernetes")
        for word in SERVICES["worker-gpu"]["command"]
        if word not in ("--limit", "1")  # the cluster limits them
    ]
    probe = container["livenessProbe"]["httpGet"]
    (port,) = container["ports"]
    assert (probe["path"], probe["port"], port["containerPort"]) == ("/health", port["name"], 8080)  # Prefect's default


class Configuration(BaseJobConfiguration):
    """What Prefect makes of the template of a work pool, without what its worker adds to the Job."""

    job_manifest: dict[str, Any]
    namespace: str


def job(**variables: Any) -> Any:
    """The Job of a run with these job variables."""
    template = json.loads((TEAM / "kubernetes" / "job-template.json").read_text())
    variables |= {"command": "prefect flow-run execute", "name": "bold-ape", "labels": {"a": "b"}}
    made = asyncio.run(Configuration.from_template_and_values(template, variables))
    assert made.namespace == kubernetes("Namespace", "ddpm")["metadata"]["name"]
    return made.job_manifest


def test_the_jobs_of_the_work_pool_are_valid_for_kubernetes(tmp_path: Path) -> None:
    made = job(nodes=2, gpus=8, memory="1Ti")
    pods = made["spec"]["template"]["spec"]
    (container,) = pods["containers"]
    # Prefect's worker requires these two at the wrong place, where Kubernetes ignores them, and makes a list of `args`.
    assert (pods.pop("parallelism"), pods.pop("completions")) == (1, 1)
    assert container["args"] == "prefect flow-run execute"
    container["args"] = container["args"].split()
    made["metadata"]["name"] = made["metadata"].pop("generateName")[:-1]
    (tmp_path / "job.json").write_text(json.dumps(made))
    check("kubernetes-validate", "--strict", str(tmp_path / "job.json"))
    assert "{{" not in json.dumps(made)

    spec = made["spec"]
    assert (spec["completionMode"], spec["completions"], spec["parallelism"]) == ("Indexed", 2, 2)
    # The Job ends with its first pod, which runs the flow, and with any pod that is lost.
    assert (spec["successPolicy"], spec["backoffLimit"]) == ({"rules": [{"succeededIndexes": "0"}]}, 0)
    assert container["resources"]["limits"] == {"memory": "1Ti", "nvidia.com/gpu": 8}
    assert container["command"][:4] == ["python", "-m", "flows.nodes", "--nodes=2"]
    assert container["name"] == "prefect-job"  # Prefect's worker requires it too
    mounted = {mount["name"]: mount["mountPath"] for mount in container["volumeMounts"]}
    assert mounted.keys() == {volume["name"] for volume in pods["volumes"]}
    assert container["command"][4].startswith(f"--folder={mounted['work']}/")
    claim = next(volume["persistentVolumeClaim"]["claimName"] for volume in pods["volumes"] if volume["name"] == "work")
    assert kubernetes("PersistentVolumeClaim", claim)["spec"]["accessModes"] == ["ReadWriteMany"]
    given = {each["name"] for each in container["env"]}
    assert given == set(re.findall(r"\$\((\w+)\)", " ".join(container["command"])))


def test_jobs_have_as_few_rights_as_the_service() -> None:
    service = kubernetes("Deployment", "ddpm")["spec"]["template"]["spec"]
    pods = job()["spec"]["template"]["spec"]
    assert service["securityContext"].items() <= pods["securityContext"].items()
    assert service["automountServiceAccountToken"] is pods["automountServiceAccountToken"] is False
    assert service["containers"][0]["securityContext"] == pods["containers"][0]["securityContext"]
    assert job()["spec"]["completions"] == 1  # by default


def test_what_the_image_has_for_kubernetes_is_locked() -> None:
    lines = (TEAM / "kubernetes" / "requirements.txt").read_text().splitlines()
    assert all(re.fullmatch(r"[\w-]+==[\d.]+|#.*", line) for line in lines)
    assert "-r kubernetes.txt" in (TEAM / "worker.Dockerfile").read_text()


@pytest.mark.slow  # starts a process
def test_the_image_of_the_service_has_all_that_it_imports(tmp_path: Path, root: Path) -> None:
    copied = re.findall(r"^COPY (\S+) (\S+)$", (TEAM / "service.Dockerfile").read_text(), re.MULTILINE)
    assert copied == [(name, name) for name in ("diffusion", "deploy/service", "deploy/web")]
    for source, target in copied:
        shutil.copytree(root / source, tmp_path / target, ignore=shutil.ignore_patterns("node_modules"))
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
import deploy.service.__main__, deploy.service.app, deploy.service.page
assert deploy.service.page.routes().routes
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
    assert team.here("http://127.0.0.1:4200/api/health") == f"http://127.0.0.1:{port['prefect']}/api/health"
    for service in ("worker", "worker-gpu"):
        assert team.here("http://127.0.0.1:8080/health", service) == f"http://127.0.0.1:{team.health[service]}/health"
    assert team.environment("worker", tmp_path)["PREFECT_WORKER_WEBSERVER_PORT"] == str(team.health["worker"])
    assert (team.here("0.0.0.0"), team.here("4200")) == ("127.0.0.1", str(port["prefect"]))
    assert team.here("/etc/mlflow.sh") == str(TEAM / "mlflow.sh")
    assert team.here("/etc/ddpm/keys") == str(tmp_path / "keys" / "keys")
    home = tmp_path / "home"
    environment = team.environment("worker", home)
    assert environment["HOME"] == str(home)
    assert environment["MLFLOW_TRACKING_PASSWORD"] == team.given["MLFLOW_PASSWORD"]
    assert not [value for value in environment.values() if "${" in value]
    assert team.environment("mlflow", home)["MLFLOW_AUTH_CONFIG_PATH"] == f"{home}/mlflow-auth.ini"
    assert team.environment("prefect", home)["PREFECT_HOME"] == str(home)
