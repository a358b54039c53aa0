"""Finding processes by an environment variable, which their children inherit, and terminating them."""

import os
from contextlib import suppress

import psutil

SECONDS_TO_END = 30.0
"""How long a process may take to exit; a training writes a checkpoint first."""


def having(variable: str, value: str) -> list[psutil.Process]:
    """Processes whose environment has this value of a variable, except this process and its ancestors."""
    own = {os.getpid(), *(parent.pid for parent in psutil.Process().parents())}
    found = []
    for process in psutil.process_iter():
        with suppress(psutil.Error):  # another user's, or it has just exited
            if process.pid not in own and process.environ().get(variable) == value:
                found.append(process)
    return found


def listening(processes: list[psutil.Process], port: int) -> bool:
    """Whether one of these processes listens on a TCP port."""
    for process in processes:
        with suppress(psutil.Error):
            for each in process.net_connections("tcp"):
                if each.status == psutil.CONN_LISTEN and each.laddr.port == port:
                    return True
    return False


def end(processes: list[psutil.Process]) -> bool:
    """Send SIGTERM, then SIGKILL to what has not exited in time; returns whether there was any process."""
    for send, seconds in ((psutil.Process.terminate, SECONDS_TO_END), (psutil.Process.kill, 10.0)):
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                send(process)
        if not psutil.wait_procs(processes, timeout=seconds)[1]:
            break
    return bool(processes)
