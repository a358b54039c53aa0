"""Training killed at random moments gives the same bytes as uninterrupted training."""

import random
import time
from pathlib import Path

import pytest

from tests.training import trees

pytestmark = pytest.mark.slow

KILLS, STEPS = 4, 200
WRITING = ".ddpm/checkpoints/*/.0*"
"""Name of a checkpoint while it is written."""


def test_killed_again_and_again_it_ends_with_the_same_bytes(pairs_tree: Path, tmp_path: Path) -> None:
    options = {"steps": STEPS, "preview_every": 100, "log_every": 50, "keep_best": True}
    whole = trees.copy(pairs_tree, tmp_path / "whole", **options)
    done = trees.run(whole)
    assert done.returncode == 0, done.stderr

    killed, chance = trees.copy(pairs_tree, tmp_path / "killed", **options), random.Random(0)
    always = trees.seconds(0)  # a checkpoint at every step
    going_on, unfinished = 0, 0
    for number, step in enumerate(sorted(chance.sample(range(STEPS - 50), KILLS))):
        with trees.start(killed, **always) as process:
            going_on += "resuming from step" in trees.wait_for(process, "parameters, ")
            while not any(int(path.stem) >= step for path in killed.glob(".ddpm/checkpoints/*/0*.json")):
                assert process.poll() is None
                time.sleep(0.002)
            if number == 1:  # at any moment of a step
                time.sleep(chance.uniform(0, 0.05))
            else:  # in the midst of writing
                while not any(killed.glob(WRITING)):
                    assert process.poll() is None
            assert process.poll() is None, "it ended before it could be killed"
            process.kill()
        unfinished += any(killed.glob(WRITING))
    assert going_on >= KILLS - 1
    assert unfinished > 0
    done = trees.run(killed)
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    assert trees.digests(killed, "models", "reports") == trees.digests(whole, "models", "reports")
    assert "models/ddpm/model.safetensors" in trees.digests(killed, "models")
