"""The services' commands where nothing runs; tests/e2e runs them for good."""

import importlib
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from prefect.settings import PREFECT_HOME, temporary_settings

from diffusion.errors import UserError
from diffusion.storage.files import write_json
from flows import deployment, http, services
from flows.services import Services


@pytest.mark.parametrize(("variable", "field"), [("PREFECT_PORT", "prefect_port"), ("MLFLOW_PORT", "mlflow_port")])
def test_a_taken_port_is_named_with_the_variable_to_change(tmp_path: Path, variable: str, field: str) -> None:
    with socket.socket() as other, socket.socket() as free:
        for each in (other, free):
            each.bind(("127.0.0.1", 0))
        other.listen()
        taken, unused = other.getsockname()[1], free.getsockname()[1]
        free.close()
        ports = {"prefect_port": unused, "mlflow_port": unused} | {field: taken}
        with pytest.raises(UserError, match=f"port {taken} is taken by another program: .*{variable}="):
            services.up(Services(tmp_path, **ports))


def test_down_and_status_where_nothing_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    none = Services(tmp_path, prefect_port=1, mlflow_port=2)
    services.down(none)
    services.status(none)
    output = capsys.readouterr().out.splitlines()
    assert output[0] == "not running"
    assert [line.split()[:2] for line in output[1:4]] == [[name, "stopped"] for name in ("prefect", "mlflow", "worker")]


def test_an_mlflow_of_the_users_own_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    assert Services(tmp_path, mlflow_port=5001).environment()["MLFLOW_TRACKING_URI"] == "http://127.0.0.1:5001"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    assert Services(tmp_path).environment()["MLFLOW_TRACKING_URI"] == "http://elsewhere"


def test_leases_outlive_the_server(tmp_path: Path) -> None:
    module = importlib.import_module(Services(tmp_path).environment()["PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE"])
    with temporary_settings({PREFECT_HOME: tmp_path}):
        assert module.ConcurrencyLeaseStorage().storage_path.is_relative_to(tmp_path)


def test_other_addresses_than_those_of_the_running_services_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://elsewhere")
    running = Services(tmp_path, prefect_port=1, mlflow_port=2)
    write_json(running.directory / "addresses.json", running.addresses())
    monkeypatch.setattr(Services, "states", lambda _: {"prefect": "RUNNING"})
    message = "running with PREFECT_PORT=1, MLFLOW_PORT=2, MLFLOW_TRACKING_URI=http://elsewhere; `make down` first"
    with pytest.raises(UserError, match=message):
        services.up(Services(tmp_path, prefect_port=3, mlflow_port=2))
    assert Services(tmp_path, prefect_port=3).as_started() == running


def test_a_path_too_long_for_a_socket_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="characters too long for a socket"):
        services.up(Services(tmp_path / ("x" * 100), prefect_port=free_port(), mlflow_port=free_port()))


def test_it_says_why_supervisord_does_not_start() -> None:
    with tempfile.TemporaryDirectory() as short, pytest.raises(UserError, match="supervisord failed to start: Error: "):
        services.up(Services(Path(short), prefect_port=free_port(), mlflow_port=free_port()))


def test_a_system_error_is_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PREFECT_PORT", str(free_port()))
    monkeypatch.setenv("MLFLOW_PORT", str(free_port()))
    with tempfile.TemporaryDirectory() as short:
        monkeypatch.chdir(short)
        Path(".ddpm").write_text("no folder")
        assert services.main(["up"]) == 1
        monkeypatch.undo()
    assert capsys.readouterr().err == f"error: {Path(short).resolve()}/.ddpm/services: Not a directory\n"


def test_status_asks_at_the_addresses_of_the_last_start(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without supervisord, as after `kill -9`, its services may still answer, on ports of the user's choice."""
    for variable in ("PREFECT_PORT", "MLFLOW_PORT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    started = Services(tmp_path, prefect_port=free_port(), mlflow_port=free_port())
    write_json(started.directory / "addresses.json", started.addresses())
    monkeypatch.setattr(http, "answers", lambda url: url == f"{started.mlflow}/health")
    services.status(Services(tmp_path))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["prefect", "stopped", started.prefect]
    assert lines[1].split(maxsplit=1) == ["mlflow", f"stopped, but another process answers {started.mlflow}"]


def test_a_port_taken_since_the_start_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server of another clone answers there, and must not be given this one's worker and deployment."""
    with socket.create_server(("127.0.0.1", 0)) as other:
        here = Services(tmp_path, prefect_port=other.getsockname()[1], mlflow_port=free_port())
        write_json(here.directory / "addresses.json", here.addresses())
        monkeypatch.setattr(Services, "states", lambda _: {"prefect": "BACKOFF", "mlflow": "RUNNING"})
        with pytest.raises(UserError, match=f"port {here.prefect_port} is taken by another program"):
            services.up(here)


def test_whatever_makes_the_form_makes_a_new_deployment(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(root)
    loaded = (
        "print(*(m.__file__ for n, m in sys.modules.items() if n.split('.')[0] in ('diffusion', 'flows')), sep='\\n')"
    )
    code = f"import sys, flows.parameters; {loaded}"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    files = {Path(file).relative_to(root) for file in output.splitlines()}
    assert Path("diffusion/sections.py") in files
    assert files | {Path("params.yaml")} <= {*deployment.deployed_files()}  # its values are in the form's descriptions


def test_a_deployment_without_params_yaml_is_possible(repository: Path) -> None:
    """A file that is missing is reported when a flow runs."""
    Path("prefect.yaml").touch()
    assert Path("params.yaml") in deployment.deployed_files()
    (repository / "params.yaml").unlink()
    assert Path("params.yaml") not in deployment.deployed_files()
    assert Path("prefect.yaml") in deployment.deployed_files()


def test_prefect_s_commands_find_the_server_on_its_port(root: Path, tmp_path: Path) -> None:
    """By prefect.toml, before what pyproject.toml says."""
    shutil.copy(root / "pyproject.toml", tmp_path)
    code = "from prefect.settings import PREFECT_API_URL; print(PREFECT_API_URL.value())"
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
    environment |= {"PREFECT_HOME": str(tmp_path), "PREFECT_PLUGINS_ENABLED": "false"}
    for port in (4201, 4202):
        services._configure_prefect(Services(tmp_path, prefect_port=port))
        command = [sys.executable, "-c", code]
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=True)
        assert done.stdout == f"http://127.0.0.1:{port}/api\n"


def test_the_users_own_prefect_toml_is_kept(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, here = tmp_path / "prefect.toml", Services(tmp_path, prefect_port=4201)
    file.write_text("[logging]\nlevel = 'DEBUG'\n")
    services._configure_prefect(here)
    assert file.read_text() == "[logging]\nlevel = 'DEBUG'\n"
    assert "export PREFECT_API_URL=http://127.0.0.1:4201/api" in capsys.readouterr().out
    file.write_text(f'{file.read_text()}[api]\nurl = "{here.prefect}/api"\n')
    services._configure_prefect(here)
    assert capsys.readouterr().out == ""


def test_default_ports_are_those_of_the_last_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("PREFECT_PORT", "MLFLOW_PORT", "MLFLOW_TRACKING_URI"):
        monkeypatch.delenv(variable, raising=False)
    assert Services(tmp_path).as_named() == Services(tmp_path, prefect_port=4200, mlflow_port=5000)
    started = Services(tmp_path, prefect_port=4201, mlflow_port=5001)
    write_json(started.directory / "addresses.json", started.addresses())
    assert Services(tmp_path).as_named() == started
    monkeypatch.setenv("PREFECT_PORT", "4202")
    assert Services(tmp_path).as_named() == Services(tmp_path, prefect_port=4202, mlflow_port=5001)


def test_up_says_what_to_open_and_what_to_type(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(deployment, "deploy", lambda _: None)
    monkeypatch.setenv("VIRTUAL_ENV", sys.prefix)
    services._finish(Services(tmp_path, prefect_port=4201, mlflow_port=free_port()))
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "Prefect  http://127.0.0.1:4201"
    assert "/#/experiments?" in lines[1]  # the list: nothing answers, and there is no experiment
    assert lines[2] == "train    prefect deployment run train-ddpm --watch"
    monkeypatch.delenv("VIRTUAL_ENV")
    services._finish(Services(tmp_path, prefect_port=4201, mlflow_port=free_port()))
    assert "/bin/activate; prefect deployment" in capsys.readouterr().out


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
