"""Make a process exit when its parent does, even if the parent is killed."""

import os
import signal
import sys
import threading
import time

STOP_WITH = "DDPM_STOP_WITH"
"""Set to "stdin" by a parent that keeps the standard input of a stage open for as long as it should run."""
LAUNCHER = "DDPM_LAUNCHER"
"""Process id of the launcher of distributed training."""
SECONDS_TO_STOP = 10
"""How long a stage may take to write a checkpoint and exit after SIGTERM."""


def launched() -> bool:
    """Whether a launcher started this process; then only the launcher reports errors."""
    return os.environ.get(LAUNCHER, str(os.getpid())) != str(os.getpid())


def stop_with_parent() -> None:
    """Send this process SIGTERM when its parent exits, if the environment asks for it."""
    if os.environ.get(STOP_WITH) == "stdin":
        threading.Thread(target=_wait_for_stdin, name="stop-with-parent", daemon=True).start()
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        threading.Thread(target=_wait_for_launcher, name="stop-with-launcher", daemon=True).start()


def _wait_for_stdin() -> None:
    """Wait for the pipe to close: unlike a process id, it cannot be reused by another process."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_for_launcher() -> None:
    """Poll the parent id: a launcher starts its processes in separate sessions, without a pipe."""
    parent = int(os.environ.get(LAUNCHER, os.getppid()))
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_STOP)  # a process blocked in a collective operation handles no signal
    os.kill(os.getpid(), signal.SIGKILL)
