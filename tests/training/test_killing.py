"""A training that is killed at random moments ends with the bytes of one that was not."""

import random
import signal
import time
from pathlib import Path

from tests.training import trees

KILLS = 20


def test_killed_twenty_times_it_ends_with_the_same_bytes(pairs_tree: Path, tmp_path: Path) -> None:
    options = {"steps": 700, "preview_every": 175, "log_every": 50, "keep_best": True}
    whole = trees.copy(pairs_tree, tmp_path / "whole", **options)
    done = trees.run(whole)
    assert done.returncode == 0, done.stderr

    killed, random_moment = trees.copy(pairs_tree, tmp_path / "killed", **options), random.Random(0)
    always = trees.seconds(0)  # a checkpoint at every step: about every other kill is in the midst of writing one
    steps, unfinished = set[str](), 0
    for _ in range(KILLS):
        with trees.start(killed, **always) as process:
            first = trees.wait_for(process, "parameters, ")
            steps |= {first.partition("going on from step ")[2]}
            trees.wait_for(process, "going on without it")  # MLflow: from here on it trains
            time.sleep(random_moment.uniform(0, 1.0))
            assert process.poll() is None, "it ended before it could be killed"
            process.send_signal(signal.SIGKILL)
        unfinished += any(path.name.startswith(".") for path in killed.glob(".ddpm/checkpoints/*/*"))
    assert len(steps) > KILLS / 2  # it went on from many of them
    assert unfinished > 0  # and was killed in the midst of writing
    done = trees.run(killed)
    assert done.returncode == 0, done.stderr
    assert "going on from step" in done.stderr
    for tree in (whole, killed):
        for stage in ("evaluate", "export"):
            done = trees.run(tree, *trees.TRAIN[:-1], stage)
            assert done.returncode == 0, done.stderr
    assert trees.digests(killed, "models", "reports") == trees.digests(whole, "models", "reports")
    assert "models/onnx/denoiser.onnx" in trees.digests(killed, "models")
