"""The benchmark of distillation: its intervals, and that the documentation has the tables of its results."""

import json
import math
from argparse import Namespace
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "benchmarks" / "results").glob("few-steps-*.json"))


@pytest.fixture(scope="module")
def few_steps() -> Iterator[Any]:
    """The script; only scripts have its folder on their path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield import_module("few_steps")


def test_intervals(few_steps: Any) -> None:
    """Of two values, with the 97.5 % quantile of one degree of freedom, tan(0.475 pi) = 12.7062."""
    half = math.tan(0.475 * math.pi) * 0.5  # the standard error of 1 and 2
    assert few_steps.interval([1.0, 2.0]) == [1.5, round(1.5 - half, 4), round(1.5 + half, 4)]
    assert few_steps.interval([3.0]) == [3.0, None, None]
    assert few_steps.shown([1.5, 1.25, 1.75], 2) == "1.50 ± 0.25"
    assert few_steps.shown([1.5, None, None], 1, "+") == "+1.5"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_the_figures_are_those_of_the_runs(few_steps: Any, file: Path) -> None:
    document = json.loads(file.read_text())
    runs = document["runs"]
    assert len({(run["method"], run["seed"]) for run in runs}) == len(runs) >= 3
    assert {key: document[key] for key in few_steps.summarized(runs)} == few_steps.summarized(runs)
    values = [run["student"]["2"]["frechet"] for run in runs if run["method"] == "consistency"]
    assert document["student"]["2"]["frechet"][0] == round(sum(values) / len(values), 4)


def test_the_documentation_has_these_tables(few_steps: Any, capsys: pytest.CaptureFixture[str]) -> None:
    few_steps.show(Namespace())
    page = (ROOT / "docs" / "distillation.md").read_text()
    lines = capsys.readouterr().out.splitlines()
    assert len([line for line in lines if line.startswith("|")]) >= 3 * 8
    for line in lines:
        if line.startswith("|"):
            assert line in page.splitlines()
        elif line.startswith("student in"):
            assert line.rpartition(": ")[2].replace("-", "−") in page
        elif line:
            name, seeds, samples, share = line.split(", ")
            assert f"{seeds}, {samples}, {share}" in page, name
