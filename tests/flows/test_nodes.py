"""How the nodes of a training find each other; tests/training/test_processes.py trains on two."""

import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from flows import nodes
from flows.nodes import Meeting


@pytest.fixture(autouse=True)
def first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The environment of the first of two nodes; returns their folder."""
    folder = tmp_path / "nodes" / "job"
    for name, value in ((nodes.NODES, "2"), (nodes.FOLDER, str(folder)), (nodes.ADDRESS, "127.0.0.1")):
        monkeypatch.setenv(name, value)
    monkeypatch.delenv(nodes.INDEX, raising=False)
    return folder


def test_a_training_is_announced_for_as_long_as_it_runs(
    first: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.chdir(tmp_path)
    with nodes.announced("train", 8) as meeting:
        (file,) = first.iterdir()
        assert Meeting.model_validate_json(file.read_text()) == meeting
        host, _, port = meeting.endpoint.rpartition(":")
        assert (meeting.stage, meeting.directory, meeting.processes, meeting.nodes) == ("train", str(tmp_path), 8, 2)
        with socket.socket() as free:  # nothing else listens there
            free.bind((host, int(port)))
        with nodes.announced("train", 8):
            pass
        assert file.exists()
    assert not first.exists()


def test_a_node_takes_part_in_each_training_once(first: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = Mock()
    monkeypatch.setattr(nodes, "_run", run)
    monkeypatch.setattr(nodes.time, "sleep", Mock(side_effect=[None, None, KeyboardInterrupt]))
    with nodes.announced("train", 1) as one, nodes.announced("distill", 1) as other, pytest.raises(KeyboardInterrupt):
        nodes.take_part(first)
    ran = [call.args for call in run.call_args_list]
    assert [(command[:3], directory) for command, directory, _ in ran] == [
        ([sys.executable, "-m", "flows.launching"], str(Path.cwd()))
    ] * 2
    assert {Meeting.model_validate_json(command[3]).stage for command, *_ in ran} == {one.stage, other.stage}


def test_what_is_no_longer_announced_is_stopped(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """As when the first node starts the training again, while this one waits for the earlier start."""
    monkeypatch.setattr(nodes, "_SECONDS_TO_LOOK", 0.01)
    monkeypatch.setattr(nodes, "SECONDS_TO_STOP", 0.1)
    started = []

    def start(*given: Any, **more: Any) -> subprocess.Popen[bytes]:
        started.append(real(*given, **more))
        return started[-1]

    real = subprocess.Popen
    monkeypatch.setattr(nodes.subprocess, "Popen", start)
    nodes._run(["sleep", "60"], str(tmp_path), tmp_path / "gone.json")
    assert started[0].returncode == -signal.SIGTERM
    nodes._run(["sh", "-c", "trap '' TERM; sleep 60 & wait; wait"], str(tmp_path), tmp_path / "gone.json")
    assert started[1].returncode == -signal.SIGKILL
    (tmp_path / "there.json").touch()
    began = time.monotonic()
    nodes._run(["sh", "-c", "exit 3"], str(tmp_path), tmp_path / "there.json")
    assert started[2].returncode == 3
    assert time.monotonic() - began < 60


ARGUMENTS = ["--nodes=2", "--folder=shared", "--address=10.0.0.5", "prefect", "flow-run", "execute"]


@pytest.mark.parametrize(("count", "index"), [("2", "0"), ("2", None), ("1", "0")])
def test_the_first_node_runs_the_command(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, count: str, index: str | None
) -> None:
    monkeypatch.chdir(tmp_path)
    if index:
        monkeypatch.setenv(nodes.INDEX, index)
    execute = Mock(side_effect=SystemExit(0))
    monkeypatch.setattr(os, "execvp", execute)
    with pytest.raises(SystemExit):
        nodes.main([f"--nodes={count}", *ARGUMENTS[1:]])
    execute.assert_called_once_with("prefect", ["prefect", "flow-run", "execute"])
    given = [os.environ[name] for name in (nodes.NODES, nodes.FOLDER, nodes.ADDRESS)]
    assert given == [count, str(tmp_path / "shared"), "10.0.0.5"]


def test_the_others_take_part_until_they_are_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(nodes.INDEX, "1")
    monkeypatch.setattr(os, "execvp", Mock())
    before = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(nodes, "take_part", lambda _: signal.raise_signal(signal.SIGTERM))
    try:
        with pytest.raises(SystemExit) as ended:
            nodes.main(ARGUMENTS)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert ended.value.code == 128 + signal.SIGTERM
    os.execvp.assert_not_called()  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--nodes=none", *ARGUMENTS[1:]], "flows.nodes: error: DDPM_NODES: "),
        (["--nodes=0", *ARGUMENTS[1:]], "flows.nodes: error: DDPM_NODES: "),
        ([*ARGUMENTS[:3], "no-such-program"], "No such file or directory"),
    ],
)
def test_wrong_arguments_are_named(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert nodes.main(arguments) == 1
    errors = capsys.readouterr().err
    assert said in errors
    assert errors.count("\n") == 1
    with pytest.raises(SystemExit):
        nodes.main(ARGUMENTS[:3])  # without a command
