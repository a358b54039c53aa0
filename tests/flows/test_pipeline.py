"""What surrounds the stages of a flow run."""

import os
import signal
import subprocess
import threading
import time
from pathlib import Path

import pytest

from flows import pipeline

TRACK = """#!/bin/sh
trap 'touch stopped; exit 143' TERM
touch started
while :; do sleep 0.05; done
"""


def test_a_run_cancelled_while_it_is_tracked_lets_the_command_mark_its_record(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = tmp_path / "python"
    command.write_text(TRACK)
    command.chmod(0o755)
    monkeypatch.setattr(pipeline.sys, "executable", str(command))

    waits, communicate = threading.Event(), subprocess.Popen.communicate

    def waiting(process: "subprocess.Popen[str]") -> tuple[str, str]:
        waits.set()
        return communicate(process)

    monkeypatch.setattr(subprocess.Popen, "communicate", waiting)

    def cancel() -> None:
        waits.wait(60)
        while not (tmp_path / "started").exists():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGINT)

    canceller = threading.Thread(target=cancel)
    canceller.start()
    with pytest.raises(KeyboardInterrupt):
        pipeline._track(tmp_path, False, print, print)
    canceller.join()
    assert (tmp_path / "stopped").exists()
