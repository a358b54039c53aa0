"""The services' commands where nothing runs; tests/e2e runs them for good."""

import socket
from pathlib import Path

import pytest

from diffusion.errors import UserError
from flows import services
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
