"""The fingerprint of a training, which tells whose checkpoints are whose, and who may write them."""

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
from diffusion.storage.files import sha256, write_json, writing
from diffusion.training.checkpoints import newest_step
from diffusion.training.distributed import World
from flows import dvc_yaml
from flows.params import Params
from flows.paths import Paths

KEPT_TRAININGS = 5
"""Interrupted trainings whose checkpoints are kept."""
FACTS = "fingerprint.json"
"""What a fingerprint was made of, beside the checkpoints."""
SETUP = {
    "device": "device: {}",
    "processes": "train.processes: {}",
    "threads": "OMP_NUM_THREADS={}",
    "instructions": "the instructions {}",
    "torch": "torch=={}",
    "numpy": "numpy=={}",
}
"""The facts of a fingerprint that change only the rounding of a result, and how each is chosen."""


def training_facts(params: Params, paths: Paths, device: torch.device, world: World) -> dict[str, Any]:
    """Everything that shapes the result: parameters, data, code, and what computes it.

    The number of threads and the processor's vector instructions are part of it: sums are split among threads and
    lanes, so the weights differ in their last bits after a few steps.
    """
    shaping = params.model_dump(mode="json", include={"seed", "process", "network", "train"})
    del shaping["train"]["processes"]  # world.size, which torchrun may set instead
    return {
        "params": shaping,
        "pairs": sha256(paths.pairs / "manifest.json"),
        "code": {str(file.relative_to(dvc_yaml.ROOT)): sha256(file) for file in dvc_yaml.code("train")},
        "device": device.type,
        "processes": world.size,
        "threads": torch.get_num_threads() if device.type == "cpu" else None,
        "instructions": instructions() if device.type == "cpu" else None,
        "torch": torch.__version__,
        "numpy": np.__version__,
    }


def instructions() -> str:
    """The vector instructions that torch uses, with the limits that the environment sets to those of its libraries."""
    limits = [f"{name}={os.environ[name]}" for name in ("ONEDNN_MAX_CPU_ISA", "MKL_CBWR") if name in os.environ]
    return " ".join([torch.backends.cpu.get_cpu_capability(), *limits])


def training_fingerprint(facts: dict[str, Any]) -> str:
    """The name of a training: the digest of its facts."""
    return hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()[:16]


@contextmanager
def exclusive(checkpoints: Path, facts: dict[str, Any]) -> Iterator[None]:
    """A block in which this process alone writes the checkpoints of the training with these facts."""
    directory = checkpoints / training_fingerprint(facts)
    with writing(directory):
        checkpoints.mkdir(parents=True, exist_ok=True)
        lock = lock_of(directory)
        try:
            held = lock.acquire(timeout=0)
        except filelock.Timeout:
            say("train: the same training is under way in another process; waiting for it to end")
            held = lock.acquire()
    with held:
        if not newest_step(directory):
            for line in unused_checkpoints(checkpoints, facts):
                say(f"train: {line}")
        write_json(directory / FACTS, facts)
        drop_old_trainings(checkpoints)
        yield


def unused_checkpoints(checkpoints: Path, facts: dict[str, Any]) -> list[str]:
    """A line for each interrupted training that differs from this one in its setup alone."""
    lines = []
    for path in sorted(checkpoints.glob(f"*/{FACTS}")):
        try:
            other = json.loads(path.read_bytes())
        except (OSError, ValueError):  # deleted or written at this moment
            continue
        step = newest_step(path.parent)
        if step and {**facts, **dict.fromkeys(SETUP)} == {**other, **dict.fromkeys(SETUP)}:
            # On a GPU the number of threads and the instructions are null: they do not matter there.
            differ = [name for name in SETUP if None not in (facts[name], other[name]) and facts[name] != other[name]]
            made = ", ".join(SETUP[name].format(other[name]) for name in differ)
            now = ", ".join(str(facts[name]) for name in differ)
            lines.append(
                f"the checkpoint of step {step} of this training is not used: it was made with {made} (now {now}), and "
                f"the result would not be the same to the bit; train with {made} to continue from it"
            )
    return lines


def lock_of(directory: Path) -> filelock.FileLock:
    """Held by the training that has its checkpoints in `directory`."""
    return filelock.FileLock(directory.with_suffix(".lock"))


def drop_old_trainings(checkpoints: Path) -> None:
    """Delete the checkpoints of all but the last few interrupted trainings, never those of one that runs now."""
    with suppress(FileNotFoundError):  # another training does the same at this moment
        trainings = sorted((path for path in checkpoints.iterdir() if path.is_dir()), key=os.path.getmtime)
        for directory in trainings[:-KEPT_TRAININGS]:
            with suppress(filelock.Timeout), lock_of(directory).acquire(timeout=0):
                shutil.rmtree(directory)
