"""A stage as a child process: lines, outcome, failure, cancellation."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from diffusion.errors import UserError
from flows import dvc_stage, workspace

pytestmark = pytest.mark.slow

SLOW = """
import signal, sys, time
def stop(*_):
    print("checkpoint written", flush=True)
    sys.exit(143)
signal.signal(signal.SIGTERM, stop)
print("started", flush=True)
time.sleep(60)
"""

DEAF = """
import os, signal, time
signal.signal(signal.SIGTERM, signal.SIG_IGN)
print(f"pid {os.getpid()}", flush=True)
time.sleep(60)
"""

WATCHED = """
import os
from flows.parent import stop_with_parent
stop_with_parent()
print(f"pid {os.getpid()}", flush=True)
"""

PARENT = """
from pathlib import Path
from diffusion.errors import UserError
from flows import dvc_stage, workspace
dvc_stage.run("shard", Path(), lambda line: print(line, flush=True))
"""


def test_says_whether_a_stage_was_run_or_cached_and_passes_its_lines_on(repository: Path) -> None:
    lines: list[str] = []
    assert dvc_stage.run("shard", repository, lines.append) == "run"
    assert lines == ["Running stage 'shard':", "shard done"]  # and nothing of git or a remote
    assert dvc_stage.run("shard", repository, lines.append) == "cached"
    (repository / "data" / "shards" / "result").unlink()
    assert dvc_stage.run("shard", repository, lines.append) == "cached"


def test_settings_reach_the_stage(repository: Path) -> None:
    (repository / "stage.py").write_text("import os; raise SystemExit(os.environ['DDPM_DASK_SCHEDULER'])")
    with pytest.raises(dvc_stage.StageError, match=r"^tcp://x:1$"):
        dvc_stage.run("shard", repository, print, {"DDPM_DASK_SCHEDULER": "tcp://x:1"})


@pytest.mark.parametrize(
    ("code", "message"),
    [
        ("raise ValueError('wrong shape')", "ValueError: wrong shape"),
        ("import sys; sys.exit('ddpm shard: error: params.yaml: no')", "ddpm shard: error: params.yaml: no"),
        ("import sys; sys.exit('ddpm export-student: error: no\\nend')", "ddpm export-student: error: no"),
        ("print('last words'); raise SystemExit(3)", "last words"),
        ("pass", "output 'data/shards' does not exist"),
    ],
)
def test_the_stages_own_last_error_line_is_the_message(repository: Path, code: str, message: str) -> None:
    (repository / "stage.py").write_text(code)
    with pytest.raises(dvc_stage.StageError) as failure:
        dvc_stage.run("shard", repository, print)
    assert str(failure.value).endswith(message)
    assert type(failure.value) is dvc_stage.StageError


def test_of_dvcs_own_error_the_message_says_what_happened_and_not_where_to_get_help(repository: Path) -> None:
    (repository / "file").touch()
    workspace.dvc(repository, "cache", "dir", "--local", "file")
    with pytest.raises(dvc_stage.StageError, match=r"^failed to reproduce 'shard': .*Not a directory: '.*/file/"):
        dvc_stage.run("shard", repository, print)
    (repository / "data/raw/mine").touch()
    with pytest.raises(UserError, match=r"^dvc add data/raw/mine: unexpected error - .*Not a directory: '.*/file/.*'$"):
        workspace.dvc(repository, "add", "data/raw/mine")


@pytest.mark.parametrize(
    ("message", "passing"),
    [
        ("Unable to acquire lock. Most likely another DVC process is running", True),
        ("ConnectionError: connection lost", True),
        ("requests.exceptions.ReadTimeout: 10 s", True),
        ('s3://a/b.zip: cannot be read (Could not connect to the endpoint URL: "http://127.0.0.1:1/")', True),
        ("ValueError: wrong shape", False),
        ("ddpm train: error: params.yaml: train.steps: no such parameter", False),
    ],
)
def test_only_what_passes_by_itself_is_retried(message: str, passing: bool) -> None:
    assert dvc_stage.passes_by_itself(message) is passing


def test_a_carriage_return_ends_a_line(repository: Path) -> None:
    (repository / "stage.py").write_text("print('10%\\r20%\\r\\n30%')\nimport os; os.mkdir('data/shards')")
    lines: list[str] = []
    dvc_stage.run("shard", repository, lines.append)
    start = lines.index("10%")
    assert lines[start : start + 3] == ["10%", "20%", "30%"]


def test_an_interruption_ends_the_stage_which_may_write_a_checkpoint(repository: Path) -> None:
    (repository / "stage.py").write_text(SLOW)
    lines: list[str] = []

    def interrupt(line: str) -> None:
        lines.append(line)
        if line == "started":
            raise KeyboardInterrupt

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        dvc_stage.run("shard", repository, interrupt)
    assert lines[-1] == "checkpoint written"
    assert time.monotonic() - began < dvc_stage.SECONDS_TO_STOP


def test_a_check_ends_a_stage_that_is_silent(repository: Path) -> None:
    (repository / "stage.py").write_text(SLOW)
    lines: list[str] = []

    def check() -> None:
        if lines[-1:] == ["started"]:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dvc_stage.run("shard", repository, lines.append, check=check)
    assert lines[-1] == "checkpoint written"


def test_an_error_over_its_lines_does_not_keep_a_stage_from_its_checkpoint(repository: Path) -> None:
    (repository / "stage.py").write_text(
        SLOW.replace("    print", "    time.sleep(0.5)\n    print", 1).replace(
            "    sys.exit", "    time.sleep(0.5)\n    open('checkpoint', 'w')\n    sys.exit"
        )
    )

    def fail(line: str) -> None:
        if line in ("started", "checkpoint written"):
            raise ConnectionError(line)

    with pytest.raises(ConnectionError, match="started"):
        dvc_stage.run("shard", repository, fail)
    assert (repository / "checkpoint").exists()


def test_a_stage_that_does_not_listen_is_killed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dvc_stage, "SECONDS_TO_STOP", 0.5)
    (repository / "stage.py").write_text(DEAF)
    pids: list[int] = []

    def interrupt(line: str) -> None:
        if line.startswith("pid "):
            pids.append(int(line[4:]))
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        dvc_stage.run("shard", repository, interrupt)
    assert _gone(pids[0])


def test_a_stage_ends_when_the_process_that_started_it_is_killed(repository: Path, root: Path) -> None:
    (repository / "stage.py").write_text(WATCHED + SLOW)
    environment = os.environ | {"PYTHONPATH": str(root)}
    with subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, env=environment) as parent:
        assert parent.stdout
        pid = next(int(line[4:]) for line in parent.stdout if line.startswith("pid "))
        parent.send_signal(signal.SIGKILL)
    assert _gone(pid)


def _gone(pid: int, seconds: float = 10) -> bool:
    """Whether a process ends in time; one that ended but was not waited for (a zombie) counts as gone."""
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        try:
            if psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
                return True
        except psutil.NoSuchProcess:
            return True
        time.sleep(0.1)
    return False
