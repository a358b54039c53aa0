"""The report of a distillation: what it says in words. The page itself: see test_student_stages.py."""

import json
from pathlib import Path
from typing import Any

import pytest

from diffusion.errors import FileFault
from diffusion.storage.files import sha256, write_json, write_sums
from flows.pages import student
from flows.pages.student import COMPARED
from flows.paths import Paths


def row(model: str, steps: int, distance: float | None = None, half: float = 0.1) -> dict[str, Any]:
    found = {"model": model, "steps": float(steps), "drift": 1.0}
    if distance is not None:
        found |= {"frechet_distance": distance, "frechet_distance_low": distance - half}
        found["frechet_distance_high"] = distance + half
    return found


@pytest.mark.parametrize(
    ("distance", "mood", "words"),
    [
        (0.5, "good", "better than the teacher in 8 DDIM steps"),
        (0.85, "neutral", "not told apart from the teacher in 8 DDIM steps"),
        (1.15, "neutral", "not told apart from the teacher in 8 DDIM steps"),
        (1.5, "bad", "worse than the teacher in 8 DDIM steps"),
    ],
)
def test_a_difference_counts_if_the_intervals_do_not_overlap(distance: float, mood: str, words: str) -> None:
    rows = [row("teacher", 2, 0.1), row("teacher", 8, 1.0), row("student", 2, distance), row("student", 8, 0.1)]
    (found,) = student.verdicts({}, rows)
    assert (found.subject, found.mood, found.words) == ("The student in 2 steps", mood, words)
    assert found.more == f"Fréchet distance {distance:.3g} against 1"


def test_one_step_is_compared_with_four_of_the_teacher() -> None:
    rows = [row("teacher", 4, 1.0), row("student", 1, 0.1), row("teacher", 1, 9.0)]
    (found,) = student.verdicts({}, rows)
    assert (found.subject, found.words) == ("The student in 1 step", "better than the teacher in 4 DDIM steps")


def test_without_quality_there_is_no_verdict() -> None:
    assert (
        student.verdicts(
            {"sampling_steps": 2}, [row(model, n) for model in ("teacher", "student") for n in (1, 2, 4, 8)]
        )
        == []
    )


@pytest.mark.parametrize(("quality", "mood"), [("good", "good"), ("copying", "bad"), ("new", "neutral")])
def test_the_quality_of_the_chosen_number_of_steps(quality: str, mood: str) -> None:
    (found,) = student.verdicts({"quality": quality, "sampling_steps": 3}, [])
    assert found.subject == "Samples in 3 steps"
    assert found.mood == mood
    assert quality in found.words


def test_the_compared_figures_have_labels() -> None:
    assert {*COMPARED} <= student.quality.LABELS.keys()


@pytest.fixture
def evaluated(tmp_path: Path) -> Paths:
    """The files of the teacher's evaluation that its figures are copied from."""
    paths = Paths(tmp_path)
    paths.evaluation.mkdir(parents=True)
    write_json(paths.evaluate_report, {"mse": 0.25, "r2": 0.5})
    write_json(
        paths.evaluation / "scored.json", {"weights_sha256": "w", "report_sha256": sha256(paths.evaluate_report)}
    )
    write_sums(paths.evaluation)
    return paths


def test_the_figures_of_the_teacher_are_those_of_its_weights(evaluated: Paths) -> None:
    assert student.figures_of_teacher(evaluated, "w", ("mse", "bits_per_dim")) == {"teacher_mse": 0.25}
    assert student.figures_of_teacher(evaluated, "v", ("mse",)) == {}
    evaluated.evaluate_report.unlink()
    assert student.figures_of_teacher(evaluated, "w", ("mse",)) == {}
    assert student.figures_of_teacher(Paths(evaluated.root / "other"), "w", ("mse",)) == {}


def test_changed_figures_of_the_teacher_are_refused(evaluated: Paths) -> None:
    write_json(evaluated.evaluate_report, {"mse": 0.1})
    with pytest.raises(FileFault, match=r"evaluate\.json: damaged"):
        student.figures_of_teacher(evaluated, "w", ("mse",))
    scored = evaluated.evaluation / "scored.json"
    scored.write_text(json.dumps({"weights_sha256": "v"}))
    with pytest.raises(FileFault, match=r"scored\.json: damaged"):
        student.figures_of_teacher(evaluated, "w", ("mse",))
