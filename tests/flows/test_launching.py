"""Which failures of a process restart the training, and which end it."""

import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from diffusion.errors import Stopped, UserError
from flows import launching, nodes
from flows.nodes import Meeting

Ends = Callable[..., list[str]]


def failed(*exitcodes: int, later: int = 0) -> ChildFailedError:
    """The exception that torch raises for these exit codes; the last process exits `later` seconds after the first."""
    failures = {rank: ProcessFailure(rank, 1, exitcode, "none") for rank, exitcode in enumerate(exitcodes)}
    for failure in failures.values():
        failure.timestamp = 1000
    failures[len(exitcodes) - 1].timestamp += later
    return ChildFailedError("train", failures)


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ends:
    """Launches two processes that end in the given ways in turn; returns the store of each start."""
    (tmp_path / "0000000020.json").touch()
    for name in (launching.LAUNCHER, launching.STORE, "TORCH_DISABLE_SHARE_RDZV_TCP_STORE"):
        monkeypatch.setenv(name, "")

    def launch(*ends: BaseException | None, checkpoints: Path = tmp_path) -> list[str]:
        stores, effects = [], iter(ends)

        def start(*_: str) -> None:
            stores.append(os.environ[launching.STORE])
            if (effect := next(effects)) is not None:
                raise effect

        monkeypatch.setattr(launching, "elastic_launch", Mock(return_value=start))
        launching.launch("train", 2, checkpoints)
        assert not list(effects)
        return stores

    return launch


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (failed(1, -signal.SIGKILL), "process 1 of 2 was killed by SIGKILL"),
        (failed(-signal.SIGSEGV, -signal.SIGTERM), "process 0 of 2 was killed by SIGSEGV"),
        (failed(1, -signal.SIGKILL, later=29), "process 1 of 2 was killed by SIGKILL"),  # slow to exit
        (failed(os.EX_TEMPFAIL, 1), "process 0 of 2 lost its GPU"),
        (failed(os.EX_UNAVAILABLE, -signal.SIGKILL), "process 1 of 2 was killed by SIGKILL"),
        (failed(os.EX_UNAVAILABLE, os.EX_UNAVAILABLE), "a process on another node was lost"),
    ],
)
def test_a_lost_process_restarts_training(
    after: Ends, capsys: pytest.CaptureFixture[str], end: BaseException, said: str
) -> None:
    stores = after(end, end, None)
    assert len(set(stores)) == 3  # a file store cannot be reused
    lines = [f"train: {said}; resuming from the checkpoint at step 20 (restart {number} of 3)" for number in (1, 2)]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (failed(1, 1), 1),  # an error that both have reported
        (failed(1, 128 + signal.SIGTERM), 1),  # one reported an error, and the other was terminated
        (failed(1, -signal.SIGTERM), 1),
        (failed(os.EX_UNAVAILABLE, 1), 1),  # one reported an error, and the other lost its connection to it
        (failed(1, -signal.SIGKILL, later=30), 1),  # killed by torch, since it did not exit
    ],
)
def test_a_reported_error_ends_the_training(
    after: Ends, capsys: pytest.CaptureFixture[str], end: BaseException, status: int
) -> None:
    with pytest.raises(SystemExit) as ended:
        after(end)
    assert ended.value.code == status
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "end",
    [
        SignalException("stopped", signal.SIGTERM),
        failed(128 + signal.SIGTERM, 128 + signal.SIGTERM),  # a worker received the signal, and so did all others
        failed(-signal.SIGTERM, -signal.SIGTERM),  # before the handler was installed
    ],
)
def test_a_stop_signal_does_not_restart_training(after: Ends, end: BaseException) -> None:
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        after(failed(1, -signal.SIGKILL), end)


def test_the_number_of_restarts_is_limited(after: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    lost, message = failed(1, -signal.SIGKILL), "process 1 of 2 was killed by SIGKILL; `dvc repro` resumes"
    with pytest.raises(UserError, match=message):
        after(lost, lost, lost, lost)
    monkeypatch.setenv(launching.MAX_RESTARTS, "0")
    with pytest.raises(UserError, match=message):
        after(lost)
    monkeypatch.setenv(launching.MAX_RESTARTS, "-1")
    with pytest.raises(UserError, match=r"DDPM_MAX_RESTARTS: .*-1"):
        after()


def test_a_process_lost_before_the_first_checkpoint_ends_the_training(after: Ends, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="process 1 of 2 was killed by SIGBUS"):
        after(failed(1, -signal.SIGBUS), checkpoints=tmp_path / "none")


@pytest.fixture
def meets(monkeypatch: pytest.MonkeyPatch) -> Mock:
    """Takes the place of torch's launcher on the second of two nodes, with two processes each."""
    for name, value in ((nodes.NODES, "2"), (nodes.INDEX, "1"), (launching.LAUNCHER, "")):
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(launching, "divide_threads", Mock())
    launcher = Mock(return_value=Mock())
    monkeypatch.setattr(launching, "elastic_launch", launcher)
    return launcher


MEETING = Meeting(stage="train", directory="/work", processes=2, nodes=2, endpoint="10.0.0.5:4242")


def test_nodes_meet_at_the_address_of_the_first(meets: Mock) -> None:
    assert launching.main([MEETING.model_dump_json()]) == 0
    (config, program), _ = meets.call_args
    meets.return_value.assert_called_once_with("-m", "flows", "train")
    assert program == sys.executable
    assert (config.min_nodes, config.max_nodes, config.nproc_per_node, config.max_restarts) == (2, 2, 2, 0)
    assert (config.rdzv_backend, config.rdzv_endpoint, config.rdzv_configs["rank"]) == ("static", "10.0.0.5:4242", 1)


@pytest.mark.parametrize(
    ("end", "status", "said"),
    [
        (failed(os.EX_UNAVAILABLE, os.EX_UNAVAILABLE), 1, ""),  # the first node says it
        (SignalException("stopped", signal.SIGTERM), 128 + signal.SIGTERM, ""),
        (DistStoreError("timed out"), 1, "train: not all of the 2 nodes came within 15 minutes; does the cluster"),
        (
            DistNetworkError("timed out\nmore"),
            1,
            "train: no connection at 10.0.0.5:4242, the first node (timed out); do",
        ),
    ],
)
def test_the_end_on_another_node(
    meets: Mock, capsys: pytest.CaptureFixture[str], end: BaseException, status: int, said: str
) -> None:
    meets.return_value.side_effect = end
    assert launching.main([MEETING.model_dump_json()]) == status
    assert capsys.readouterr().err.startswith(said)


def test_the_first_node_goes_on_when_another_is_stopped(
    meets: Mock, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Kubernetes then stops the first one too, or has started the other again."""
    monkeypatch.setenv(nodes.FOLDER, str(tmp_path / "nodes"))
    monkeypatch.setenv(nodes.ADDRESS, "127.0.0.1")
    (tmp_path / "0000000020.json").touch()
    meets.return_value.side_effect = [failed(128 + signal.SIGTERM, 128 + signal.SIGTERM), None]
    launching.launch("train", 2, tmp_path)
    endpoints = [call.args[0].rdzv_endpoint for call in meets.call_args_list]
    assert len(set(endpoints)) == 2
    assert [call.args[0].rdzv_configs["rank"] for call in meets.call_args_list] == [0, 0]
    said = "train: another node was stopped; resuming from the checkpoint at step 20 (restart 1 of 3)\n"
    assert capsys.readouterr().err == said
