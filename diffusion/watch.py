"""A stage that a flow run started ends with it, even when the flow's process is killed outright."""

import os
import signal
import sys
import threading

STOP_WITH = "DDPM_STOP_WITH"
"""Set to "stdin" by whoever starts a stage and keeps its standard input open for as long as it should run."""


def stop_with_parent() -> None:
    """Watch standard input, where the environment says so: its end is taken for SIGTERM.

    Unlike the parent's process id, which may be given to another process, a pipe that closes cannot mislead.
    """
    if os.environ.get(STOP_WITH) != "stdin":
        return

    def watch() -> None:
        while os.read(sys.stdin.fileno(), 4096):
            pass
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, name="stop-with-parent", daemon=True).start()
