"""Distributed training on one machine: start `train.processes` processes.

Under `torchrun`, which starts the processes itself, on any number of machines, none of this is used.
"""

import logging
import os
import signal
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated

import torch
from pydantic import Field
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from diffusion.errors import Stopped, UserError
from diffusion.progress import say
from diffusion.training.checkpoints import newest_step
from flows.environment import setting
from flows.parent import LAUNCHER, SECONDS_TO_STOP

STORE = "DDPM_STORE"
"""File for the rendezvous of the processes, which needs no open port."""
MAX_RESTARTS = "DDPM_MAX_RESTARTS"
"""How often training restarts after losing a process. Not a parameter, since it does not affect the result."""


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
    """Run a stage, `train` or `distill`, in several processes on this machine and wait for them.

    If one is lost, all restart from the latest checkpoint, up to DDPM_MAX_RESTARTS times (default 3). torch's
    `max_restarts` is not used because it would also retry deterministic errors and repeat their messages.

    Args:
        stage: its name.
        processes: number of processes.
        checkpoints: directory of the checkpoints of this training run.
    Raises:
        Stopped: a signal stopped them.
        UserError: a process was lost before the first checkpoint, or more often than DDPM_MAX_RESTARTS allows.
        SystemExit: a process exited with an error that it has already reported; carries its exit status.
    """
    restarts: int = setting(MAX_RESTARTS, 3, Annotated[int, Field(ge=0)])
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # hide its verbose logs of signals and exits
    os.environ[LAUNCHER] = str(os.getpid())
    # On one machine, processes meet through files and communicate only over the loopback interface.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo" if sys.platform == "linux" else "lo0")
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


def _run(stage: str, processes: int) -> None:
    """Run the processes once; raises LostProcess, Stopped, SignalException or SystemExit."""
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


def _cause(failures: Mapping[int, ProcessFailure], processes: int) -> BaseException:
    """The cause of a failure, from the exit statuses: a lost process, else the error that a process reported."""
    first = min(failure.timestamp for failure in failures.values())
    for rank, failure in sorted(failures.items()):
        if failure.exitcode == os.EX_TEMPFAIL:
            return LostProcess(f"process {rank} of {processes} lost its GPU")
        terminated = failure.exitcode == -signal.SIGTERM or failure.timestamp - first >= _KILL_TIMEOUT_SECONDS
        if failure.exitcode < 0 and not terminated:
            return LostProcess(f"process {rank} of {processes} was killed by {signal.Signals(-failure.exitcode).name}")
    status = min(
        (failure.exitcode for failure in failures.values() if failure.exitcode > 0), default=128 + signal.SIGTERM
    )
    return SystemExit(status) if status < 128 else Stopped(status - 128)
