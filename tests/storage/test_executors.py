"""Executors: order, limits, killed workers, errors, and that nothing of them is left."""

import os
import pickle
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import BrokenExecutor, Future
from contextlib import closing
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

import psutil
import pytest

from diffusion import errors
from diffusion.errors import Damaged, FileFault, SystemFault, UserError, WriteFault
from diffusion.storage import dask, executors
from diffusion.storage.dask import Remote
from diffusion.storage.executors import OWN_PROCESS, TRIES, Executor, LostWorker, ordered_map
from diffusion.storage.processes import Processes

FOLDER = Path(__file__).parents[2]


def square(number: int) -> tuple[int, int]:
    """The square and the process; the first tasks take longer."""
    time.sleep(0.02 if number < 3 else 0)
    return number**2, os.getpid()


def none(_: object) -> int:
    return 0


def workers() -> list[psutil.Process]:
    """The workers of this process, children of a server."""
    return [worker for server in psutil.Process().children() for worker in server.children()]


@pytest.mark.parametrize("executor", [OWN_PROCESS, Processes(2), Processes(3)], ids=str)
def test_results_come_in_order(executor: Executor) -> None:
    found = list(executor.map(square, range(40), none))
    assert [(task, result) for task, (result, _) in found] == [(number, number**2) for number in range(40)]
    others = {process for _, (_, process) in found} - {os.getpid()}
    assert 1 <= len(others) <= executor.workers if isinstance(executor, Processes) else not others
    assert not workers()


def test_few_tasks_are_in_flight() -> None:
    taken, most = [0], [0]

    def tasks(count: int) -> Iterator[int]:
        for number in range(count):
            taken[0] += 1
            yield number

    def submit(task: int) -> Future[int]:
        future = Future[int]()
        future.set_result(task)
        return future

    for size, limit in ((0, 5), (executors.MAX_BYTES // 2, 2), (executors.MAX_BYTES * 2, 1)):
        taken[0] = most[0] = 0
        for done, _ in enumerate(
            ordered_map(submit, Future.result, tasks(20), lambda _, size=size: size, 5, BrokenExecutor)
        ):
            most[0] = max(most[0], taken[0] - done)
        assert (taken[0], most[0]) == (20, limit)


def killed_once(mark: Path, number: int) -> int:
    if number == 5 and not mark.exists():
        mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return -number


def test_a_killed_worker_costs_nothing_but_time(tmp_path: Path) -> None:
    found = list(Processes(2).map(partial(killed_once, tmp_path / "mark"), range(30), none))
    assert found == [(number, -number) for number in range(30)]
    assert (tmp_path / "mark").exists()


def killed_while_it_sends(mark: Path, number: int) -> bytes:
    if number == 5 and not mark.exists():
        mark.touch()
        threading.Timer(0.03, os.kill, (os.getpid(), signal.SIGKILL)).start()
    return bytes([number]) * 50_000_000


def test_a_worker_may_be_killed_while_it_sends_a_result(tmp_path: Path) -> None:
    found = Processes(2).map(partial(killed_while_it_sends, tmp_path / "mark"), range(10), none)
    assert [(task, result[-1], len(result)) for task, result in found] == [(k, k, 50_000_000) for k in range(10)]
    assert (tmp_path / "mark").exists()


def killed_within_a_message(mark: Path, sent: int, number: int) -> int:
    if number == 5 and not mark.exists():
        mark.touch()

        def send(self: Connection, content: bytes) -> None:
            os.write(self.fileno(), content[:sent])
            os.kill(os.getpid(), signal.SIGKILL)

        Connection._send = send  # type: ignore[attr-defined]
    return -number


@pytest.mark.parametrize("sent", [0, 2, 4, 6])
def test_a_worker_may_be_killed_within_a_message(tmp_path: Path, sent: int) -> None:
    """Its first 4 bytes are its length."""
    found = Processes(2).map(partial(killed_within_a_message, tmp_path / "mark", sent), range(10), none)
    assert list(found) == [(number, -number) for number in range(10)]
    assert (tmp_path / "mark").exists()


def test_too_many_workers_for_the_limit_of_open_files() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    last = os.open(os.devnull, os.O_RDONLY)
    os.close(last)
    resource.setrlimit(resource.RLIMIT_NOFILE, (last + 30, hard))
    try:
        with pytest.raises(UserError, match=r"can be started \(Too many open files\); use fewer \(DDPM_WORKERS\)"):
            list(Processes(30).map(square, range(60), none))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert not workers()


def killed(tries: Path, number: int) -> int:
    if number < 3:
        time.sleep(0.2)  # still in flight when task 3 kills its worker
    if number == 3:
        with tries.open("a") as file:
            file.write("x")
        os.kill(os.getpid(), signal.SIGKILL)
    return number


def test_a_task_that_kills_its_workers_is_named(tmp_path: Path) -> None:
    found = []
    with pytest.raises(LostWorker) as caught:
        found += list(Processes(2).map(partial(killed, tmp_path / "tries"), range(30), none))
    assert caught.value.task == 3
    assert len((tmp_path / "tries").read_text()) == TRIES
    assert not workers()


def failing(number: int) -> int:
    if number == 7:
        raise SystemFault(Path("x.png"), OSError(5, "error"), "cannot be read ({})")
    return number


@pytest.mark.parametrize("executor", [OWN_PROCESS, Processes(2)], ids=str)
def test_errors_of_a_task_are_raised_here(executor: Executor) -> None:
    with pytest.raises(SystemFault, match=r"^x\.png: cannot be read \(Input/output error\)$") as caught:
        list(executor.map(failing, range(20), none))
    assert caught.value.path == Path("x.png")
    assert not workers()


@pytest.mark.parametrize(
    "error",
    [
        UserError("wrong"),
        errors.AlreadyReported(),
        FileFault(Path("x"), "wrong"),
        Damaged(Path("x"), "why"),
        WriteFault(Path("x"), OSError(28, "full")),
    ],
    ids=lambda error: type(error).__name__,
)
def test_errors_reach_another_process_as_they_are(error: UserError) -> None:
    copy = pickle.loads(pickle.dumps(error))
    assert (type(copy), str(copy)) == (type(error), str(error))
    assert [str(value) for value in vars(copy).values()] == [str(value) for value in vars(error).values()]


def forever(number: int) -> int:
    if number:
        time.sleep(1000)
    return number


def test_closing_ends_the_workers_at_once() -> None:
    began = time.monotonic()
    with closing(Processes(2).map(forever, range(20), none)) as done:
        assert next(done) == (0, 0)
        assert workers()
    assert not workers()
    assert time.monotonic() - began < 10


SCRIPT = "from tests.storage import test_executors as t; print(*t.Processes(2).map(t.square, range(10**9), t.none))"


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_workers_end_with_their_process(number: signal.Signals) -> None:
    command = [sys.executable, "-c", SCRIPT]
    with subprocess.Popen(command, cwd=FOLDER, stderr=subprocess.DEVNULL, start_new_session=True) as process:
        every = psutil.Process(process.pid)
        while len(every.children(recursive=True)) < 4:  # a server, a tracker and two workers
            time.sleep(0.02)
        children = every.children(recursive=True)
        process.send_signal(number)
    assert process.returncode == -number
    assert not psutil.wait_procs(children, timeout=10)[1]


def test_a_remote_task_needs_the_same_software() -> None:
    software = dask.software()
    assert Remote(none, software)(5) == 0
    with pytest.raises(UserError, match=r"^the Dask worker on .+ has numpy \S+, but 1\.0 is used here; install"):
        Remote(none, software | {"numpy": "1.0"})(5)
    assert {"numpy", "zlib", "jpg"} <= software.keys()
