"""A process ends with the one that started it, even when that one is killed outright."""

import os
import signal
import sys
import threading
import time

STOP_WITH = "DDPM_STOP_WITH"
"""Set to "stdin" by whoever starts a stage and keeps its standard input open for as long as it should run."""
LAUNCHER = "DDPM_LAUNCHER"
"""The process id of a training that has started others, to train together."""
SECONDS_TO_STOP = 10
"""How long a stage may take to write a checkpoint and end, once told to."""


def launched() -> bool:
    """Whether this process is one of several that a training has started; that one speaks for all."""
    return os.environ.get(LAUNCHER, str(os.getpid())) != str(os.getpid())


def stop_with_parent() -> None:
    """Watch whoever started this process, where the environment says so: its end is taken for SIGTERM."""
    if os.environ.get(STOP_WITH) == "stdin":
        threading.Thread(target=_wait_for_stdin, name="stop-with-parent", daemon=True).start()
    if {"RANK", "WORLD_SIZE"} <= os.environ.keys():
        threading.Thread(target=_wait_for_launcher, name="stop-with-launcher", daemon=True).start()


def _wait_for_stdin() -> None:
    """Unlike the parent's process id, which may be given to another process, a pipe that closes cannot mislead."""
    while os.read(sys.stdin.fileno(), 4096):
        pass
    os.kill(os.getpid(), signal.SIGTERM)


def _wait_for_launcher() -> None:
    """A launcher's processes are in sessions of their own, and it starts them without a pipe."""
    parent = int(os.environ.get(LAUNCHER, os.getppid()))
    while os.getppid() == parent:
        time.sleep(1.0)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(SECONDS_TO_STOP)  # one that waits for a lost process writes no checkpoint, and hears no signal
    os.kill(os.getpid(), signal.SIGKILL)
