"""Finding processes by their environment, and ending them."""

import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import psutil
import pytest

from flows import processes

PARENT = """
import subprocess, sys
print(subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid, flush=True)
{ignore}
import time
time.sleep(60)
"""
DEAF = "import signal; signal.signal(signal.SIGTERM, signal.SIG_IGN)"


@pytest.fixture(params=["", DEAF])
def pair(request: pytest.FixtureRequest) -> Iterator[list[int]]:
    """A process with the variable, which may ignore SIGTERM, and its child."""
    command = [sys.executable, "-c", PARENT.format(ignore=f"{request.param}\nprint(flush=True)")]
    environment = os.environ | {"DDPM_TEST": "mine"}
    with ExitStack() as stack:
        process = stack.enter_context(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment))
        stack.callback(process.kill)
        assert process.stdout
        child = int(process.stdout.readline())
        if request.param:
            process.stdout.readline()
        yield [process.pid, child]


def test_processes_with_a_variable_and_their_children_are_ended(
    pair: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(processes, "SECONDS_TO_END", 1.0)
    assert processes.having("DDPM_TEST", "other") == []
    found = processes.having("DDPM_TEST", "mine")
    assert sorted(process.pid for process in found) == sorted(pair)
    assert processes.end(found)
    assert all(not process.is_running() or process.status() == psutil.STATUS_ZOMBIE for process in found)
    assert not processes.end(processes.having("DDPM_TEST", "mine"))


def test_it_finds_neither_itself_nor_its_parents(root: Path) -> None:
    find = "from flows import processes; print(processes.having('DDPM_TEST', 'mine'))"
    start = f"import subprocess, sys; subprocess.run([sys.executable, '-c', {find!r}], check=True)"
    environment = os.environ | {"DDPM_TEST": "mine"}
    done = subprocess.run([sys.executable, "-c", start], cwd=root, env=environment, stdout=subprocess.PIPE, check=True)
    assert done.stdout == b"[]\n"
