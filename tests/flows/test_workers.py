"""Where the stages shard and pairs do their tasks, by the environment."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import psutil
import pytest

from diffusion.errors import UserError
from diffusion.storage.dask import Dask
from diffusion.storage.executors import OWN_PROCESS, usable_cores
from diffusion.storage.processes import Processes
from flows.workers import SCHEDULER, SMALL, WORKERS, executor
from tests.flows.test_data_stages import digests
from tests.training import trees

ADDRESS = "tcp://127.0.0.1:9"


def test_the_executor_depends_on_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    assert executor(SMALL) == OWN_PROCESS
    assert executor(SMALL + 1) == (Processes(usable_cores()) if usable_cores() > 1 else OWN_PROCESS)
    for workers, expected in (("1", OWN_PROCESS), ("5", Processes(5))):
        monkeypatch.setenv(WORKERS, workers)
        assert executor(SMALL + 1) == executor(1) == expected
    monkeypatch.setenv(SCHEDULER, ADDRESS)
    assert executor(SMALL + 1) == executor(1) == Dask(ADDRESS)


@pytest.mark.parametrize("workers", ["0", "-1", "many", "", "1.5"])
def test_a_wrong_number_gives_one_line(monkeypatch: pytest.MonkeyPatch, workers: str) -> None:
    monkeypatch.setenv(WORKERS, workers)
    with pytest.raises(UserError, match=rf"^{WORKERS}: .+ \(got '{workers}'\)$"):
        executor(1)


@pytest.fixture
def large_tree(digits_tree: Path) -> Path:
    """A tree with more images than SMALL."""
    images = np.random.default_rng(0).integers(0, 256, (SMALL + 500, 28, 28, 3), dtype=np.uint8)
    np.savez(digits_tree / "data" / "raw" / "digits.npz", images=images)
    return digits_tree


@pytest.mark.parametrize("stage", ["shard", "pairs"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_stage_and_its_workers(large_tree: Path, stage: str, number: signal.Signals) -> None:
    if stage == "pairs":
        assert trees.run(large_tree, "shard").returncode == 0
    before = sorted(large_tree.rglob("*"))
    environment = os.environ | trees.ENVIRONMENT | {WORKERS: "2"}
    command = [sys.executable, "-m", "flows", stage]
    with subprocess.Popen(
        command, cwd=large_tree, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    ) as process:
        main = psutil.Process(process.pid)
        while len(children := main.children(recursive=True)) < 4:  # a server, a tracker and two workers
            time.sleep(0.01)
        os.killpg(process.pid, number)  # as a terminal does, and flows/dvc_stage.py
        _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    assert errors == f"ddpm {stage}: {'interrupted' if number == signal.SIGINT else 'stopped by SIGTERM'}\n"
    assert not psutil.wait_procs(children, timeout=10)[1]
    assert sorted(large_tree.rglob("*")) == before


def test_two_workers_write_the_same_files(large_tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for workers in ("1", "2"):
        monkeypatch.setenv(WORKERS, workers)
        for stage in ("shard", "pairs"):
            done = trees.run(large_tree, stage)
            assert done.returncode == 0, done.stderr
        found.append(digests(large_tree / "data" / "shards") | digests(large_tree / "data" / "pairs"))
    assert found[0] == found[1]
