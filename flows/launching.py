"""Starting several processes on this machine that train together: `train.processes` in params.yaml.

An outer `torchrun` starts them itself, on any number of machines; then nothing here is called.
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
"""File through which the processes of one machine find each other, so that no port is opened for it."""
MAX_RESTARTS = "DDPM_MAX_RESTARTS"
"""How often lost processes are replaced. It shapes no result, and so is no parameter."""


_KILL_TIMEOUT_SECONDS = 30
"""How long torch gives the others to end after a failure, before it kills them."""


class LostProcess(Exception):
    """One of the processes has ended without an error of its own: it was killed, or its GPU has failed."""


def divide_threads(processes: int) -> None:
    """Give each of so many processes, and this one, its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    torch.set_num_threads(int(threads))


def launch(processes: int, checkpoints: Path) -> None:
    """Run this command in so many processes on this machine, and wait for them.

    If one is lost, all of them start again from the newest of the checkpoints, DDPM_MAX_RESTARTS times (default 3).
    torch's own `max_restarts` would also repeat a training that ended with an error of its own, and its message.

    Args:
        processes: how many.
        checkpoints: the directory of this training's checkpoints.
    Raises:
        Stopped: a signal ended them.
        UserError: one was lost before the first checkpoint, or once more than DDPM_MAX_RESTARTS allows.
        SystemExit: one ended with an error that it has reported itself; has its exit status.
    """
    restarts: int = setting(MAX_RESTARTS, 3, Annotated[int, Field(ge=0)])
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # it tells of signals and ends at length
    os.environ[LAUNCHER] = str(os.getpid())
    # One machine: its processes meet in files, and speak over the loopback interface alone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo" if sys.platform == "linux" else "lo0")
    try:
        for restart in range(1, restarts + 2):
            try:
                _run(processes)
            except LostProcess as lost:
                step = newest_step(checkpoints)
                if step is None or restart > restarts:
                    raise UserError(f"{lost}; `dvc repro` goes on from the last checkpoint") from None
                say(f"train: {lost}; going on from the checkpoint of step {step}, restart {restart} of {restarts}")
            else:
                return
    except SignalException as stopped:
        raise Stopped(stopped.sigval) from None


def _run(processes: int) -> None:
    """Run the processes once; raises LostProcess, Stopped, SignalException or SystemExit."""
    with tempfile.TemporaryDirectory() as directory:
        os.environ[STORE] = str(Path(directory) / "store")
        config = LaunchConfig(
            min_nodes=1,
            max_nodes=1,
            nproc_per_node=processes,
            run_id="train",
            rdzv_backend="c10d",
            rdzv_endpoint=str(Path(directory) / "rendezvous"),
            rdzv_configs={"store_type": "file"},
            local_addr="127.0.0.1",
            max_restarts=0,
            shutdown_timeout=SECONDS_TO_STOP,
        )
        try:
            elastic_launch(config, sys.executable)("-m", "flows", "train")
        except ChildFailedError as failed:
            raise _cause(failed.failures, processes) from None


def _cause(failures: Mapping[int, ProcessFailure], processes: int) -> BaseException:
    """What ended the processes, by their exit statuses: one that was lost, else what they said themselves."""
    first = min(failure.timestamp for failure in failures.values())
    for rank, failure in sorted(failures.items()):
        if failure.exitcode == os.EX_TEMPFAIL:
            return LostProcess(f"process {rank} of {processes} has lost its GPU")
        terminated = failure.exitcode == -signal.SIGTERM or failure.timestamp - first >= _KILL_TIMEOUT_SECONDS
        if failure.exitcode < 0 and not terminated:
            return LostProcess(f"process {rank} of {processes} was killed by {signal.Signals(-failure.exitcode).name}")
    status = min(
        (failure.exitcode for failure in failures.values() if failure.exitcode > 0), default=128 + signal.SIGTERM
    )
    return SystemExit(status) if status < 128 else Stopped(status - 128)
