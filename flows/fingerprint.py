"""The fingerprint of a training run, which identifies its checkpoints and guards against concurrent writers."""

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import numpy as np
import torch

from diffusion.progress import say
from diffusion.storage.files import SUMS, sha256, write_json, writing
from diffusion.training.checkpoints import newest_step
from diffusion.training.distributed import World
from flows import dvc_yaml
from flows.params import Params
from flows.paths import Paths

KEPT_TRAININGS = 5
"""Number of interrupted training runs whose checkpoints are kept."""
FACTS = "fingerprint.json"
"""File next to the checkpoints with the facts behind the fingerprint."""
DETERMINING: dict[str, Any] = {
    "train": {"seed", "process", "network", "train"},
    "distill": {"seed": True, "distill": True, "sample": {"threshold"}},
}
"""The parameters that determine what a stage trains."""
SETUP = {
    "device": "device: {}",
    "processes": "{stage}.processes: {}",
    "threads": "OMP_NUM_THREADS={}",
    "instructions": "the instructions {}",
    "torch": "torch=={}",
    "numpy": "numpy=={}",
}
"""Facts that affect only the rounding of a result, and how to set each of them."""


def training_facts(stage: str, params: Params, paths: Paths, device: torch.device, world: World) -> dict[str, Any]:
    """Everything that determines the result of `train` or `distill`: parameters, inputs, code, and the hardware setup.

    This includes the number of threads and the vector instructions: sums are split among threads and lanes, so the
    weights differ in their last bits after a few steps.
    """
    determining = params.model_dump(mode="json", include=DETERMINING[stage])
    del determining[stage]["processes"]  # recorded below as world.size, which torchrun may set instead
    start = determining[stage].pop("start_from", "")  # its weights matter, not its name
    others = {"teacher": paths.teacher} if stage == "distill" else {"start": paths.imported / start} if start else {}
    return {
        "stage": stage,
        "params": determining,
        **{name: sha256(directory / SUMS) for name, directory in others.items()},
        "pairs": sha256(paths.pairs / "manifest.json"),
        "code": {str(file.relative_to(dvc_yaml.ROOT)): sha256(file) for file in dvc_yaml.code(stage)},
        "device": device.type,
        "processes": world.size,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "instructions": instructions() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def instructions() -> str:
    """The vector instructions torch uses, and the environment variables that limit those of its libraries."""
    limits = [f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA", "MKL_CBWR") if name in os.environ]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *limits])


def training_fingerprint(facts: dict[str, Any]) -> str:
    """Digest of the facts, which names the training run."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def exclusive(checkpoints: Path, facts: dict[str, Any]) -> Iterator[None]:
    """Hold exclusive write access to the checkpoints of the training run with these facts; waits for others."""
    directory = checkpoints / training_fingerprint(facts)
    with writing(directory):
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock = lock_of(directory)
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            say(f"{facts['stage']}: another process is running the same training; waiting for it to finish")
            held = lock.acquire()
    with held:
        if not newest_step(directory):
            for line in unused_checkpoints(checkpoints, facts):
                say(f"{facts['stage']}: {line}")
        write_json(directory / FACTS, facts)
        drop_old_trainings(checkpoints)
        yield


def unused_checkpoints(checkpoints: Path, facts: dict[str, Any]) -> list[str]:
    """Describe the checkpoints of interrupted training runs that differ from this one only in their setup."""
    lines = []
    for path in sorted(checkpoints.glob(f"*/{FACTS}")):
        try:
            other = json.loads(path.read_bytes())
        except (OSError, ValueError):  # being deleted or written by another process
            continue
        step = newest_step(path.parent)
        if step and {**facts, **dict.fromkeys(SETUP)} == {**other, **dict.fromkeys(SETUP)}:
            # The number of threads and the instructions do not matter on a GPU, and are null there.
            differ = [name for name in SETUP if None not in (facts[name], other[name]) and facts[name] != other[name]]
            made = ", ".join(SETUP[name].format(other[name], stage=facts["stage"]) for name in differ)
            now = ", ".join(str(facts[name]) for name in differ)
            lines.append(
                f"not resuming from the checkpoint at step {step}: it was made with {made} (now {now}), so the result "
                f"would not be bit-identical; train with {made} to resume from it"
            )
    return lines


def lock_of(directory: Path) -> filelock.FileLock:
    """The lock held by the training run whose checkpoints are in `directory`."""
    return filelock.FileLock(directory.with_suffix(".lock"))


def drop_old_trainings(checkpoints: Path) -> None:
    """Delete all but the newest KEPT_TRAININGS interrupted training runs; those in progress are never deleted."""
    with suppress(FileNotFoundError):  # another process is doing the same
        trainings = sorted((path for path in checkpoints.iterdir() if path.is_dir()), key=os.path.getmtime)
        for directory in trainings[:-KEPT_TRAININGS]:
            with suppress(filelock.Timeout), lock_of(directory).acquire(timeout=0):
                shutil.rmtree(directory)
