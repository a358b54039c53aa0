"""Which failures of a process restart the training, and which end it."""

import os
import signal
from collections.abc import Callable
from pathlib import Path
from unittest.mock import Mock

import pytest
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from diffusion.errors import Stopped, UserError
from flows import launching

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
