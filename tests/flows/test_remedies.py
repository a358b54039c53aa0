"""Advice for unusable files, given only for files that a stage writes."""

from pathlib import Path

import pytest

from diffusion.errors import Damaged, FileFault, UserError
from flows.remedies import with_remedy
from flows.workspace import Run, State

SCRUB = "; delete it, run `make scrub` (the DVC cache may hold the same damaged file), then `dvc repro`"


@pytest.mark.parametrize(
    ("path", "stage"),
    [
        ("models/student/config.json", "distill/dvc.yaml:distill"),
        ("reports/student/previews", "distill/dvc.yaml:distill"),
        ("reports/student/evaluation/few_steps.csv", "distill/dvc.yaml:evaluate-student"),
        ("models/student-onnx/sampler.onnx", "distill/dvc.yaml:export-student"),
        ("data/shards/train-000000.tar", "shard"),
        ("data/pairs/manifest.json", "pairs"),
        ("models/ddpm", "train"),
        ("reports/train_curves/loss.csv", "train"),
        ("reports/evaluation/scored.json", "evaluate"),
        ("models/onnx/denoiser.onnx", "export"),
        ("models/other/config.json", None),
        ("/elsewhere/models/ddpm/config.json", None),
    ],
)
def test_files_of_a_stage_get_advice(path: str, stage: str | None) -> None:
    advice = f"; `dvc repro {stage}` writes it" if stage else ""
    assert with_remedy(FileFault(Path(path), "missing")) == f"{path}: missing{advice}"
    assert with_remedy(FileFault(Path(path).absolute(), "missing")) == f"{Path(path).absolute()}: missing{advice}"
    scrub = SCRUB.replace("dvc repro", "dvc repro distill/dvc.yaml") if "student" in path else SCRUB
    assert with_remedy(Damaged(Path(path), "why")) == f"{path}: damaged (why){scrub if stage else ''}"


def test_the_last_flow_run_is_offered_in_a_working_tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    fault, plain = FileFault(Path("models/ddpm"), "missing"), "models/ddpm: missing; `dvc repro train` writes it"
    assert with_remedy(fault) == plain
    states: dict[str, State] = {"old-one": "completed", "new-one": "completed", "worst-one": "failed"}
    for day, (name, state) in enumerate(states.items(), start=1):
        directory, end = tmp_path / ".ddpm/runs" / name, f"2026-01-0{day}T00:00:00+00:00"
        directory.mkdir(parents=True)
        Run(name, "id", "2026-01-01T00:00:00+00:00", "", False, state, end).write(directory)
    assert with_remedy(fault) == f"{plain}, or `ddpm apply new-one` takes the results of the last flow run"
    monkeypatch.chdir(tmp_path / ".ddpm/runs/old-one")  # in a run's own workspace there is nothing to apply
    assert with_remedy(fault) == plain


def test_other_errors_are_unchanged() -> None:
    assert with_remedy(UserError("seed: wrong")) == "seed: wrong"
