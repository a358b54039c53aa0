"""Stage distill on the digits, with a tiny teacher: resumed, rolled back and divided, it gives the same student."""

import json
import math
from collections.abc import Callable
from hashlib import sha256
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusion.distillation import losses
from diffusion.distillation.losses import ProgressiveLoss
from diffusion.model import load_model
from diffusion.storage.files import parse_csv
from diffusion.training.state import State
from flows.stages import distill
from tests.training import trees

pytestmark = pytest.mark.slow

CPU = torch.device("cpu")
OUTPUTS = ("models/student", "reports/student", "reports/made_with")
METHODS: dict[str, dict[str, Any]] = {
    "consistency": {"kind": "consistency", "points": 8, "solver_steps": 4},
    "progressive": {"kind": "progressive", "teacher_steps": 16, "student_steps": 2},
}
"""The phases of the second begin at steps 0, 4 and 8."""
DISTILL = (*trees.TRAIN[:-1], "distill")
METHOD = pytest.mark.parametrize("method", METHODS)


@pytest.fixture(scope="module")
def taught(pairs_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree after the stages shard, pairs and train."""
    tree = trees.copy(pairs_tree, tmp_path_factory.mktemp("taught") / "tree")
    done = trees.run(tree)
    assert done.returncode == 0, done.stderr
    return tree


def distilled(tree: Path, target: Path, method: str, **options: Any) -> Path:
    """A copy of the tree after the stage distill."""
    tree = copy(tree, target, method, **options)
    done = trees.run(tree, "distill")
    assert done.returncode == 0, done.stderr
    return tree


def copy(tree: Path, target: Path, method: str, **options: Any) -> Path:
    return trees.copy(tree, target, "distill", **({"method": METHODS[method]} | options))


@pytest.fixture(scope="module")
def whole(taught: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Uninterrupted distillations."""
    made = dict[str, Path]()

    def get(method: str) -> Path:
        if method not in made:
            made[method] = distilled(taught, tmp_path_factory.mktemp(method) / "tree", method)
        return made[method]

    return get


def curve(tree: Path, name: str) -> list[dict[str, float]]:
    return parse_csv((tree / "reports/student/train_curves" / name).read_bytes())


def assert_same(one: Path, other: Path) -> None:
    assert trees.digests(one, *OUTPUTS) == trees.digests(other, *OUTPUTS)
    assert "models/student/model.safetensors" in trees.digests(one, *OUTPUTS)


@METHOD
def test_outputs(whole: Callable[[str], Path], taught: Path, method: str) -> None:
    """The student begins as the teacher, and learns; the teacher and its reports remain."""
    tree = whole(method)
    kept = trees.digests(taught, "models/ddpm", "reports")
    assert kept.items() <= trees.digests(tree, "models/ddpm", "reports").items()
    student, teacher = (load_model(tree / "models" / name, CPU) for name in ("student", "ddpm"))
    assert student.config == teacher.config.model_copy(update={"x_0_mse": None})
    assert teacher.config.x_0_mse is not None
    differ = {
        name for name, value in teacher.net.state_dict().items() if not value.equal(student.net.state_dict()[name])
    }
    assert len(differ) > 0.9 * len(teacher.net.state_dict())
    assert [row["step"] for row in curve(tree, "loss.csv")] == [4, 8, 12]
    assert [row["step"] for row in curve(tree, "heldout.csv")] == [6, 12]
    names = ["SHA256SUMS", "step-00000006.png", "step-00000012.png"]
    assert sorted(path.name for path in (tree / "reports/student/previews").iterdir()) == names
    report = json.loads((tree / "reports/student/train.json").read_text())
    assert (report["steps"], report["images"], report["augment"], report["skipped_steps"]) == (12, 12 * 32, 0, 0)
    record = json.loads((tree / "reports/made_with/distill.json").read_text())
    assert {"data/pairs/manifest.json", "models/ddpm/model.safetensors"} == record["read"].keys()
    assert record["params"]["distill.method"] == method
    assert not list(tree.glob(".ddpm/checkpoints/*/*"))


@METHOD
def test_the_student_learns(taught: Path, tmp_path: Path, method: str) -> None:
    """In a single phase, as the loss grows from phase to phase."""
    options = {"steps": 80, "preview_every": 20, "learning_rate": 0.01, "optimizer": {"kind": "adamw"}, "huber": 0.0}
    one_phase = {
        "consistency": {"points": 8, "solver_steps": 8},
        "progressive": {"teacher_steps": 2, "student_steps": 1},
    }
    chosen = METHODS[method] | one_phase[method]
    tree = trees.copy(taught, tmp_path / "tree", "distill", **options, method=chosen)
    done = trees.run(tree, "distill")
    assert done.returncode == 0, done.stderr
    rows = curve(tree, "heldout.csv")
    assert rows[-1]["mse"] < 0.7 * rows[0]["mse"]


@METHOD
def test_a_repeated_distillation_gives_the_same_bytes(
    whole: Callable[[str], Path], taught: Path, tmp_path: Path, method: str
) -> None:
    assert_same(distilled(taught, tmp_path / "tree", method), whole(method))


@pytest.mark.parametrize(
    ("method", "steps"), [("consistency", [4, 1, 4]), ("progressive", [4, 1, 4]), ("progressive", [3, 3, 2])], ids=str
)
def test_stopped_and_resumed_it_gives_the_same_bytes(
    whole: Callable[[str], Path], taught: Path, tmp_path: Path, method: str, steps: list[int]
) -> None:
    """At the boundaries of phases, and before and after them."""
    tree, reached = copy(taught, tmp_path / "tree", method), 0
    for more in steps:
        said = trees.stopped(tree, more, stage="distill").stderr
        assert (f", resuming from step {reached}\n" in said) == bool(reached)
        reached += more
        assert max(int(path.stem) for path in tree.glob(".ddpm/checkpoints/*/0*.json")) == reached
    done = trees.run(tree, "distill")
    assert f", resuming from step {reached}\n" in done.stderr
    assert_same(tree, whole(method))


def test_killed_and_resumed_it_gives_the_same_bytes(whole: Callable[[str], Path], taught: Path, tmp_path: Path) -> None:
    tree = copy(taught, tmp_path / "tree", "progressive")
    with trees.start(tree, *DISTILL, **trees.seconds(0)) as process:
        while not any(int(path.stem) >= 7 for path in tree.glob(".ddpm/checkpoints/*/0*.json")):
            assert process.poll() is None
        process.kill()
    done = trees.run(tree, "distill")
    assert done.returncode == 0, done.stderr
    assert "resuming from step" in done.stderr
    assert_same(tree, whole("progressive"))


class Watched:
    """Records the teacher of each step, by its weights, and makes the losses of some steps NaN once."""

    def __init__(self, patch: pytest.MonkeyPatch, *spoiled: int) -> None:
        self.teachers: list[tuple[int, int, str]] = []
        self.averages: dict[int, str] = {}
        self.spoiled, self.step = {*spoiled}, -1
        enter, error, recipe = ProgressiveLoss.enter, losses.Error.__call__, distill.recipe

        def watched_recipe(*arguments: Any) -> Any:
            made = recipe(*arguments)
            before = made.before_step

            def before_step(state: State) -> None:
                self.step = state.step
                self.averages[state.step] = digest(state.average)
                before(state)
                if isinstance(made.loss, ProgressiveLoss):
                    self.teachers.append((state.step, made.loss.phase, digest(made.loss.teacher.model.net)))

            object.__setattr__(made, "before_step", before_step)
            return made

        def watched_error(*arguments: Any) -> Tensor:
            found: Tensor = error(*arguments)
            if found.requires_grad and self.step in self.spoiled:
                self.spoiled.remove(self.step)
                return found * math.nan
            return found

        assert enter is not None
        patch.setattr(distill, "recipe", watched_recipe)
        patch.setattr(losses.Error, "__call__", watched_error)


def digest(net: nn.Module) -> str:
    return sha256(b"".join(value.numpy().tobytes() for value in net.state_dict().values())).hexdigest()


def test_the_average_becomes_the_teacher_where_a_phase_begins(
    whole: Callable[[str], Path], taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    watched = Watched(monkeypatch)
    tree = distilled(taught, tmp_path / "tree", "progressive")
    first = digest(load_model(tree / "models/ddpm", CPU).net)
    assert watched.averages[0] == first
    expected = [first] * 4 + [watched.averages[4]] * 4 + [watched.averages[8]] * 4
    assert watched.teachers == [(step, step // 4, expected[step]) for step in range(12)]
    assert len({*expected}) == 3
    assert_same(tree, whole("progressive"))


@METHOD
def test_a_step_whose_loss_is_nan_is_skipped(
    whole: Callable[[str], Path], taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    Watched(monkeypatch, 3)
    tree = distilled(taught, tmp_path / "tree", method)
    report = json.loads((tree / "reports/student/train.json").read_text())
    assert (report["skipped_steps"], report["rollbacks"], report["steps"]) == (1, 0, 12)
    assert curve(tree, "loss.csv")[-1]["loss"] == pytest.approx(curve(whole(method), "loss.csv")[-1]["loss"], rel=0.2)


@METHOD
def test_many_in_a_row_roll_back_also_to_the_phase_before(
    taught: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    """To the measurement at step 6, with the teacher of that phase."""
    watched = Watched(monkeypatch, *range(7, 12))
    tree = copy(taught, tmp_path / "tree", method)
    done = trees.run(tree, "distill")
    assert done.returncode == 0, done.stderr
    assert "for 5 steps in a row before step 12; rolling back to step 6" in done.stderr
    report = json.loads((tree / "reports/student/train.json").read_text())
    assert (report["skipped_steps"], report["rollbacks"], report["steps"]) == (5, 1, 12)
    if method == "progressive":
        assert [step for step, _, _ in watched.teachers] == [*range(12), *range(6, 12)]
        assert watched.teachers[12:14] == watched.teachers[6:8]
        assert {phase for _, phase, _ in watched.teachers[14:]} == {2}
        assert watched.teachers[14][2] == watched.averages[8]
    Watched(monkeypatch, *range(7, 12))
    assert_same(tree, distilled(taught, tmp_path / "again", method))


def assert_close(one: Path, other: Path) -> None:
    """Up to the order of sums."""
    for name in ("loss.csv", "heldout.csv"):
        values = [np.array([[*row.values()] for row in curve(tree, name)]) for tree in (one, other)]
        np.testing.assert_allclose(values[0], values[1], rtol=2e-3)
    assert trees.digests(one, "models/student") != trees.digests(other, "models/student")


@METHOD
def test_accumulated_gradients_are_those_of_the_whole_batch(
    whole: Callable[[str], Path], taught: Path, tmp_path: Path, method: str
) -> None:
    assert_close(distilled(taught, tmp_path / "tree", method, accumulate=2), whole(method))


@pytest.mark.parametrize(("method", "sharding"), [("progressive", "weights"), ("consistency", "none")])
def test_two_processes(whole: Callable[[str], Path], taught: Path, tmp_path: Path, method: str, sharding: str) -> None:
    """Give the student of one process, up to rounding; tests/training/test_processes.py has the same bytes."""
    tree = copy(taught, tmp_path / "tree", method, processes=2, sharding=sharding)
    done = trees.run_apart(tree, *DISTILL)
    assert done.returncode == 0, done.stderr
    assert "Traceback" not in done.stderr
    assert "on 2 x cpu" in done.stderr
    assert_close(tree, whole(method))
