"""A Dask cluster: a scheduler and two workers that share nothing with this process but the file system."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from diffusion.errors import SystemFault, UserError
from diffusion.storage.dask import Dask
from tests.storage.test_executors import failing, killed_once, none

pytest.importorskip("distributed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed")]
ROOT = Path(__file__).parents[2]


def start(directory: Path, *arguments: str) -> subprocess.Popen[bytes]:
    directory.mkdir()
    environment = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", f"distributed.cli.dask_{arguments[0]}", *arguments[1:], "--no-dashboard"]
    return subprocess.Popen(command, cwd=directory, env=environment, stderr=subprocess.DEVNULL)


@pytest.fixture(scope="module")
def address(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    directory = tmp_path_factory.mktemp("cluster")
    facts = directory / "scheduler.json"
    processes = [
        start(directory / "scheduler", "scheduler", "--host=127.0.0.1", "--port=0", f"--scheduler-file={facts}")
    ]
    while not facts.exists():
        assert processes[0].poll() is None
        time.sleep(0.05)
    options = (
        f"--scheduler-file={facts}",
        "--nthreads=1",
        "--no-nanny",
        "--host=127.0.0.1",
        f"--local-directory={directory}",
    )
    processes += [start(directory / f"worker{number}", "worker", *options) for number in range(2)]
    yield json.loads(facts.read_text())["address"]
    for process in processes:
        process.kill()
    for process in processes:
        process.wait(timeout=30)


def content(name: str) -> tuple[int, str]:
    return os.getpid(), Path(name).read_text()


def test_tasks_are_done_elsewhere_in_the_same_folder(
    address: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    for number in range(30):
        Path(f"{number}.txt").write_text(f"text {number}")
    found = list(Dask(address).map(content, (f"{number}.txt" for number in range(30)), none))
    assert [(name, text) for name, (_, text) in found] == [(f"{n}.txt", f"text {n}") for n in range(30)]
    assert os.getpid() not in {process for _, (process, _) in found}


def test_errors_of_a_task_are_raised_here(address: str) -> None:
    with pytest.raises(SystemFault, match=r"^x\.png: cannot be read"):
        list(Dask(address).map(failing, range(20), none))


def test_a_killed_worker_costs_nothing_but_time(address: str, tmp_path: Path) -> None:
    found = list(Dask(address).map(partial(killed_once, tmp_path / "mark"), range(30), none))
    assert found == [(number, -number) for number in range(30)]
    assert (tmp_path / "mark").exists()


def test_a_scheduler_that_is_not_there_gives_one_line() -> None:
    with pytest.raises(UserError, match=r"^nowhere://x: no Dask scheduler answers \(unknown address scheme"):
        next(Dask("nowhere://x").map(none, range(3), none))


def test_without_dask_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"^tcp://x: Dask is not installed \(.+\); install the extra: `pip install"):
        next(Dask("tcp://x").map(none, range(3), none))
