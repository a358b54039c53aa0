"""Training on several nodes that share a folder, as the pods of an indexed Job of Kubernetes do.

    python -m flows.nodes --nodes N --folder FOLDER --address ADDRESS COMMAND...

runs COMMAND, the flow, on the first of N nodes. Each time it starts a training, it writes where the processes meet into
the folder; the other nodes wait for that, and start their share of the processes. They do so until they are stopped,
as the pods of a Job are when its first pod has ended.
"""

import argparse
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Annotated
from uuid import uuid4

from pydantic import BaseModel, Field

from diffusion.errors import UserError
from diffusion.progress import say
from diffusion.storage.files import write_json
from flows.environment import setting
from flows.parent import SECONDS_TO_STOP

NODES = "DDPM_NODES"
"""Number of nodes that train together; `train.processes` is the number of processes on each. This command sets it, and
the two below, for the flow."""
FOLDER = "DDPM_NODES_FOLDER"
"""A folder that these nodes share, and no others."""
ADDRESS = "DDPM_NODE_ADDRESS"
"""Address of the first node, at which the others reach it."""
INDEX = "JOB_COMPLETION_INDEX"
"""Index of this node, which Kubernetes sets in the pods of an indexed Job."""
_SECONDS_TO_LOOK = 1.0


class Meeting(BaseModel):
    """Where and how the processes of one start of a training meet."""

    stage: str
    directory: str
    """The run's workspace, or the working tree."""
    processes: int
    """On each node."""
    nodes: int
    endpoint: str
    """Address and port of the first node."""


def number() -> int:
    """The number of nodes; raises UserError if DDPM_NODES is invalid."""
    nodes: int = setting(NODES, 1, Annotated[int, Field(ge=1)])
    return nodes


@contextmanager
def announced(stage: str, processes: int) -> Iterator[Meeting]:
    """Tell the other nodes to take part in a training, for as long as the block lasts; for the first node."""
    address, folder = os.environ[ADDRESS], Path(os.environ[FOLDER])
    with socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET) as free:
        free.bind((address, 0))
        port = free.getsockname()[1]
    endpoint = f"[{address}]:{port}" if ":" in address else f"{address}:{port}"
    meeting = Meeting(stage=stage, directory=str(Path.cwd()), processes=processes, nodes=number(), endpoint=endpoint)
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{uuid4()}.json"
    write_json(file, meeting.model_dump())
    try:
        yield meeting
    finally:
        file.unlink(missing_ok=True)
        with suppress(OSError):  # not empty: another training runs
            folder.rmdir()


def take_part(folder: Path) -> None:
    """Start this node's processes of every training that the first node announces; never returns."""
    known: set[Path] = set()
    while True:
        for file in set(folder.glob("*.json")) - known:
            known.add(file)
            try:
                content = file.read_text()
            except FileNotFoundError:  # it has ended meanwhile
                continue
            meeting = Meeting.model_validate_json(content)
            say(f"{meeting.stage}: taking part in {meeting.directory}")
            _run([sys.executable, "-m", "flows.launching", content], meeting.directory, file)
        time.sleep(_SECONDS_TO_LOOK)


def _run(command: Sequence[str], directory: str, announcement: Path) -> None:
    """Run a command for as long as there is the announcement. How it ends concerns the first node alone."""
    process = subprocess.Popen(command, cwd=directory, stdin=subprocess.DEVNULL)
    try:
        while process.poll() is None and announcement.exists():
            time.sleep(_SECONDS_TO_LOOK)
        with suppress(subprocess.TimeoutExpired):
            process.wait(SECONDS_TO_STOP)
    finally:
        process.terminate()
        try:
            process.wait(2 * SECONDS_TO_STOP)  # its own processes may take half of that
        except subprocess.TimeoutExpired:  # it waits for the others to come
            process.kill()
            process.wait()


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m flows.nodes", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--nodes", required=True, help="number of nodes")
    parser.add_argument("--folder", required=True, type=Path, help="a folder that these nodes share, and no others")
    parser.add_argument("--address", required=True, help="address of this node, at which the others reach it")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what the first node runs")
    given = parser.parse_args(argv)
    if not given.command:
        parser.error("the command is missing")
    os.environ |= {NODES: given.nodes, FOLDER: str(given.folder.absolute()), ADDRESS: given.address}
    try:
        if number() == 1 or setting(INDEX, 0, Annotated[int, Field(ge=0)]) == 0:
            os.execvp(given.command[0], given.command)
        # The first process of a container ignores signals that it does not handle.
        signal.signal(signal.SIGTERM, lambda received, _: sys.exit(128 + received))
        take_part(given.folder)
    except (UserError, OSError) as error:
        print(f"flows.nodes: error: {error}", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
