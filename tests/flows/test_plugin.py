"""What the plugin does to Prefect's command line, and to nothing else."""

import json
import logging
import socket
import sys
from pathlib import Path

import pytest
from prefect.plugins import HookContext

from flows import addresses, plugin

RUN = ["deployment", "run", "train-ddpm"]


@pytest.mark.parametrize("name", ["train-ddpm", "distill-ddpm", "sweep-ddpm"])
def test_completes_the_bare_name_and_keeps_the_rest(name: str) -> None:
    expected = ["deployment", "run", f"{name}/{name}", "--watch", "-p", "device=cpu"]
    assert plugin.complete(["deployment", "run", name, "--watch", "-p", "device=cpu"]) == expected


@pytest.mark.parametrize(
    "given",
    [
        ["deployment", "run", "train-ddpm/train-ddpm"],
        ["deployment", "run", "other"],
        ["deployment", "run"],
        ["deployment", "inspect", "train-ddpm"],
        ["deployment", "run", "--watch", "train-ddpm"],
        [],
    ],
)
def test_leaves_everything_else_as_it_is(given: list[str]) -> None:
    assert plugin.complete(given) == given


def test_prefect_is_distinguished_from_other_programs() -> None:
    assert plugin.arguments(["/some/bin/prefect", *RUN], ["python", "/some/bin/prefect", *RUN]) == RUN
    assert plugin.arguments(["-m", *RUN], ["python", "-m", "prefect", *RUN]) == RUN
    assert plugin.arguments(["-m", *RUN], ["python", "-m", "other", *RUN]) is None
    assert plugin.arguments(["/bin/pytest", *RUN], ["python", "/bin/pytest", *RUN]) is None
    assert plugin.arguments(["/bin/prefect"], ["python", "/bin/prefect"]) == []
    assert plugin.arguments([], ["python"]) is None


@pytest.mark.parametrize(
    ("command", "needs"),
    [
        ("deployment run train-ddpm", True),
        ("deployment schedule create train-ddpm/train-ddpm --interval 60", True),
        ("flow-run cancel 1", True),
        ("flow-runs ls", True),
        ("gcl create gpu --limit 1", True),
        ("deploy", True),
        ("deployment", False),
        ("flow-run cancel --help", False),
        ("config view", False),
        ("server start", False),
        ("version", False),
        ("", False),
    ],
)
def test_which_commands_need_the_server(command: str, needs: bool) -> None:
    assert plugin.needs_server(command.split()) is needs


@pytest.mark.parametrize(
    ("command", "watches"),
    [
        ("deployment run train-ddpm --watch", True),
        ("flow-run watch 1", True),
        ("deployment run train-ddpm", False),
        ("flow-run ls", False),
        ("", False),
    ],
)
def test_which_commands_follow_a_run(command: str, watches: bool) -> None:
    assert plugin.watches(command.split()) is watches


def free_port() -> int:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port: int = unused.getsockname()[1]
        return port


def set_up(url: str) -> None:
    plugin.setup_environment(ctx=HookContext(prefect_version="3", api_url=url, logger_factory=logging.getLogger))


@pytest.mark.parametrize("command", [RUN, ["flow-run", "ls"], ["gcl", "create", "gpu", "--limit", "1"]])
def test_says_so_when_no_server_answers(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, command: list[str]) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prefect", *command])
    with pytest.raises(SystemExit, match=f"No Prefect server answers at {url}: `make up` starts one"):
        set_up(url)


def test_says_where_this_repository_s_server_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    url = f"http://127.0.0.1:{free_port()}/api"
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["prefect", "flow-run", "ls"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        (tmp_path / ".ddpm/services").mkdir(parents=True)
        (tmp_path / ".ddpm/services/addresses.json").write_text(json.dumps({"PREFECT_PORT": str(port)}))
        with pytest.raises(
            SystemExit, match=f"{url}, but .* at http://127.0.0.1:{port}/api: run `export PREFECT_API_URL="
        ):
            set_up(url)
        monkeypatch.setattr(sys, "argv", ["prefect", *RUN])
        set_up(f"http://127.0.0.1:{port}/api")
        assert sys.argv == ["prefect", "deployment", "run", "train-ddpm/train-ddpm"]


def test_a_server_elsewhere_is_left_to_prefect(monkeypatch: pytest.MonkeyPatch) -> None:
    """Behind a proxy, as Prefect Cloud often is, it accepts no direct connection."""
    monkeypatch.setattr(sys, "argv", ["prefect", *RUN])
    monkeypatch.setattr(addresses, "listens", lambda _: False)
    set_up("https://api.prefect.cloud/api/accounts/1/workspaces/2")
    assert sys.argv == ["prefect", "deployment", "run", "train-ddpm/train-ddpm"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]"])
def test_a_local_server_is_asked_for(monkeypatch: pytest.MonkeyPatch, host: str) -> None:
    monkeypatch.setattr(sys, "argv", ["prefect", *RUN])
    monkeypatch.setattr(addresses, "listens", lambda _: False)
    with pytest.raises(SystemExit, match="No Prefect server answers"):
        set_up(f"http://{host}:4200/api")


def test_prefects_own_display_is_the_fallback(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "flows.watch", None)  # so that it cannot be imported
    monkeypatch.setattr(sys, "argv", ["prefect", *RUN, "--watch"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        set_up(f"http://127.0.0.1:{server.getsockname()[1]}/api")
    assert sys.argv[-1] == "--watch"
