"""Working trees for tests of the stages, with a tiny network on the digits."""

import os
import shutil
import signal
import subprocess
import sys
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from diffusion.model import Model
from diffusion.signals import StopSignals
from flows import params as parameters
from flows import yaml_files
from flows.changes import lay_over
from flows.paths import Paths
from flows.stages import train
from flows.stages.training import CHECKPOINT_SECONDS
from tests.command import ddpm

ROOT = Path(__file__).parents[2]
TINY: dict[str, Any] = {
    "pairs": {"draws": 1, "heldout_draws": 2},
    "process": {"num_timesteps": 100},
    "network": {
        "base_channels": 8,
        "channel_multipliers": [1],
        "attention_levels": [],
        "patch_size": 2,
    },
    "train": {
        "steps": 40,
        "batch_size": 32,
        "log_every": 15,
        "preview_every": 20,
        "warmup_steps": 5,
        "timesteps": "rms-error",
    },
    "sample": {"steps": 4, "count": 4},
    "distill": {"steps": 12, "log_every": 4, "preview_every": 6, "warmup_steps": 2},
    "evaluate": {"resamples": 100, "likelihood_images": 8, "exact_likelihood_images": 2, "quality_samples": 40},
    "export": {"variants": ["int8"], "max_loss": 1.0},
}
TRAIN = (sys.executable, "-m", "flows", "train")
# Nothing listens there: what is written must not depend on MLflow.
ENVIRONMENT = {"MLFLOW_TRACKING_URI": "http://127.0.0.1:9", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def change(tree: Path, changes: dict[str, Any]) -> None:
    path = tree / "params.yaml"
    yaml_files.write_yaml(path, lay_over(yaml_files.read_yaml(path), changes))


def copy(tree: Path, target: Path, stage: str = "train", **options: Any) -> Path:
    """Copy a tree and change its parameters of `train` or `distill`."""
    shutil.copytree(tree, target)
    change(target, {stage: options})
    return target


def save_initial_weights(tree: Path, name: str) -> None:
    """Put the weights with which a tree's training begins where one can start from them, as data/models/`name`."""
    recipe = train.recipe(parameters.load(tree / "params.yaml"), Paths(tree), torch.device("cpu"))
    Model(recipe.net(), recipe.process, recipe.config).save(tree / "data/models" / name)


def run(tree: Path, stage: str = "train", threads: int = 1) -> subprocess.CompletedProcess[str]:
    """Run a stage in this process; its exit status and output."""
    return ddpm(tree, stage, environment=ENVIRONMENT, threads=threads)


def stopped(tree: Path, steps: int, threads: int = 1, stage: str = "train") -> subprocess.CompletedProcess[str]:
    """Run a training or distillation that receives SIGTERM after `steps` more steps."""
    signals = [0] * steps + [signal.SIGTERM]
    with patch.object(StopSignals, "received", side_effect=signals):  # asked once before each step
        done = run(tree, stage, threads)
    assert done.returncode == 128 + signal.SIGTERM, done.stderr
    return done


def run_apart(tree: Path, *command: str) -> subprocess.CompletedProcess[str]:
    """Run a command in a separate process."""
    environment = os.environ | ENVIRONMENT
    return subprocess.run(command, cwd=tree, env=environment, capture_output=True, text=True, check=False)


def start(tree: Path, *command: str, **more: str) -> subprocess.Popen[str]:
    """Start training with its standard error piped."""
    environment = os.environ | ENVIRONMENT | more
    return subprocess.Popen(
        command or TRAIN, cwd=tree, env=environment, stderr=subprocess.PIPE, text=True, start_new_session=True
    )


def wait_for(process: subprocess.Popen[str], words: str) -> str:
    """Read a training's output up to a line with these words, and return it."""
    return read_to(process, words)[-1]


def read_to(process: subprocess.Popen[str], words: str) -> list[str]:
    """Read the lines of a training's output up to one with these words."""
    assert process.stderr is not None
    seen = []
    for line in process.stderr:
        seen.append(line)
        if words in line:
            return seen
    raise AssertionError("".join(seen))


def digests(tree: Path, *parts: str) -> dict[str, str]:
    files = [path for part in parts for path in sorted((tree / part).rglob("*")) if path.is_file()]
    return {str(path.relative_to(tree)): sha256(path.read_bytes()).hexdigest() for path in files}


def seconds(value: float) -> dict[str, str]:
    """Environment for a checkpoint every `seconds` seconds."""
    return {CHECKPOINT_SECONDS: str(value)}
