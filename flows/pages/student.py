"""The report of a distillation: student and teacher by number of steps."""

from collections.abc import Sequence
from typing import Any

from diffusion.errors import counted
from diffusion.evaluation import charts, few_steps, quality
from diffusion.evaluation.few_steps import STUDENT, TEACHER
from diffusion.evaluation.samplers import Row
from diffusion.storage.files import check_sums, parse_csv, read_checked, sha256
from flows.pages.contents import read_json, read_record, read_scores, table
from flows.pages.rendering import parameter, render
from flows.pages.report import SAMPLES, Verdict
from flows.paths import Paths

COMPARED = ("frechet_distance", "precision", "recall", "coverage")
GOALS = ((2, 8), (1, 4))
"""Numbers of steps of the student, and of the teacher that it is compared with."""


def figures_of_teacher(paths: Paths, weights: str, names: Sequence[str]) -> dict[str, float]:
    """Figures of the teacher's evaluation, as `teacher_mse`; none if other weights were evaluated, or none were.

    Raises FileFault if a file is damaged.
    """
    report = read_scores(paths, weights)["figures"]
    return {f"teacher_{name}": report[name] for name in names if name in report}


def render_report(paths: Paths, parameters: dict[str, Any]) -> str:
    """The page reports/student/report.html, from the files of the stages; `paths` are those of the student.

    It is a function of what evaluate-student reads and writes, so that DVC can keep it.
    """
    check_sums(paths.evaluation)
    rows = table(paths.evaluation / "few_steps.csv")
    figures = read_json(paths.evaluate_report)
    heldout, loss = (parse_csv(read_checked(paths.train_curves / f"{name}.csv")) for name in ("heldout", "loss"))
    curves = [
        (
            charts.heldout({"EMA weights": heldout}),
            "Held-out loss of the distillation, on up to 1,024 validation pairs.",
        ),
        (charts.loss({"training loss": loss}), "Training loss of the distillation."),
    ]
    measured = [name for name in COMPARED if name in rows[0]]
    drawn = [
        (few_steps.chart(rows, name), f"{_capital(quality.LABELS[name])} by steps.")
        for name in ("frechet_distance", "recall")
        if name in measured
    ]
    drift = (few_steps.chart(rows, "drift"), "Distance from the teacher's samples with the most steps, same noise.")
    record = read_record(paths, "train")
    return render(
        "student.html",
        title="Report of the distillation",
        figures=figures,
        verdicts=verdicts(figures, rows),
        pictures={file.stem: read_checked(file) for file in sorted(paths.evaluation.glob("*.png"))},
        rows=rows,
        labels={name: quality.LABELS[name] for name in measured},
        features=quality_features(paths),
        charts=[*drawn, drift],
        curves=curves,
        parameters=sorted((name, parameter(value)) for name, value in (record["params"] | parameters).items()),
        digests=sorted(
            {
                "student": sha256(paths.model / "model.safetensors"),
                "teacher": sha256(paths.teacher / "model.safetensors"),
            }.items()
        ),
    )


def _capital(text: str) -> str:
    return text[0].upper() + text[1:]


def quality_features(paths: Paths) -> str:
    """What the figures compare; empty if they were not measured."""
    file = paths.evaluation / "quality.csv"
    return (
        next((str(row["features"]) for row in table(file) if row["features"] != quality.PIXELS), "")
        if file.exists()
        else ""
    )


def verdicts(figures: dict[str, Any], rows: Sequence[Row]) -> list[Verdict]:
    """What the figures mean, in words."""
    found = []
    for own, others in GOALS:
        student, teacher = few_steps.row_of(rows, STUDENT, own), few_steps.row_of(rows, TEACHER, others)
        if student and teacher and "frechet_distance" in student:
            found.append(_against(student, teacher))
    if "quality" in figures:
        subject = f"Samples in {counted(figures['sampling_steps'], 'step')}"
        found.append(Verdict(subject, *SAMPLES.get(figures["quality"], ("neutral", str(figures["quality"]), ""))))
    return found


def _against(student: Row, teacher: Row) -> Verdict:
    """The Fréchet distances of both, apart if their 95 % intervals are."""
    ours, theirs = student["frechet_distance"], teacher["frechet_distance"]
    subject = f"The student in {counted(int(student['steps']), 'step')}"
    than = f"the teacher in {counted(int(teacher['steps']), 'DDIM step')}"
    shown = f"Fréchet distance {ours:.3g} against {theirs:.3g}"
    if student["frechet_distance_high"] < teacher["frechet_distance_low"]:
        return Verdict(subject, "good", f"better than {than}", shown)
    if student["frechet_distance_low"] > teacher["frechet_distance_high"]:
        return Verdict(subject, "bad", f"worse than {than}", shown)
    return Verdict(subject, "neutral", f"not told apart from {than}", shown)
