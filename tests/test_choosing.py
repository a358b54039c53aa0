"""benchmarks/choosing.py: its variants, its runs, and the page made from its results."""

import io
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from importlib import import_module
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch

from diffusion.errors import UserError
from diffusion.evaluation import features
from diffusion.process.schedule import SCHEDULES
from diffusion.process.timesteps import TIMESTEPS
from diffusion.process.weighting import WEIGHTINGS
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import SAMPLERS
from flows import made_with, yaml_files
from flows.params import Params
from tests.training import trees

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"


@pytest.fixture(scope="module", autouse=True)
def _scripts() -> Iterator[None]:
    """Only scripts have their folder on their path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield


@pytest.fixture
def tables() -> Any:
    return import_module("choices.tables")


@pytest.fixture
def training() -> Any:
    return import_module("choices.training")


@pytest.fixture
def sampling() -> Any:
    return import_module("choices.sampling")


@pytest.fixture
def page() -> Any:
    return import_module("choices.page")


def test_every_variant_changes_what_it_says(training: Any, tmp_path: Path, params: Params) -> None:
    default = dict(made_with.leaves(params.model_dump(mode="json")))
    for group, variants in training.GROUPS.items():
        for variant in variants:
            run = training.Run(group, variant, 0, 1000, 1, 1, tmp_path)
            found = dict(made_with.leaves(run.params.model_dump(mode="json")))
            assignments = [text.partition("=") for text in variant.split()]
            for name, _, value in assignments:
                assert found.get(f"{name}.kind", found.get(name)) == yaml_files.scalar(value), variant
            changed = {name for name in found if found[name] != default.get(name)} - {"train.compile"}
            named = tuple(name.removesuffix(".kind") for name, _, _ in assignments)
            assert {name for name in changed if not name.startswith(named)} == set(), variant


def test_every_choice_has_a_variant(training: Any) -> None:
    """Those of the DDPM paper's objectives are in a group of their own."""
    every = {text for variants in training.GROUPS.values() for variant in variants for text in variant.split()}
    default = {"process.schedule=cosine", "train.timesteps=rms-error"}
    for name, choices in (
        ("process.schedule", SCHEDULES),
        ("process.weighting", WEIGHTINGS),
        ("train.timesteps", TIMESTEPS),
    ):
        assert {f"{name}={choice}" for choice in choices} <= every | default


def test_settings_of_a_sampler_come_once_and_the_base_first(sampling: Any) -> None:
    base = SampleOptions()
    found = [json.loads(text) for text in sampling.settings(base, ["sampler", "spacing"], [10, 50, 250], False, False)]
    samplers = [
        {"sampler": name, "steps": steps}
        for name in SAMPLERS
        for steps in (10, 50, 250)
        if name != "consistency" and (steps < 250 or name == "ddpm")
    ]
    expected = [
        {key: value for key, value in change.items() if value not in ("dpm-solver++-sde", 50)} for change in samplers
    ]
    expected += [{"spacing": name, "steps": 10} for name in ("linspace", "quadratic", "angle")]
    assert found[0] == {}
    assert len(found) == len(expected)
    assert all(change in found for change in expected)


def test_guidance_needs_classes_and_learned_variance_a_model_with_it(sampling: Any) -> None:
    def settings(classes: bool, learned: bool) -> list[Any]:
        found = sampling.settings(SampleOptions(), ["guidance", "variance"], [50], classes, learned)
        return [json.loads(text) for text in found]

    assert {"guidance": 2.0} in settings(True, False)
    assert not any("guidance" in change for change in settings(False, False))
    assert {"sampler": "ddpm", "variance": "learned"} in settings(False, True)
    assert not any("learned" in change.values() for change in settings(False, False))


def test_a_difference_is_paired_by_seed(tables: Any) -> None:
    """Differences 1, 2, 0 of three seeds: mean 1, deviation 1, and t = 4.302653 with two degrees of freedom."""
    cell = tables.cell({0: 2.0, 1: 4.0, 2: 3.0}, {2: 3.0, 0: 1.0, 1: 2.0, 3: 100.0})
    assert (cell.n, cell.mean, cell.sd, cell.difference) == (3, 3.0, 1.0, 1.0)
    assert cell.half == pytest.approx(4.302653 / math.sqrt(3), rel=1e-6)
    assert not cell.beyond
    assert cell.text(2) == "3.00 ± 1.00<br>+1.00 ± 2.48"
    cell = tables.cell({0: 2.0, 1: 3.0}, {0: 4.0, 1: 5.1})  # differences -2 and -2.1; t = 12.7062
    assert cell.beyond
    assert cell.half == pytest.approx(12.7062 * 0.05, rel=1e-5)
    assert cell.text(1) == "2.5 ± 0.7<br>**−2.0 ± 0.6**"


def test_one_seed_has_no_interval(tables: Any) -> None:
    assert tables.cell({0: 2.0}, {0: 1.0}).text(2) == "2.00"
    assert tables.cell({0: 123.4, 1: 123.4}, {}).text(2) == "123 ± 0"
    assert tables.cell({}, {0: 1.0}).text(2) == "–"


def run(seed: int, more: Mapping[str, Any], **figures: float) -> dict[str, Any]:
    """A row of a results file."""
    held_out = {"frechet_distance": [0.5, 0.4, 0.6], "kid": [0.0, 0, 0], "density": [1, 1, 1], "coverage": [0.75, 0, 1]}
    found = {"frechet_distance": 1.0, "kid": 0.01, "density": 0.9, "coverage": 0.5} | figures
    about = {"features": "features of a test", "commit": "abc", "processor": "Z80", "samples": 8, "cpu_seconds": 4.0}
    return (
        about
        | {"seed": seed, "figures": {name: [value, 0, 0] for name, value in found.items()}, "held_out": held_out}
        | more
    )


def write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def trained(variant: str, group: str, seed: int, **figures: float) -> dict[str, Any]:
    about = {"variant": variant, "group": group, "steps": 7, "images": 3, "finite": True, "parameters": 1234}
    found = {"mse": 0.1, "bits_per_dim analytic": 2.0} | figures
    return run(seed, about, **{name.replace("_analytic", " analytic"): value for name, value in found.items()})


def test_the_page_follows_from_the_results_of_training(page: Any, tmp_path: Path) -> None:
    rows = [trained("", "default", seed, mse=0.1 + seed / 100) for seed in (0, 1)]
    rows += [trained("process.weighting=p2", "weighting", seed, mse=0.3 + seed / 50) for seed in (1, 0)]
    failed = trained("process.weighting=vlb", "weighting", 0)
    rows += [failed | {"finite": False, "figures": {}}, trained("process.weighting=vlb", "weighting", 1)]
    write(tmp_path / "choosing-digits.jsonl", rows)
    text, charts = page.make(tmp_path, tmp_path)
    # 0.1, 0.11 and 0.3, 0.32: differences 0.2 and 0.21, ± 12.7062 * 0.005.
    same = "2.000 ± 0.000<br>+0.000 ± 0.000 | 1.00 ± 0.00<br>+0.00 ± 0.00 |"
    assert (
        "| *default* | 0.1050 ± 0.0071 | 2.000 ± 0.000 | 1.00 ± 0.00 | 0.010 ± 0.000 | 0.90 ± 0.00 | 0.500 ± 0.000 |"
        in text
    )
    assert f"| `process.weighting=p2` | 0.3100 ± 0.0141<br>**+0.2050 ± 0.0635** | {same}" in text
    assert "| `process.weighting=vlb` (diverged with 1 seed of 2) | 0.1000 | 2.000 |" in text
    assert "| *held-out images* | – | – | 0.50 | 0.000 | 1.00 | 0.750 |" in text
    assert "- Better: none.\n- Worse: `process.weighting=p2` (noise MSE)." in text
    assert "*`python benchmarks/choosing.py train --only default weighting --steps 7 --seeds 0 1`; 8 samples; " in text
    assert "commit abc; one thread, Z80" in text
    assert text.index("=vlb`") < text.index("=p2`")  # the order of the choices, not of the runs
    (name,) = charts
    assert f"({name})" in text
    assert charts == page.make(tmp_path, tmp_path).charts
    assert b"process.weighting=p2" in charts[name]


def test_noise_errors_of_schedules_are_not_compared(page: Any, tmp_path: Path) -> None:
    rows = [trained("", "default", 0), trained("process.schedule=linear", "schedule", 0)]
    write(tmp_path / "choosing-digits.jsonl", rows)
    table = page.make(tmp_path, tmp_path).text.partition("### Noise schedule")[2]
    assert "| changed | bits/dim | Fréchet distance | KID | density | coverage |" in table
    assert "Differences have no interval yet" in table


def test_the_objectives_stand_beside_those_of_the_paper(page: Any, training: Any, tmp_path: Path) -> None:
    rows = []
    for number, variant in enumerate(training.GROUPS["objectives"]):
        for seed in (0, 1):
            row = trained(variant, "objectives", seed)
            row["figures"]["bits_per_dim fixed-large"] = [10.0 * number, 0, 0]
            rows.append(row)
    write(tmp_path / "choosing-digits.jsonl", rows)
    text = page.make(tmp_path, tmp_path).text.partition("### Objectives")[2]
    for number, (predicted, weighting, fid) in enumerate(
        [("mu", "vlb-large", "13.22"), ("mu", "posterior-mean", "unstable"), ("eps", "vlb-large", "13.51")]
    ):
        label = f"| `process.parameterization={predicted} process.weighting={weighting}` | 0.1000 ± 0.0000<br>"
        (line,) = [line for line in text.splitlines() if line.startswith(label)]
        assert f"<br>**−{30 - 10 * number}." in line
        assert line.endswith(f"| {fid} |")
    assert "=simple` | 0.1000 ± 0.0000 | 30.00 ± 0.00 | 1.00 ± 0.00 |" in text


def drawn(change: Mapping[str, Any], seed: int, evaluations: float, **figures: float) -> dict[str, Any]:
    base = SampleOptions().model_dump(mode="json", exclude={"count"})
    about = {"base": base, "set": "", "change": dict(change), "evaluations": evaluations}
    return run(seed, about, **figures)


def test_the_page_follows_from_the_results_of_sampling(page: Any, tmp_path: Path) -> None:
    rows = []
    for seed in (0, 1):
        rows += [
            drawn({}, seed, 50, coverage=0.5 + seed / 10),
            drawn({"sampler": "heun", "steps": 10}, seed, 19, coverage=0.2 + seed / 10),
            drawn({"steps": 10}, seed, 10, coverage=0.4),
            drawn({"steps": 10, "spacing": "linspace"}, seed, 10, coverage=0.3),
        ]
    write(tmp_path / "results" / "samplers-toys.jsonl", rows)
    picture = tmp_path / "results" / "samplers-toys" / "dpm-solver++-sde-10.png"
    picture.parent.mkdir()
    picture.touch()
    text, charts = page.make(tmp_path / "results", tmp_path / "docs")
    sampler = text.partition("### Sampler and steps: toys")[2].partition("\n### ")[0]
    # 4 s for 8 samples; differences to the base, 0.5 and 0.6: both -0.3; or -0.1 and -0.2, ± 12.7062 * 0.05.
    assert "| 0.250 ± 0.071<br>**−0.300 ± 0.000** | 19 | 500 |" in sampler
    assert "| 0.400 ± 0.000<br>−0.150 ± 0.635 | 10 | 500 |" in sampler
    assert "linspace" not in sampler
    assert "- Worse: `heun`, 10 steps (coverage)." in sampler
    assert "(../results/samplers-toys/dpm-solver++-sde-10.png)" in sampler
    spacing = text.partition("### Spacing: toys")[2].partition("\n### ")[0]
    assert "| `linspace`, 10 steps |" in spacing  # compared with log-snr in as many steps
    assert "| 0.300 ± 0.000<br>**−0.100 ± 0.000** | 10 | 500 |" in spacing
    assert "heun" not in spacing
    assert "### Threshold" not in text
    assert list(charts) == ["samplers-toys.svg"]


def test_no_page_without_results(page: Any, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="contains no results"):
        page.make(tmp_path, tmp_path)


def test_a_damaged_line_is_named(page: Any, tmp_path: Path) -> None:
    (tmp_path / "choosing-digits.jsonl").write_text('{"seed": 0}\n{"seed"')
    with pytest.raises(UserError, match="line 2 is not a JSON object"):
        page.make(tmp_path, tmp_path)


def test_the_committed_page_is_up_to_date(page: Any) -> None:
    text, charts = page.make(RESULTS, ROOT / "docs")
    assert text == (ROOT / "docs" / page.NAME).read_text(encoding="utf-8")
    for name, content in charts.items():
        assert content == (ROOT / "docs" / name).read_bytes(), name


def choose(*arguments: str | Path) -> str:
    """Run the script in this process, where it must succeed; returns its output."""
    threads, out = torch.get_num_threads(), io.StringIO()
    try:
        with patch.object(sys, "argv", ["choosing.py", *map(str, arguments)]), redirect_stdout(out):
            assert import_module("choosing").main() == 0
    finally:
        torch.set_num_threads(threads)
    return out.getvalue()


def test_interrupted_training_goes_on(
    tmp_path: Path, digits_tree: Path, training: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    trees.change(digits_tree, trees.TINY)
    monkeypatch.setattr(training, "ROOT", digits_tree)
    monkeypatch.setattr(features, "STEPS", 20)
    monkeypatch.setattr(import_module("choices.results"), "ProcessPoolExecutor", lambda *_: ThreadPoolExecutor(1))
    out = tmp_path / "choosing.jsonl"
    given = (
        "train",
        "--steps",
        "2",
        "--samples",
        "20",
        "--images",
        "2",
        "--jobs",
        "1",
        "--out",
        out,
        "--only",
        "variance",
    )
    choose(*given, "--seeds", "0")
    (row,) = [json.loads(line) for line in out.read_text().splitlines()]
    assert row["finite"]
    assert (row["seed"], row["steps"], row["images"], row["samples"]) == (0, 2, 2, 20)
    assert row["variant"] == "process.learned_variance=true"
    names = [f"bits_per_dim {name}" for name in ("analytic", "fixed-small", "fixed-large", "learned")]
    for name in ["mse", *names, "frechet_distance", "kid", "precision", "recall", "density", "coverage"]:
        value, low, high = row["figures"][name]
        assert low <= value <= high, name
    left = choose(*given, "--seeds", "0", "1", "--list")
    assert left == "variance: process.learned_variance=true, seed 1, 2 steps\n"


@pytest.mark.slow  # starts processes
def test_samples_are_measured_once(whole_tree: Path, tmp_path: Path) -> None:
    tree, out = tmp_path / "tree", tmp_path / "samplers-tiny.jsonl"
    shutil.copytree(whole_tree, tree)
    trees.change(tree, {"sample": {"steps": 3}})
    given = ("sample", "--tree", tree, "--data", "tiny", "--samples", "40", "--jobs", "1", "--out", out)
    command = (sys.executable, "benchmarks/choosing.py", *given, "--seeds", "0", "--only", "sampler", "--steps", "5")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    evaluations = {(row["change"].get("sampler"), row["change"].get("steps")): row["evaluations"] for row in rows}
    assert evaluations[None, None] == 3
    assert evaluations["ddim", 5] == evaluations[None, 5] == 5
    assert 5 < evaluations["heun", 5] <= 9
    pictures = {path.name for path in (tmp_path / "samplers-tiny").iterdir()}
    assert pictures == {"dpm-solver++-sde-3.png", *(f"{name}-5.png" for name in SAMPLERS if name != "consistency")}
    assert choose(*given, "--seeds", "0", "--only", "sampler", "--steps", "5", "--list") == ""
    assert choose(*given, "--seeds", "0", "--only", "threshold", "--list").splitlines() == [
        '{"threshold": "dynamic"}, seed 0, 40 samples',
        '{"threshold": "none"}, seed 0, 40 samples',
    ]
