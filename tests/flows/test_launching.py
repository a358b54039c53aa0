"""Which ends of a process start the others again, and which end the training."""

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
    """What torch raises after processes have ended so, the last of them so many seconds later."""
    failures = {rank: ProcessFailure(rank, 1, exitcode, "none") for rank, exitcode in enumerate(exitcodes)}
    for failure in failures.values():
        failure.timestamp = 1000
    failures[len(exitcodes) - 1].timestamp += later
    return ChildFailedError("train", failures)


@pytest.fixture
def after(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Ends:
    """Launches two processes that end in these ways, one after the other; gives the store of each start."""
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
        launching.launch(2, checkpoints)
        assert not list(effects)
        return stores

    return launch


@pytest.mark.parametrize(
    ("end", "said"),
    [
        (failed(1, -signal.SIGKILL), "process 1 of 2 was killed by SIGKILL"),
        (failed(-signal.SIGSEGV, -signal.SIGTERM), "process 0 of 2 was killed by SIGSEGV"),
        (failed(1, -signal.SIGKILL, later=29), "process 1 of 2 was killed by SIGKILL"),  # slow to die
        (failed(os.EX_TEMPFAIL, 1), "process 0 of 2 lost its GPU"),
    ],
)
def test_a_lost_process_is_replaced(
    after: Ends, capsys: pytest.CaptureFixture[str], end: BaseException, said: str
) -> None:
    stores = after(end, end, None)
    assert len(set(stores)) == 3  # a file store does not serve twice
    lines = [f"train: {said}; resuming from the checkpoint at step 20 (restart {number} of 3)" for number in (1, 2)]
    assert capsys.readouterr().err.splitlines() == lines


@pytest.mark.parametrize(
    ("end", "status"),
    [
        (failed(1, 1), 1),  # an error that they have reported
        (failed(1, 128 + signal.SIGTERM), 1),  # one of them has, and the other one was told to end
        (failed(1, -signal.SIGTERM), 1),
        (failed(1, -signal.SIGKILL, later=30), 1),  # by torch, for it did not end
    ],
)
def test_an_error_of_its_own_ends_the_training(
    after: Ends, capsys: pytest.CaptureFixture[str], end: BaseException, status: int
) -> None:
    with pytest.raises(SystemExit) as ended:
        after(end)
    assert ended.value.code == status
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    "end",
    [
        SignalException("told", signal.SIGTERM),
        failed(128 + signal.SIGTERM, 128 + signal.SIGTERM),  # a worker was told, and with it all of them
        failed(-signal.SIGTERM, -signal.SIGTERM),  # before it could listen
    ],
)
def test_a_stop_is_no_loss(after: Ends, end: BaseException) -> None:
    with pytest.raises(Stopped, match="stopped by SIGTERM"):
        after(failed(1, -signal.SIGKILL), end)


def test_the_number_of_restarts_is_limited(after: Ends, monkeypatch: pytest.MonkeyPatch) -> None:
    lost, message = failed(1, -signal.SIGKILL), "process 1 of 2 was killed by SIGKILL; `dvc repro` goes on"
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
