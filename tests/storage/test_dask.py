"""Tasks on the workers of a Dask cluster."""

import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import numpy as np
import psutil
import pytest

from diffusion.errors import SystemFault, UserError
from diffusion.storage.dask import Dask
from tests.storage.cluster import Cluster, cluster
from tests.storage.test_executors import failing, killed_once, none

pytest.importorskip("distributed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed")]


@pytest.fixture(scope="module")
def started(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    with cluster(tmp_path_factory.mktemp("cluster"), 2) as found:
        yield found


@pytest.fixture
def address(started: Cluster) -> str:
    return started.address


def same(content: bytes) -> bytes:
    return content


def doubled(content: bytes) -> tuple[int, bytes]:
    return os.getpid(), 2 * content


def test_tasks_are_done_elsewhere(address: str) -> None:
    tasks = [bytes([number]) * 6_000_000 for number in range(6)]  # Dask warns of tasks of more than 10 MB
    found = list(Dask(address).map(doubled, (2 * task for task in tasks), len))
    assert [result for _, (_, result) in found] == [4 * task for task in tasks]
    assert os.getpid() not in {process for _, (process, _) in found}


def test_memory_does_not_grow_with_the_number_of_tasks(started: Cluster) -> None:
    def memory() -> list[int]:
        return [psutil.Process(process).memory_info().rss for process in (os.getpid(), started.scheduler.pid)]

    done = Dask(started.address).map(same, (bytes(900_000) for _ in range(300)), len)
    used = [memory() for _ in done]
    assert np.ptp(used[20:], axis=0).max() < 100_000_000  # all tasks have 270 MB


def test_errors_of_a_task_are_raised_here(address: str) -> None:
    with pytest.raises(SystemFault, match=r"^x\.png: cannot be read"):
        list(Dask(address).map(failing, range(20), none))


def test_a_killed_worker_costs_nothing_but_time(address: str, tmp_path: Path) -> None:
    found = list(Dask(address).map(partial(killed_once, tmp_path / "mark"), range(30), none))
    assert found == [(number, -number) for number in range(30)]
    assert (tmp_path / "mark").exists()


@pytest.mark.parametrize(
    ("address", "reason"), [("nowhere://x", "unknown address scheme"), ("tls://127.0.0.1:9", "TLS expects")]
)
def test_a_scheduler_that_cannot_be_reached_gives_one_line(address: str, reason: str) -> None:
    with pytest.raises(UserError, match=rf"^{address}: no Dask scheduler answers \({reason}"):
        next(Dask(address).map(none, range(3), none))


def test_without_dask_the_message_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "distributed", None)
    with pytest.raises(UserError, match=r"^tcp://x: Dask is not installed \(.+\); install the extra: `pip install"):
        next(Dask("tcp://x").map(none, range(3), none))
