"""The GPU benchmark: its rehearsal on the CPU, its command line, and the page of results."""

import json
import math
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.errors import UserError

ROOT = Path(__file__).parents[1]
COMMAND = (sys.executable, "benchmarks/gpu.py")
MEASUREMENTS = (
    "gpu_tests", "ceilings", "throughput", "profile", "time_to_quality", "sampling", "memory", "settings", "pairs",
)  # fmt: skip
RATES = ("images_per_s", "pairs_per_s", "bf16_tflops", "copy_tb_per_s", "ms_per_step", "seconds", "heldout_mse", "busy")
"""Fields that must be positive where present."""


@pytest.fixture(scope="module")
def page() -> Iterator[Any]:
    """The module that formats tables; only scripts have its folder on their path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield import_module("gpu_measurements.page")


@pytest.fixture(scope="module")
def command(page: Any) -> Any:  # noqa: ARG001
    return import_module("gpu")


@pytest.mark.slow  # and all of tests/gpu, on the CPU
def test_the_rehearsal_runs_every_measurement(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    command = (*COMMAND, "--rehearse", "--out", str(out), "--commit", "abc")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert list(dict.fromkeys(line["measurement"] for line in lines)) == ["machine", *MEASUREMENTS]
    assert lines[0]["commit"] == "abc"
    assert [line for line in lines if {"error", "skipped"} & line.keys()] == []
    for line in lines:
        figures = [value for value in line.values() if isinstance(value, float)]
        assert all(math.isfinite(value) for value in figures), line
        assert all(line[name] > 0 for name in RATES if name in line), line
    of = {name: [line for line in lines if line["measurement"] == name] for name in MEASUREMENTS}
    assert of["gpu_tests"][0]["passed"]
    trained = {(line["training"], line["compiled"], line["precision"]) for line in of["throughput"]}
    ours = {("cifar10", True, "bf16"), ("cifar10", False, "bf16"), ("cifar10", False, "tf32")}
    assert trained == ours | {("diffusers, best", True, "bf16"), ("diffusers, example", False, "tf32")}
    assert {line["by"] for line in of["sampling"]} == {"torch", "torch, compiled", "diffusers", "ONNX Runtime"}
    assert {"convolution", "matrix product", "attention", "normalization", "optimizer", "copy"} <= set(
        of["profile"][0]["ms_by_kind"]
    )
    assert [line["step"] for line in of["time_to_quality"] if "step" in line] == [3, 6]
    assert [line["recompute"] for line in of["memory"]] == [False, True]
    assert "| cifar10 | 4 | bf16 | yes |" in done.stdout  # the table at the end


@pytest.mark.slow  # starts a process
def test_without_a_gpu_it_rehearses_and_the_file_is_complete_if_standard_output_is_full(tmp_path: Path) -> None:
    out = tmp_path / "lines.jsonl"
    command = (*COMMAND, "--only", "ceilings", "--out", str(out))
    environment = {"CUDA_VISIBLE_DEVICES": "", "PATH": "/usr/bin:/bin"}
    with Path("/dev/full").open("w") as full:
        done = subprocess.run(
            command, cwd=ROOT, env=environment, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines() == ["no GPU found: rehearsing on the CPU; results are not GPU measurements"]
    assert [json.loads(line)["measurement"] for line in out.read_text().splitlines()] == ["machine", "ceilings"]


def test_the_committed_page_is_up_to_date(command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Running the command again does not change it."""
    results = shutil.copytree(command.RESULTS, tmp_path / "results")
    monkeypatch.setattr(command, "RESULTS", results)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--page"])
    assert command.main() == 0
    assert (results / "gpu.md").read_bytes() == (ROOT / "benchmarks" / "results" / "gpu.md").read_bytes()


def test_the_page_names_the_commit_of_results(page: Any) -> None:
    all_of_them = {"ceilings": "Products.", "memory": "The most.", "profile": "A step."}
    old = [{"measurement": "machine", "device": "Old"}, {"measurement": "ceilings", "bf16_tflops": 700.0}]
    new = [
        {"measurement": "machine", "device": "New", "commit": "1234", "torch": "3.0"},
        {"measurement": "ceilings", "bf16_tflops": 900.0},
        {"measurement": "profile", "error": "RuntimeError: no"},
    ]
    first = page.page({"gpu-old.jsonl": old}, all_of_them)
    assert "**There are no measurements of the current code on a GPU.**" in first
    assert "**Older code**: the file does not name its commit." in first
    assert "- `ceilings`: Products.\n- `memory`: The most.\n- `profile`: A step." in first
    both = page.page({"gpu-old.jsonl": old, "gpu-new.jsonl": new}, all_of_them)
    assert "no measurements of the current code" not in both
    assert "Commit 1234." in both
    assert "torch 3.0" in both
    assert "- `memory`: The most.\n- `profile`: A step." in both
    assert "- `ceilings`" not in both


def test_slices_of_one_contender_are_one_row(page: Any) -> None:
    def line(name: str, number: int, rate: float) -> dict[str, Any]:
        facts = {"measurement": "throughput", "training": name, "batch_size": 8}
        first = {"first_s": 9.0, "peak_gib": 5.0} if number == 0 else {}
        return facts | first | {"slice": number, "images_per_s": rate, "mfu": rate / 1000}

    rates = {"cifar10": (30.0, 10.0, 20.0), "diffusers, best": (8.0, 4.0, 6.0)}
    found = page.tables([line(name, number, rates[name][number]) for number in range(3) for name in rates])
    assert "| cifar10 | 8 | 20 | 10 | 30 | 3 | 0.02 | 9 | 5 |" in found
    assert "| diffusers, best | 8 | 6 | 4 | 8 | 3 | 0.006 | 9 | 5 |" in found
    assert "The fastest training here has 3.33 times the images per second of the fastest of diffusers." in found


def never(_: Any) -> Iterator[dict[str, Any]]:
    """A measurement that must not start."""
    pytest.fail("it started")


def measuring(command: Any, monkeypatch: pytest.MonkeyPatch, out: Path, *measurements: Any) -> int:
    """Rehearse only these measurements; returns the exit status."""
    monkeypatch.setattr(command, "MEASUREMENTS", measurements)
    monkeypatch.setattr(sys, "argv", ["gpu.py", "--rehearse", "--out", str(out), "--commit", "abc"])
    status: int = command.main()
    return status


def test_an_interrupted_run_ends_with_its_table(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def fails(_: Any) -> Iterator[dict[str, Any]]:
        yield {"first": 1}
        raise ValueError("no")

    def interrupted(_: Any) -> Iterator[dict[str, Any]]:
        yield {"second": 2}
        raise KeyboardInterrupt

    assert measuring(command, monkeypatch, tmp_path / "lines.jsonl", fails, interrupted, never) == 130
    lines = [json.loads(line) for line in (tmp_path / "lines.jsonl").read_text().splitlines()]
    assert lines[1:] == [
        {"measurement": "fails", "first": 1},
        {"measurement": "fails", "error": "ValueError: no"},
        {"measurement": "interrupted", "second": 2},
    ]
    assert "| second |\n| --- |\n| 2 |" in capsys.readouterr().out


def test_a_result_file_is_not_overwritten(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "lines.jsonl"
    out.write_text("kept")
    assert measuring(command, monkeypatch, out, never) == 1
    assert out.read_text() == "kept"
    expected = f"benchmarks/gpu.py: {out}: already exists; move it, or choose another file with --out\n"
    assert capsys.readouterr().err == expected


def test_an_unwritable_file_is_rejected_before_measuring(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    assert measuring(command, monkeypatch, tmp_path / "file" / "lines.jsonl", never) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"benchmarks/gpu.py: {tmp_path}/file")


def test_result_files_are_named_after_card_and_commit(
    command: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    class Card(command.Bench):  # type: ignore[misc]
        def __init__(self, _: bool, *others: Any) -> None:
            super().__init__(True, *others)
            self.card = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(command, "Bench", Card)
    monkeypatch.setattr(command, "RESULTS", tmp_path)
    commit = "0123456789abcdef0123456789abcdef01234567"
    assert command.run(False, 1.0, Path("none"), None, f"{commit}-dirty", []) == 0
    (written,) = tmp_path.iterdir()
    assert written.name == "gpu-H100-80GB-HBM3-0123456-dirty.jsonl"
    assert json.loads(written.read_text())["commit"] == f"{commit}-dirty"


@pytest.mark.parametrize(
    ("given", "problem"),
    [
        (["--only", "speed"], "--only: unknown measurement 'speed'; available: gpu_tests, ceilings, "),
        (["--minutes", "nan"], "argument --minutes: nan is not a number of minutes from 0 to 1440"),
        ([], "--commit: required, since git cannot determine the commit of this code"),
    ],
)
def test_invalid_arguments_are_rejected_before_measuring(
    command: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], given: list[str], problem: str
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(command, "_output", lambda *_: None)
    monkeypatch.setattr(command, "run", pytest.fail)
    monkeypatch.delenv("DDPM_COMMIT", raising=False)
    monkeypatch.setattr(sys, "argv", ["gpu.py", *given])
    with pytest.raises(SystemExit) as stopped:
        command.main()
    assert stopped.value.code == 2
    assert f"error: {problem}" in capsys.readouterr().err.splitlines()[-1]


def test_the_page_omits_rehearsals(page: Any, tmp_path: Path) -> None:
    (tmp_path / "gpu-tiny.jsonl").write_text('{"measurement": "machine", "device": "CPU, rehearsal", "commit": "1"}\n')
    (tmp_path / "gpu-card.jsonl").write_text('{"measurement": "machine", "device": "Card", "commit": "2"}\n')
    written = page.write(tmp_path, {}).read_text()
    assert "Commit 2." in written
    assert "gpu-tiny" not in written


@pytest.mark.parametrize("damaged", ['{"measurement": "mach', '{"device": "Card"}', "3", "\xff"])
def test_a_damaged_line_is_named(page: Any, tmp_path: Path, damaged: str) -> None:
    path = tmp_path / "gpu-card.jsonl"
    path.write_text('{"measurement": "machine"}\n' + damaged, encoding="latin-1")
    with pytest.raises(UserError, match=f"^{path}, line 2: not a JSON object with `measurement`; restore"):
        page.write(tmp_path, {})
