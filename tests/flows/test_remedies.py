"""Advice for unusable files, given only for files that a stage writes."""

from pathlib import Path

import pytest

from diffusion.errors import Damaged, FileFault, UserError
from flows.remedies import with_remedy

SCRUB = "; delete it, run `make scrub` (the DVC cache may hold the same damaged file), then `dvc repro`"


@pytest.mark.parametrize(
    ("path", "stage"),
    [
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
    assert with_remedy(Damaged(Path(path), "why")) == f"{path}: damaged (why){SCRUB if stage else ''}"


def test_other_errors_are_unchanged() -> None:
    assert with_remedy(UserError("seed: wrong")) == "seed: wrong"
