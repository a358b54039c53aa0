"""SIGKILL to a training, at any moment."""

import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from subprocess import Popen
from typing import NamedTuple

from ruamel.yaml import YAML

from deploy.faults.case import Case, Seen
from deploy.faults.clone import REPRO, Clone, ddpm, must, same

PHASES = {"start-up": 0.2, "training": 0.4, "writing": 0.3, "ending": 0.1}
"""Until the first checkpoint; until the last one, with one after every step; until model, curves and report are
written; until the process ends. And the share of the kills in each."""
SECONDS = 120.0
UNFINISHED = re.compile(r"/\.[^/]+\.\w{8}(\.former)?(/|$)")
"""In the path of what was being written (diffusion/storage/files.py)."""


class Moment(NamedTuple):
    """When a training is killed: at a share of the time of a phase."""

    phase: str
    share: float


def moments(count: int, seed: int) -> list[Moment]:
    chance = random.Random(seed)
    phases = [phase for phase, share in PHASES.items() for _ in range(round(count * share))]
    return [Moment(phase, chance.random()) for phase in phases]


class Killed(NamedTuple):
    """What a kill left, and what the same command did about it."""

    phase: str
    resumed: bool
    """From a checkpoint; otherwise there was none yet, or none any more."""
    unfinished: bool
    """Whether a file or folder was being written."""


def killed(reference: Clone, count: int = 20, seed: int = 0, at_once: int = 4) -> Seen:
    """Kill `count` trainings once each, start each again, and compare what it writes with that of `reference`."""
    wanted = reference.digests("models/ddpm", *reference.outputs("train"))
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(at_once) as pool:
        whole = reference.before("train", Path(folder) / "whole")
        seconds = _timed(whole)
        same("the model and the reports of an uninterrupted training", _written(whole), wanted)

        def trial(number: int, moment: Moment) -> Killed:
            clone = reference.before("train", Path(folder) / f"killed-{number}")
            while not kill(clone, _begins(clone)[moment.phase], moment.share * seconds[moment.phase]):
                moment = moment._replace(share=moment.share / 2)  # it ended before
                clone = reference.before("train", Path(folder) / f"killed-{number}-{moment.share}")
            unfinished = _unfinished(clone.path)
            done = clone.call(*TRAIN, **ALWAYS)
            must("a killed training that is started again ends", done.returncode == 0, done)
            same(f"model and reports of a training killed at {moment}", _written(clone), wanted)
            shutil.rmtree(clone.path)
            return Killed(moment.phase, "resuming from step" in done.stderr, bool(unfinished))

        in_turn = map if at_once == 1 else pool.map  # a stage that runs in this process needs its main thread
        found = list(in_turn(trial, range(count), moments(count, seed)))
    phases = Counter(each.phase for each in found)
    where = ", ".join(f"{phases[phase]} during {phase}" for phase in PHASES)
    resumed, unfinished = sum(each.resumed for each in found), sum(each.unfinished for each in found)
    return Seen(
        count,
        f"the process is gone; the same command continues from the last checkpoint ({resumed} of {count}; the others "
        "had none yet, or none any more), and weights and reports have the same bytes as without a kill: "
        f"{count} of {count} ({where}). "
        f"{unfinished} left a file half-written, under a hidden name, which nothing reads and `ddpm gc` deletes",
    )


TRAIN = ddpm("train")
ALWAYS = {"DDPM_CHECKPOINT_SECONDS": "0"}
"""A checkpoint after every step."""


def _written(clone: Clone) -> dict[str, str]:
    """What the training has written, without what a killed one left unfinished."""
    found = clone.digests("models", *clone.outputs("train"))
    return {path: digest for path, digest in found.items() if not UNFINISHED.search(path)}


def _begins(clone: Clone) -> dict[str, Callable[[], bool]]:
    """Whether each phase has begun."""
    last = YAML(typ="safe").load((clone.path / "params.yaml").read_text())["train"]["steps"]

    def has(name: str) -> bool:
        return any(clone.path.glob(name))

    return {
        "start-up": lambda: True,
        "training": lambda: has(".ddpm/checkpoints/*/0*.json"),
        "writing": lambda: has(f".ddpm/checkpoints/*/{last:010d}.json"),
        "ending": lambda: has("reports/made_with/train.json"),
    }


def _wait(process: "Popen[bytes]", holds: Callable[[], bool]) -> bool:
    """Wait until something holds, which the result says, or the process ends."""
    deadline = time.monotonic() + SECONDS
    while not holds():
        if process.poll() is not None:
            return holds()
        must("a phase of the training begins in time", time.monotonic() < deadline)
        time.sleep(0.002)
    return True


def _timed(clone: Clone) -> dict[str, float]:
    """The seconds of each phase of a training that is not killed."""
    log = clone.path.with_suffix(".log")
    process, times = clone.start(*TRAIN, log=log, **ALWAYS), list[float]()
    for holds in _begins(clone).values():
        _wait(process, holds)
        times.append(time.monotonic())
    must("a training ends", process.wait() == 0, log.read_text())
    times.append(time.monotonic())
    return {phase: times[index + 1] - times[index] for index, phase in enumerate(PHASES)}


def kill(clone: Clone, holds: Callable[[], bool], seconds: float = 0) -> bool:
    """Start a training and kill it so many seconds after something holds; returns False if it ended before."""
    process = clone.start(*TRAIN, log=clone.path.with_suffix(".log"), **ALWAYS)
    _wait(process, holds)
    time.sleep(seconds)
    alive = process.poll() is None
    if alive:
        os.killpg(process.pid, signal.SIGKILL)
    return process.wait() == -signal.SIGKILL and alive


def _unfinished(tree: Path) -> list[Path]:
    """Files and folders that were being written."""
    return [path for path in tree.rglob("*") if UNFINISHED.search(str(path))]


def repro_killed(reference: Clone, seed: int = 0) -> Seen:
    """Kill `dvc repro` with the stage that it runs, once in each of three stages."""
    stages, chance = ("shard", "pairs", "train"), random.Random(seed)
    with tempfile.TemporaryDirectory() as folder:
        clone = reference.fresh(Path(folder) / "clone")
        for stage in stages:
            log = Path(folder) / f"{stage}.log"
            process = clone.start(*REPRO, "train", log=log, PYTHONUNBUFFERED="1")
            must(f"{stage} runs", _wait(process, partial(_runs, stage, log)), log.read_text())
            time.sleep(chance.uniform(0, 2))
            must(f"{stage} still runs", process.poll() is None, log.read_text())
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        said = clone.do(*REPRO, "train")
        must("what had ended is not run again", "Running stage 'shard'" not in said, said)
        outputs = reference.outputs(*stages)
        same("shards, pairs and model", clone.digests(*outputs), reference.digests(*outputs))
        must("the cache is intact", " 0 deleted" in clone.do(sys.executable, "-m", "flows.scrub"))
    return Seen(
        len(stages),
        "the processes are gone; the same command continues with the stage that was killed, with the same bytes; the "
        "cache is intact, and no lock stays behind",
    )


def _runs(stage: str, log: Path) -> bool:
    return f"Running stage '{stage}'" in log.read_text()


CASES = {
    "sigkill": Case("A training is killed (SIGKILL) at a random moment, and started again", killed),
    "sigkill-repro": Case(
        "`dvc repro` is killed (SIGKILL) with the stage that it runs, and started again", repro_killed
    ),
}
