"""benchmarks/quality_noise.py: which difference a number of samples tells."""

import csv
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def module() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield import_module("quality_noise")


def test_sets_are_told_apart_as_often_as_their_difference_demands(module: Any) -> None:
    """Differences of normal values are normal: 5 % exceed 1.96 of their standard deviations, 85 % with a mean of 3."""
    rng, count = np.random.default_rng(0), 400

    def some(mean: float) -> list[dict[str, float]]:
        return [dict.fromkeys(module.METRICS, value) for value in rng.normal(mean, 2.0, count)]

    rows = module.summarize({100: {50: some(10), 20: some(10), 5: some(10 + 3 * 2 * np.sqrt(2))}})
    by_steps = {row["steps"]: row for row in rows if row["metric"] == "kid"}
    assert by_steps[50]["told_apart"] == ""
    assert by_steps[20]["told_apart"] == pytest.approx(0.05, abs=0.02)
    assert by_steps[5]["told_apart"] == pytest.approx(0.85, abs=0.03)
    assert by_steps[5]["sd"] == pytest.approx(2, rel=0.1)
    assert by_steps[20]["mean"] == pytest.approx(10, abs=0.4)
    assert len(rows) == 3 * len(module.METRICS)
    *_, last = module.table(rows).splitlines()
    assert last.startswith("| coverage | 100 | ")
    assert last.endswith("%) |")


@pytest.mark.slow
def test_the_command(whole_tree: Path, tmp_path: Path) -> None:
    command = [sys.executable, ROOT / "benchmarks/quality_noise.py", "--images", "20", "30", "--steps", "3", "2"]
    command += ["--sets", "2", "--out", tmp_path / "found.csv"]
    done = subprocess.run(command, cwd=whole_tree, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    with (tmp_path / "found.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 6 * 2 * 2
    assert {(row["images"], row["steps"], row["sets"]) for row in rows} == {
        (images, steps, "2") for images in ("20", "30") for steps in ("3", "2")
    }
    assert done.stdout.startswith("| figure | images | 3 steps | 2 steps |")


def test_without_a_model_it_says_so(tmp_path: Path) -> None:
    (tmp_path / "params.yaml").write_bytes((ROOT / "params.yaml").read_bytes())
    command = [sys.executable, ROOT / "benchmarks/quality_noise.py", "--out", tmp_path / "found.csv"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("quality_noise.py: error: models/ddpm/config.json: ")
