"""Students in MLflow: runs, a registered model and a gate of their own."""

import json
from collections.abc import Mapping
from contextlib import chdir
from pathlib import Path
from typing import Any

import mlflow
import pytest

from diffusion.errors import UserError
from diffusion.storage.files import sha256, write_csv, write_json, write_sums
from flows import made_with, tracking
from flows import params as parameters
from flows.__main__ import main
from flows.params import Params
from flows.paths import Paths
from flows.tracking.recording import Recorded
from tests.flows.tracking.trees import (
    HELDOUT,
    LOSS,
    PARAMS,
    changed,
    client_of,
    content,
    everything,
    follow,
    image_steps,
    judgments,
    runs_of,
    write_export,
    write_picture,
    write_training,
)

ROWS = [
    {"model": "teacher", "sampler": "ddim", "steps": 8, "evaluations": 8, "drift": 1.5, "n": 40},
    {"model": "student", "sampler": "consistency", "steps": 2, "evaluations": 2, "drift": 3.5, "n": 40},
]
SIZES = {"quality_images": 40, "quality_reference_images": 400}
DISTANCE = SIZES | {"frechet_distance_heldout": 0.5, "quality": "good"}


@pytest.fixture
def paths(taught: Paths) -> Paths:
    return taught


@pytest.fixture
def student(paths: Paths) -> Paths:
    """The student's files, in a tree with a recorded teacher."""
    return Paths(paths.root, student=True)


def write_student(
    paths: Paths,
    weights: bytes = b"student",
    params: Params = PARAMS,
    distance: float | None = 2.0,
    figures: Mapping[str, Any] | None = None,
) -> str:
    """What the stages of the distillation write; the distance's 95 % interval is ± 0.1. None: quality not measured."""
    digest = write_training(paths, weights, params)
    write_scores(paths, digest, params, distance, figures)
    write_export(paths, digest, len(weights), params)
    return digest


def write_scores(
    paths: Paths,
    weights: str,
    params: Params = PARAMS,
    distance: float | None = 2.0,
    figures: Mapping[str, Any] | None = None,
) -> None:
    """What evaluate-student writes."""
    paths.evaluation.mkdir(parents=True, exist_ok=True)
    report = {"sampling_steps": 2, "drift": 3.5, "drift_low": 3.0, "drift_high": 4.0, "teacher_mse": 0.3}
    if distance is not None:
        ends = {"_low": distance - 0.1, "": distance, "_high": distance + 0.1}
        report |= DISTANCE | {f"frechet_distance{end}": value for end, value in ends.items()}
    write_json(paths.evaluate_report, report | dict(figures or {}))
    write_csv(paths.evaluation / "few_steps.csv", ROWS)
    write_picture(paths.evaluation / "rows.png")
    digests = {"weights_sha256": weights, "pairs_sha256": "d" * 64, "val_pairs_sha256": "a" * 64}
    digests |= {"teacher_sha256": "t" * 64, "report_sha256": sha256(paths.evaluate_report)}
    write_json(paths.evaluation / "scored.json", digests)
    write_sums(paths.evaluation)
    paths.report.write_text(f"<h1>Distillation</h1>{distance}")
    made_with.write(paths, "evaluate", params)


def record(paths: Paths, params: Params = PARAMS) -> Recorded:
    found = tracking.record(params, paths)
    assert found is not None
    return found


def description(paths: Paths, number: str, name: str = "ddpm-student") -> str:
    return judgments(paths, name, number)


def test_a_student_has_a_run_and_a_registered_model_of_its_own(student: Paths) -> None:
    digest = write_student(student)
    recorded = record(student)
    client = client_of(student)
    (teacher,) = [run for run in runs_of(client) if run.info.run_id != recorded.run_id]
    assert recorded.trained_in == recorded.run_id
    assert (recorded.model_version, recorded.aliases) == ("1", ["challenger", "champion"])
    found = content(client, recorded.run_id)
    ((name, version, aliases, tags),) = found["versions"]
    assert (name, version, aliases) == ("ddpm-student", "1", ["challenger", "champion"])
    assert tags["mlflow.ddpm.weights_sha256"] == digest
    ((name, version, _, tags),) = content(client, teacher.info.run_id)["versions"]
    assert (name, version) == ("ddpm", "1")
    assert tags["mlflow.ddpm.weights_sha256"] != digest
    assert found["tags"]["mlflow.runName"].startswith("digits-student-")
    assert "student" not in str(teacher.info.run_name)


def test_what_is_recorded_of_a_student(student: Paths) -> None:
    write_student(student)
    recorded = record(student)
    client = client_of(student)
    found = content(client, recorded.run_id)
    assert found["params"]["distill.method"] == "consistency"
    assert found["params"]["distill.optimizer.learning_rate"] == "0.006"
    assert found["params"]["train.steps"] == "1000"  # those of the teacher
    assert found["curves"]["curves/loss"] == [(row["step"], row["loss"]) for row in LOSS]
    assert found["curves"]["curves/heldout_mse"] == [(row["step"], row["mse"]) for row in HELDOUT]
    assert found["curves"]["evaluate/frechet_distance"] == [(0, 2.0)]
    assert found["curves"]["evaluate/drift"] == [(0, 3.5)]
    assert found["curves"]["evaluate/teacher_mse"] == [(0, 0.3)]
    assert "evaluate/mse" not in found["curves"]
    assert image_steps(found["files"]) == [50, 100]
    reports = {"few_steps.csv", "few_steps.json", "rows.png", "report.html", "evaluate.json", "scored.json"}
    assert {f"evaluation/{name}" for name in reports} | {"gate.json", "onnx/denoiser.onnx"} <= set(found["files"])
    assert "evaluation/bands.json" not in found["files"]
    table = mlflow.artifacts.load_dict(f"runs:/{recorded.run_id}/evaluation/few_steps.json")
    assert table["columns"] == [*ROWS[0]]
    assert table["data"] == [[*row.values()] for row in ROWS]


def test_a_run_says_that_it_is_a_distillation(student: Paths) -> None:
    write_student(student)
    recorded = record(student)
    text = client_of(student).get_run(recorded.run_id).data.tags["mlflow.note.content"]
    first, verdict, figures, glossary = text.split("\n\n")
    assert first == (
        "Student, distilled by `consistency` from a model of **digits**, 1,452 greyscale images of 8x8 pixels: "
        "100 steps (of at most 220) of 32 images. The images were augmented with probability 0.12."
    )
    assert "ddpm-student version 1" in verdict
    assert "the first version" in verdict
    assert figures.startswith(
        "Fréchet distance 2.0000 (1.9000 to 2.1000); drift 3.5000 (3.0000 to 4.0000); held-out MSE"
    )
    assert "few_steps.json" in glossary
    assert "bits/dim" not in text


def test_the_parameters_of_the_distillation_are_none_of_the_teacher(student: Paths, paths: Paths) -> None:
    client = client_of(paths)
    before = everything(client)
    ((run,),) = [runs_of(client)]
    assert not [name for name in run.data.params if name.startswith("distill")]
    other = changed(distill={"steps": 7, "method": {"kind": "progressive"}})
    record(paths, other)
    assert everything(client) == before
    write_student(student)
    first = record(student)
    write_student(student, b"another", other)
    second = record(student, other)
    assert second.run_id != first.run_id
    assert client.get_run(second.run_id).data.params["distill.method"] == "progressive"
    assert len(runs_of(client)) == 3
    record(paths, other)
    assert len(runs_of(client)) == 3


def test_recording_again_adds_nothing(student: Paths, paths: Paths) -> None:
    write_student(student)
    first = record(student)
    client = client_of(student)
    before = everything(client), content(client, first.run_id)
    assert record(student) == first
    record(paths)
    assert (everything(client), content(client, first.run_id)) == before


def test_stages_record_one_after_the_other(student: Paths) -> None:
    digest = write_training(student, b"student")
    runs = [record(student)]
    write_scores(student, digest)
    runs.append(record(student))
    write_export(student, digest)
    runs.append(record(student))
    assert len({run.run_id for run in runs}) == 1
    assert [run.model_version for run in runs] == [None, None, "1"]


def test_a_distillation_is_followed_in_its_run(student: Paths) -> None:
    with tracking.live(PARAMS, student, None, "f1") as live:
        follow(live, student, range(101))
    client = client_of(student)
    assert live.run_id is not None
    run = client.get_run(live.run_id)
    assert run.data.params["distill.steps"] == "220"
    assert run.data.params["train.steps"] == "1000"
    assert run.data.tags["mlflow.note.content"].startswith(
        "Distillation of a model of **digits**, 1,452 greyscale images of 8x8 pixels: at most 220 steps of 32 images."
    )
    write_student(student)
    recorded = tracking.record(PARAMS, student, live.run_id)
    assert recorded is not None
    assert recorded.run_id == live.run_id
    assert content(client, live.run_id)["curves"]["curves/loss"] == [(row["step"], row["loss"]) for row in LOSS]
    with tracking.live(PARAMS, Paths(student.root), None, "f2") as teacher:
        pass
    assert teacher.run_id is not None
    assert not [name for name in client.get_run(teacher.run_id).data.params if name.startswith("distill")]


@pytest.mark.parametrize(
    ("distance", "champion", "why"),
    [
        (1.5, "2", "is not above zero"),
        (2.05, "2", "is not above zero"),  # worse, but within the noise of ± 0.14
        (2.3, "1", "is above zero"),
    ],
)
def test_a_student_is_compared_with_students_by_its_samples(
    student: Paths, distance: float, champion: str, why: str
) -> None:
    write_student(student)
    record(student)
    assert "the first version" in description(student, "1")
    write_student(student, b"second", distance=distance)
    recorded = record(student)
    assert recorded.model_version == "2"
    client = client_of(student)
    aliases = {alias: str(at) for alias, at in client.get_registered_model("ddpm-student").aliases.items()}
    assert aliases == {"challenger": "2", "champion": champion}
    assert why in description(student, "2")
    assert f"Fréchet distance {distance:.4f} against 2.0000 of version 1" in description(student, "2")
    assert str(client.get_registered_model("ddpm").aliases["champion"]) == "1"
    assert [row["figure"] for row in recorded.gate] == ["Fréchet distance"]


def test_rules_on_samples_replace_the_usual_one(student: Paths) -> None:
    rules = [{"kind": "limit", "figure": "val_mse", "value": 0.1}, {"kind": "limit", "figure": "recall", "value": 0.7}]
    params = changed(tracking={"gate": rules})
    write_student(student, params=params, figures={"recall": 0.6})
    assert record(student, params).aliases == ["challenger"]
    assert description(student, "1") == "Not promoted: recall 0.6000 is below the limit, 0.7"
    write_student(student, b"second", params, distance=9.0, figures={"recall": 0.8})
    assert record(student, params).aliases == ["challenger", "champion"]


def test_without_quality_the_first_student_is_champion_and_the_next_is_not_comparable(
    student: Paths, capfd: pytest.CaptureFixture[str]
) -> None:
    write_student(student, distance=None)
    assert record(student).aliases == ["challenger", "champion"]
    write_student(student, b"second", distance=None)
    assert record(student).aliases == ["challenger"]
    assert "`ddpm promote 2 --reason TEXT --student` makes version 2 the champion" in description(student, "2")
    assert "MLflow: champion of ddpm-student stays version 1" in capfd.readouterr().err


def command(paths: Paths, *arguments: str) -> int:
    with chdir(paths.root):
        return main(arguments)


def test_commands_take_the_student(student: Paths, paths: Paths, capfd: pytest.CaptureFixture[str]) -> None:
    assert command(paths, "track", "--student") == 1
    error = capfd.readouterr().err
    assert "models/student/model.safetensors: missing; run `dvc repro distill/dvc.yaml` or `dvc pull`" in error
    assert command(paths, "promote", "1", "--reason", "why", "--student") == 1
    assert "no such version of ddpm-student" in capfd.readouterr().err
    write_student(student)
    record(student)
    write_student(student, b"second", distance=9.0)
    assert command(paths, "track", "--student", "--json") == 0
    found = json.loads(capfd.readouterr().out)
    assert (found["model_version"], found["aliases"]) == ("2", ["challenger"])
    assert command(paths, "track", "--student") == 0
    assert "model    ddpm-student version 2 (challenger)" in capfd.readouterr().out
    assert command(paths, "promote", "2", "--reason", "sharper", "--student") == 0
    assert capfd.readouterr().out == "ddpm-student version 2 is now champion (previously version 1)\n"
    assert description(student, "2").endswith("Promoted to champion by hand in place of version 1: sharper")
    assert str(client_of(paths).get_registered_model("ddpm").aliases["champion"]) == "1"
    assert command(paths, "track") == 0
    assert "model    ddpm version 1 (challenger, champion)" in capfd.readouterr().out


def test_stale_results_are_left_out(student: Paths, capfd: pytest.CaptureFixture[str]) -> None:
    write_student(student)
    other = changed(evaluate={"quality_samples": 30}, export={"opset": 19})
    tracking.track(other, student, as_json=True)
    said = capfd.readouterr()
    assert said.err.splitlines() == [
        f"MLflow: left out: the {part} ({ran} ran with {name}: {before}, params.yaml says {now}); "
        "`dvc repro distill/dvc.yaml` brings it up to date"
        for part, ran, name, before, now in (
            ("evaluation", "evaluate-student", "evaluate.quality_samples", 256, 30),
            ("export", "export-student", "export.opset", 20, 19),
        )
    ]
    assert json.loads(said.out)["model_version"] is None


@pytest.mark.parametrize(
    ("section", "values", "why"),
    [
        ("distill", {"steps": 7}, "distill ran with distill.steps: 220, params.yaml says 7"),
        ("train", {"steps": 7}, "train ran with train.steps: 1000, params.yaml says 7"),
        ("network", {"dropout": 0.5}, "train ran with network.dropout: 0.0, params.yaml says 0.5"),
    ],
)
def test_other_parameters_are_refused(student: Paths, section: str, values: dict[str, Any], why: str) -> None:
    """Those of the teacher's training, too: they are among the parameters of the student's run."""
    write_student(student)
    with pytest.raises(UserError, match=f"^{why}; `dvc repro distill/dvc.yaml` brings the results up to date$"):
        tracking.track(changed(**{section: values}), student, as_json=True)


def test_the_teacher_may_have_been_trained_on_another_device_or_imported(student: Paths, paths: Paths) -> None:
    elsewhere = parameters.validate(PARAMS.model_dump(mode="json") | {"device": "cpu"}, "test")
    write_student(student, params=elsewhere)
    assert client_of(student).get_run(record(student, elsewhere).run_id).data.params["device"] == "cpu"
    paths.train_report.unlink()  # as `ddpm diffusers import` leaves it
    other = changed(train={"steps": 7})
    write_student(student, b"of an imported one", other)
    record(student, other)


@pytest.mark.parametrize("name", ["reports/student/evaluation/few_steps.csv", "reports/student/evaluate.json"])
def test_damaged_results_are_not_recorded(student: Paths, name: str, capfd: pytest.CaptureFixture[str]) -> None:
    write_student(student)
    file = student.root / name
    file.write_bytes(file.read_bytes() + b" ")
    assert tracking.record(PARAMS, student) is None
    error = capfd.readouterr().err
    assert Path(name).name in error
    assert error.count("\n") == 1
    assert len(runs_of(client_of(student))) == 1
