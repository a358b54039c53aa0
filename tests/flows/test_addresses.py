"""Where the services are."""

import json
from pathlib import Path

import pytest

from flows import addresses
from flows.paths import Paths


def test_the_ports_of_the_last_start_then_the_environment_s_then_the_usual_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = Paths(tmp_path)
    monkeypatch.delenv("MLFLOW_PORT", raising=False)
    assert addresses.mlflow(paths) == "http://127.0.0.1:5000"
    monkeypatch.setenv("MLFLOW_PORT", "5001")
    assert addresses.mlflow(paths) == "http://127.0.0.1:5001"
    file = tmp_path / ".ddpm/services/addresses.json"
    file.parent.mkdir(parents=True)
    file.write_text(json.dumps({"MLFLOW_PORT": "5002"}))
    assert addresses.mlflow(paths) == "http://127.0.0.1:5002"


@pytest.mark.parametrize(
    "content",
    [
        "",
        "[]",
        "{",
        '{"PREFECT_PORT": "abc", "MLFLOW_PORT": "5391"}',
        '{"PREFECT_PORT": 4391, "MLFLOW_PORT": [1]}',
        '{"PREFECT_PORT": "99999", "MLFLOW_PORT": "5391"}',
        '{"PREFECT_PORT": "4391", "MLFLOW_PORT": "5391", "MLFLOW_TRACKING_URI": 1}',
    ],
)
def test_a_damaged_record_counts_as_none(tmp_path: Path, content: str) -> None:
    file = tmp_path / ".ddpm/services/addresses.json"
    file.parent.mkdir(parents=True)
    file.write_text(content)
    assert addresses.recorded(Paths(tmp_path)) == {}


@pytest.mark.parametrize("url", ["http://127.0.0.1:99999/api", "http://127.0.0.1:abc/api", "http://[::1/api", "junk"])
def test_nothing_listens_at_what_is_no_address(url: str) -> None:
    assert not addresses.listens(url)
