"""Starting several processes on this machine that train together: `train.processes` in params.yaml.

An outer `torchrun` starts them itself, on any number of machines; then nothing here is called.
"""

import logging
import os
import signal
import sys
import tempfile
from pathlib import Path

import torch
from torch.distributed.elastic.multiprocessing.api import SignalException
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
from torch.distributed.launcher.api import LaunchConfig, elastic_launch

from diffusion.errors import Stopped, UserError
from flows.parent import LAUNCHER, SECONDS_TO_STOP

STORE = "DDPM_STORE"
"""File through which the processes of one machine find each other, so that no port is opened for it."""


def divide_threads(processes: int) -> None:
    """Give each of so many processes, and this one, its share of the cores, unless OMP_NUM_THREADS says otherwise."""
    cores = len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
    threads = os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // processes)))
    torch.set_num_threads(int(threads))


def launch(processes: int) -> None:
    """Run this command in so many processes on this machine, and wait for them.

    Raises Stopped after a signal that ended them, UserError if one was killed, and SystemExit with the status of one
    that has said itself why it failed.
    """
    for name in logging.root.manager.loggerDict:
        if name.startswith("torch.distributed.elastic"):
            logging.getLogger(name).setLevel(logging.CRITICAL)  # it tells of signals and ends at length
    os.environ[LAUNCHER] = str(os.getpid())
    # One machine: its processes meet in files, and speak over the loopback interface alone.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, "lo" if sys.platform == "linux" else "lo0")
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
        except SignalException as stopped:
            raise Stopped(stopped.sigval) from None
        except ChildFailedError as failed:
            # The one that was killed, if there is one: the others only lost it, or were told to end.
            rank, failure = min(failed.failures.items(), key=lambda item: _blame(item[1].exitcode))
            if failure.exitcode >= 0:
                raise SystemExit(failure.exitcode) from None
            raise UserError(
                f"process {rank} of {processes} was killed by {signal.Signals(-failure.exitcode).name}; "
                "`dvc repro` goes on from the last checkpoint"
            ) from None


def _blame(exitcode: int) -> tuple[bool, int]:
    """Sorts first what another process cannot have caused: signals (below 0), but for the launcher's SIGTERM."""
    return exitcode == -signal.SIGTERM, exitcode
