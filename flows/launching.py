"""Distributed training: start `train.processes` processes on this machine, or on each of several nodes (see nodes.py).

Under `torchrun`, which starts the processes itself, on any number of machines, none of this is used.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch.distributed import DistNetworkError, DistStoreError
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from diffusion.errors import LostConnection, Stopped, UserError
from diffusion.progress import say
from diffusion.training.checkpoints import newest_step
from flows import nodes
from flows.environment import setting
from flows.nodes import Meeting
from flows.parent import LAUNCHER, SECONDS_TO_STOP

STORE = "DDPM_STORE"
"""File for the rendezvous of the processes, which needs no open port."""
MAX_RESTARTS = "DDPM_MAX_RESTARTS"
"""How often training restarts after losing a process. Not a parameter, since it does not affect the result."""

_SECONDS_TO_MEET = 900
"""How long a node waits for the others."""
_KILL_TIMEOUT_SECONDS = 30
"""How long torch waits for the other processes to exit after a failure before it kills them."""


class LostProcess(Exception):
    """A process was killed, or its GPU failed; retrying may help."""


def divide_threads(processes: int) -> None:
    """Divide the cores evenly among `processes`, unless OMP_NUM_THREADS is set."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    torch.set_num_threads(int(threads))


def launch(stage: str, processes: int, checkpoints: Path) -> None:
    """Run a stage, `train` or `distill`, in several processes, and wait for them.

    If one is lost, all restart from the latest checkpoint, up to DDPM_MAX_RESTARTS times (default 3). torch's
    `max_restarts` is not used because it would also retry deterministic errors and repeat their messages.

    Args:
        stage: its name.
        processes: number of processes on this machine, and on each of the other nodes.
        checkpoints: directory of the checkpoints of this training run.
    Raises:
        Stopped: a signal stopped them.
        UserError: a process was lost before the first checkpoint, or more often than DDPM_MAX_RESTARTS allows.
        SystemExit: a process exited with an error that it has already reported; carries its exit status.
    """
    restarts: int = setting(MAX_RESTARTS, 3, Annotated[int, Field(ge=0)])
    _prepare()
    try:
        for restart in range(1, restarts + 2):
            try:
                _run(stage, processes)
            except LostProcess as lost:
                step = newest_step(checkpoints)
                if step is None or restart > restarts:
                    raise UserError(f"{lost}; `dvc repro` resumes from the last checkpoint") from None
                say(f"{stage}: {lost}; resuming from the checkpoint at step {step} (restart {restart} of {restarts})")
            else:
                return
    except SignalException as stopped:
        raise Stopped(stopped.sigval) from None


def _prepare() -> None:
    """Set what the processes started by this one read."""
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # hide its verbose logs of signals and exits
    os.environ[LAUNCHER] = str(os.getpid())


def _run(stage: str, processes: int) -> None:
    """Run the processes once; raises LostProcess, UserError, Stopped, SignalException or SystemExit."""
    if nodes.number() > 1:
        with nodes.announced(stage, processes) as meeting:
            _meet(meeting, node=0)
        return
    # On one machine, processes meet through files and communicate only over the loopback interface.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo" if sys.platform == "linux" else "lo0")
    with tempfile.TemporaryDirectory() as directory:
        os.environ[STORE] = str(Path(directory) / "store")
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id=stage,
            rdzv_backend="c10d",
            rdzv_endpoint=str(Path(directory) / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=0,
            shutdown_timeout=SECONDS_TO_STOP,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "flows", stage)
        except ChildFailedError as failed:
            raise _cause(failed.failures, processes) from None


def _meet(meeting: Meeting, node: int) -> None:
    """Run this node's processes once, as `torchrun --nnodes N --node-rank NODE --master-addr ...` does.

    Raises LostProcess, UserError, SignalException or SystemExit.
    """
    config = LaunchConfig(
        min_nodes=meeting.nodes,
        max_nodes=meeting.nodes,
        nproc_per_node=meeting.processes,
        run_id=meeting.stage,
        rdzv_backend="static",
        rdzv_endpoint=meeting.endpoint,
        rdzv_configs={"rank": node, "timeout": _SECONDS_TO_MEET},
        max_restarts=0,
        shutdown_timeout=SECONDS_TO_STOP,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "flows", meeting.stage)
    except DistNetworkError as error:
        raise UserError(
            f"{meeting.stage}: no connection at {meeting.endpoint}, the first node ({str(error).splitlines()[0]}); do "
            "network policies allow it?"
        ) from None
    except DistStoreError:
        raise UserError(
            f"{meeting.stage}: not all of the {meeting.nodes} nodes came within {_SECONDS_TO_MEET // 60} minutes; does "
            "the cluster have as many free GPUs as they ask for?"
        ) from None
    except ChildFailedError as failed:
        cause = _cause(failed.failures, meeting.nodes * meeting.processes)
        # Only this process would tell those of its own node to stop.
        raise LostProcess("another node was stopped") if isinstance(cause, Stopped) else cause from None


def _cause(failures: Mapping[int, ProcessFailure], processes: int) -> BaseException:
    """The cause of a failure, from the exit statuses: a lost process, else the error that a process reported."""
    first = min(failure.timestamp for failure in failures.values())
    for rank, failure in sorted(failures.items()):
        if failure.exitcode == os.EX_TEMPFAIL:
            return LostProcess(f"process {rank} of {processes} lost its GPU")
        terminated = failure.exitcode == -signal.SIGTERM or failure.timestamp - first >= _KILL_TIMEOUT_SECONDS
        if failure.exitcode < 0 and not terminated:
            return LostProcess(f"process {rank} of {processes} was killed by {signal.Signals(-failure.exitcode).name}")
    statuses = {failure.exitcode for failure in failures.values() if failure.exitcode > 0}
    if statuses == {LostConnection.status}:
        return LostProcess("a process on another node was lost")
    status = min(statuses - {LostConnection.status}, default=128 + signal.SIGTERM)
    return SystemExit(status) if status < 128 else Stopped(status - 128)


def main(argv: Sequence[str] | None = None) -> int:
    """Take part in a training that the first node has announced, given as JSON; nodes.py runs this."""
    (content,) = sys.argv[1:] if argv is None else argv
    meeting = Meeting.model_validate_json(content)
    divide_threads(meeting.processes)
    _prepare()
    try:
        _meet(meeting, int(os.environ[nodes.INDEX]))
    except UserError as error:
        say(str(error))
    except LostProcess:  # the first node says so
        pass
    except SignalException as stopped:
        return 128 + stopped.sigval
    else:
        return 0
    return 1


if __name__ == "__main__":
    sys.exit(main())
