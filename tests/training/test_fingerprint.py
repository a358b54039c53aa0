"""Which trainings resume from a checkpoint: those with the same parameters, pairs and code, and no others."""

import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.storage import files
from diffusion.training.distributed import World
from flows import dvc_yaml, yaml_files
from flows import fingerprint as fingerprints
from flows import params as parameters
from flows.changes import lay_over
from flows.paths import Paths
from tests.training import trees

LONG: dict[str, Any] = {"steps": 100_000, "preview_every": 20, "decay": "constant"}
"""No test waits for the end of such a training."""


@pytest.fixture(scope="module")
def interrupted(pairs_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with a training that was stopped after its first measurement, to be copied."""
    tree = trees.copy(pairs_tree, tmp_path_factory.mktemp("interrupted") / "tree", **LONG)
    trees.stopped(tree, 21)
    assert max(steps(tree)) == 21
    return tree


def steps(tree: Path) -> set[int]:
    """The steps of all checkpoints."""
    return {int(path.stem) for path in tree.glob(".ddpm/checkpoints/*/0*.json")}


def begins(tree: Path) -> bool:
    """Whether training, started again, begins at step 0; otherwise it resumes from the newest checkpoint."""
    before, newest = trees.digests(tree, ".ddpm/checkpoints"), max(steps(tree))
    said = trees.stopped(tree, 0).stderr
    if f", resuming from step {newest}\n" in said:
        return False
    assert "resuming from step" not in said
    after = trees.digests(tree, ".ddpm/checkpoints")
    assert before.items() <= after.items()  # the other training can still be resumed
    return True


def copy_of_the_code(directory: Path) -> Path:
    for package in ("diffusion", "flows"):
        shutil.copytree(trees.ROOT / package, directory / package, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copy(trees.ROOT / "dvc.yaml", directory)
    return directory


def test_unchanged_parameters_resume_the_training(interrupted: Path, tmp_path: Path) -> None:
    tree = trees.copy(interrupted, tmp_path / "tree")
    trees.change(tree, {"sample": {"count": 9}, "evaluate": {"resamples": 200}, "export": {"steps": 3}})
    assert not begins(tree)


def test_changed_parameters_never_pick_up_old_weights(interrupted: Path, tmp_path: Path) -> None:
    tree = trees.copy(interrupted, tmp_path / "tree", learning_rate=0.001)
    assert begins(tree)


def test_changed_pairs_never_pick_up_old_weights(interrupted: Path, tmp_path: Path) -> None:
    tree = trees.copy(interrupted, tmp_path / "tree")
    trees.change(tree, {"shard": {"val_fraction": 0.3}})
    for stage in ("shard", "pairs"):
        done = trees.run(tree, stage)
        assert done.returncode == 0, done.stderr
    assert begins(tree)


def test_changed_code_never_picks_up_old_weights(
    interrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tree = trees.copy(interrupted, tmp_path / "tree")
    code = copy_of_the_code(tmp_path / "code")
    loss = code / "diffusion" / "process" / "loss.py"
    loss.write_text(loss.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    monkeypatch.setattr(dvc_yaml, "ROOT", code)
    assert begins(tree)


def fingerprint(tree: Path, changes: dict[str, Any] | None = None) -> str:
    params = parameters.validate(lay_over(yaml_files.read_yaml(tree / "params.yaml"), changes or {}), "test")
    return fingerprints.training_fingerprint(
        fingerprints.training_facts("train", params, Paths(tree), torch.device("cpu"), World())
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"process": {"loss": "l1"}},
        {"network": {"dropout": 0.1}},
        {"train": {"learning_rate": 0.001}},
        {"train": {"optimizer": {"learning_rate": 0.001}}},
    ],
)
def test_every_section_that_shapes_the_weights_is_in_the_fingerprint(pairs_tree: Path, changes: dict[str, Any]) -> None:
    assert fingerprint(pairs_tree, changes) != fingerprint(pairs_tree)


def test_every_file_that_training_depends_on_is_in_the_fingerprint(
    pairs_tree: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, code = fingerprint(pairs_tree), copy_of_the_code(tmp_path)
    monkeypatch.setattr(dvc_yaml, "ROOT", code)
    assert fingerprint(pairs_tree) == whole
    files = dvc_yaml.code("train")
    assert {code / "diffusion" / "nn" / "unet.py", code / "flows" / "stages" / "train.py"} <= set(files)
    for file in files:
        content = file.read_bytes()
        file.write_bytes(content + b"# changed\n")
        assert fingerprint(pairs_tree) != whole, file
        file.write_bytes(content)
    assert fingerprint(pairs_tree) == whole


def test_a_checkpoint_of_another_number_of_threads_is_named(interrupted: Path, tmp_path: Path) -> None:
    tree = trees.copy(interrupted, tmp_path / "tree")
    assert trees.stopped(tree, 0, threads=2).stderr.startswith(
        "train: not resuming from the checkpoint at step 21: it was made with OMP_NUM_THREADS=1 (now 2), so the "
        "result would not be bit-identical; train with OMP_NUM_THREADS=1 to resume from it\n"
    )


def test_limits_to_the_instructions_are_part_of_the_setup(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ONEDNN_MAX_CPU_ISA", raising=False)
    monkeypatch.delenv("MKL_CBWR", raising=False)
    plain = fingerprints.instructions()
    monkeypatch.setenv("MKL_CBWR", "COMPATIBLE")
    monkeypatch.setenv("ONEDNN_MAX_CPU_ISA", "AVX2")
    assert fingerprints.instructions() == f"{plain} ONEDNN_MAX_CPU_ISA=AVX2 MKL_CBWR=COMPATIBLE"


def test_checkpoints_that_another_setup_made_are_named(tmp_path: Path) -> None:
    facts = {
        "stage": "train",
        "params": {"seed": 0},
        "pairs": "12",
        "code": {"a.py": "34"},
        "device": "cpu",
        "processes": 1,
        "threads": 2,
        "instructions": "AVX2",
        "torch": "2.13.0",
        "numpy": "2.0.0",
    }
    others: dict[str, dict[str, Any]] = {
        "a": {"torch": "2.12.0", "numpy": "1.26.0"},
        "b": {"device": "cuda", "threads": None, "instructions": None, "processes": 8},
        "c": {"torch": "2.12.0", "params": {"seed": 1}},
        "d": {"threads": 4, "pairs": "13"},
        "e": {"threads": 4, "code": {"a.py": "35"}},
        "f": {"threads": 4},
        "h": {"instructions": "AVX512"},
    }
    for name, changes in others.items():
        (tmp_path / name).mkdir()
        files.write_json(tmp_path / name / fingerprints.FACTS, facts | changes)
        (tmp_path / name / f"{0 if name == 'f' else 70:010d}.json").touch()  # step 0 is no loss
    (tmp_path / "g").mkdir()
    (tmp_path / "g" / fingerprints.FACTS).write_text("{", encoding="utf-8")
    first, second, third = fingerprints.unused_checkpoints(tmp_path, facts)
    assert "step 70" in first
    assert "it was made with torch==2.12.0, numpy==1.26.0 (now 2.13.0, 2.0.0)" in first
    assert "it was made with device: cuda, train.processes: 8 (now cpu, 1)" in second
    assert "it was made with the instructions AVX512 (now AVX2)" in third
    assert fingerprints.unused_checkpoints(tmp_path, facts | {"params": {}}) == []


def test_the_same_training_in_another_process_is_waited_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    facts = {"stage": "train", "params": {"seed": 0}}
    held, ended = threading.Event(), list[str]()

    def first() -> None:
        with fingerprints.lock_of(tmp_path / fingerprints.training_fingerprint(facts)):
            held.set()
            time.sleep(0.3)
            ended.append("first")

    thread = threading.Thread(target=first)
    thread.start()
    assert held.wait(60)
    with fingerprints.exclusive(tmp_path, facts):
        ended.append("second")
    thread.join()
    assert ended == ["first", "second"]
    assert capsys.readouterr().err == (
        "train: another process is running the same training; waiting for it to finish\n"
    )
