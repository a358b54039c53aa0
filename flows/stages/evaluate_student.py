"""Stage evaluate-student: samples of student and teacher side by side, by number of steps, from the same noise."""

from functools import partial
from typing import Any, NamedTuple

import numpy as np
import torch

from diffusion.distillation.sampling import student_sampling
from diffusion.errors import UserError, counted
from diffusion.evaluation import few_steps, quality, sets
from diffusion.evaluation.features import chosen_features, trained_features
from diffusion.evaluation.few_steps import STUDENT, TEACHER, Drawing
from diffusion.evaluation.quality import Quality
from diffusion.model import WEIGHTS, Model, load_model
from diffusion.nn import build as networks
from diffusion.pairs.noise import Purpose, stream
from diffusion.pairs.pairs import Pairs
from diffusion.pairs.pixels import visible
from diffusion.progress import Progress, say, working
from diffusion.samples import classes_in_turn, grid_png
from diffusion.storage.files import new_directory, sha256, write_atomic, write_csv, write_json, write_sums
from flows import dvc_yaml, made_with, tracking
from flows.pages import student as page
from flows.pages.contents import read_record
from flows.params import Params
from flows.paths import Paths

COPIED = ("mse", "mse_low", "mse_high", "val_mse", "bits_per_dim", "bits_per_dim_low", "bits_per_dim_high")
"""Figures of the teacher that the report repeats: a student predicts no noise, and has no likelihood."""


class Compared(NamedTuple):
    """What student and teacher draw, and how good it is."""

    drawings: list[Drawing]
    quality: Quality | None
    """None if it was not measured."""
    rows: list[dict[str, Any]]


def run(params: Params, paths: Paths) -> None:
    """Draw samples of both models in 1 to 50 steps, measure their quality and drift, and write the report."""
    device, paths = networks.device(params.device), Paths(paths.root, student=True)
    student, teacher = load_model(paths.model, device), load_model(paths.teacher, device)
    check_teacher(paths)
    splits = [Pairs(paths.pairs, split) for split in ("train", "val", "test")]
    for model in (student, teacher):
        splits[0].check_process(model.process.schedule.alpha_bar.numpy(), model.shape)
    found = compare(params, paths, student, teacher, splits, device)
    with working("evaluate-student: drawing the pictures"):
        chosen = next(
            each.drawn
            for each in found.drawings
            if each.model == STUDENT and each.drawn.options.steps == params.distill.sampling_steps
        )
        pictures = {
            "rows": few_steps.picture(found.drawings, params.evaluate.shown_channels),
            "samples": grid_png(visible(chosen.samples.pixels[: params.sample.count], params.evaluate.shown_channels)),
        }
        if found.quality:
            pictures["nearest"] = found.quality.picture
    report = summary(params, paths, found)
    write_json(paths.evaluate_report, report)  # before scored.json, which has its digest
    with new_directory(paths.evaluation) as temporary:
        write_csv(temporary / "few_steps.csv", found.rows)
        if found.quality:
            write_csv(temporary / "quality.csv", [figure._asdict() for figure in found.quality.figures])
        for name, png in pictures.items():
            write_atomic(temporary / f"{name}.png", png)
        digests = {"weights_sha256": sha256(paths.model / WEIGHTS), "pairs_sha256": splits[2].digest}
        digests |= {"val_pairs_sha256": splits[1].digest, "teacher_sha256": sha256(paths.teacher / WEIGHTS)}
        write_json(temporary / "scored.json", digests | {"report_sha256": sha256(paths.evaluate_report)})
        write_sums(temporary)
    write_atomic(
        paths.report,
        page.render_report(paths, made_with.flat(params, *dvc_yaml.parameters(paths.stage("evaluate")))).encode(),
    )
    made_with.write(paths, "evaluate", params)
    with working("evaluate-student: recording the results in MLflow"):
        tracking.record(params, paths)
    say(f"evaluate-student: {sentence(found, params.distill.sampling_steps)}")


def check_teacher(paths: Paths) -> None:
    """Raise UserError if the student was distilled from another model, according to the record of distill."""
    weights = paths.teacher / WEIGHTS
    read = read_record(paths, "train")["read"].get(weights.relative_to(paths.root).as_posix())
    if read is not None and sha256(weights) != read:
        raise UserError(
            f"{paths.model}: not distilled from {paths.teacher} as it is now; "
            f"`dvc repro {dvc_yaml.target('distill')}` distils it again"
        )


def compare(
    params: Params, paths: Paths, student: Model, teacher: Model, splits: list[Pairs], device: torch.device
) -> Compared:
    """Draw samples of both models in each number of steps, and measure them if there are enough real images."""
    train, *held_out = splits
    wanted, chosen, T = params.evaluate.quality_samples, params.distill.sampling_steps, train.num_timesteps
    real = None
    if wanted:
        with working("evaluate-student: choosing real images to compare samples with"):
            real = quality.references(wanted, train, held_out)
    if real is not None and real.n < quality.MIN_IMAGES:
        say(
            f"evaluate-student: samples are not compared with real images, which takes {quality.MIN_IMAGES} held-out "
            "images and twice as many for training"
        )
        real = None
    if real is not None:
        labels = real.others.labels
    else:
        classes = classes_in_turn(student, params.sample.count, torch.device("cpu"))
        labels = np.full(params.sample.count, -1) if classes is None else classes.numpy()
    steps = sorted({chosen, *(count for count in few_steps.STEPS if count <= T)})
    models = (
        (
            TEACHER,
            teacher,
            partial(few_steps.teacher_sampling, params.sample.model_copy(update={"guidance": params.distill.guidance})),
        ),
        (STUDENT, student, partial(student_sampling, params.sample)),
    )
    features = None
    if real is not None:
        options = params.evaluate
        features = chosen_features(paths.root, options.features, options.features_sha256, student.shape)
        features = features or trained_features(train, paths.features, "evaluate-student")
    with Progress("evaluate-student", 2 * sets.batches(len(labels)) * sum(steps), "steps") as progress:
        note = f"drawing {counted(len(labels), 'sample')} with each number of steps"
        drawings = few_steps.draw(models, steps, params.seed, device, labels, lambda: progress.advance(1, note))
    resamples = stream(params.seed, Purpose.BOOTSTRAP).multinomial(
        len(labels), np.full(len(labels), 1 / len(labels)), size=params.evaluate.resamples
    )
    drifts = few_steps.drift(drawings, resamples)
    if real is None or features is None:
        return Compared(drawings, None, few_steps.table(drawings, drifts, []))
    first = next(
        index for index, each in enumerate(drawings) if each.model == STUDENT and each.drawn.options.steps == chosen
    )
    others = [each.drawn.samples for index, each in enumerate(drawings) if index != first]
    with working("evaluate-student: comparing samples with real images"):
        measured = quality.measure(
            real,
            drawings[first].drawn.samples,
            features,
            params.evaluate.resamples,
            params.evaluate.shown_channels,
            others,
        )
    figures = list(measured.others)
    figures.insert(first, measured.of_samples)
    return Compared(drawings, measured, few_steps.table(drawings, drifts, figures))


def summary(params: Params, paths: Paths, found: Compared) -> dict[str, Any]:
    """reports/student/evaluate.json: figures of the student's samples, its drift, and those of its teacher."""
    chosen = params.distill.sampling_steps
    own = few_steps.row_of(found.rows, STUDENT, chosen)
    assert own is not None
    report: dict[str, Any] = {"sampling_steps": chosen}
    report |= {f"drift{end}": own[f"drift{end}"] for end in ("", "_low", "_high")}
    if found.quality:
        report |= found.quality.report
        for row in found.rows:
            if row["model"] == TEACHER and row["steps"] in (4, 8):
                report[f"teacher_frechet_distance_{row['steps']}"] = row["frechet_distance"]
    return report | page.figures_of_teacher(Paths(paths.root), sha256(paths.teacher / WEIGHTS), COPIED)


def sentence(found: Compared, chosen: int) -> str:
    """How the student's samples compare with those of the teacher, in one line."""
    if not found.quality:
        drawn = few_steps.row_of(found.rows, STUDENT, chosen)
        assert drawn is not None
        return f"samples in {counted(chosen, 'step')}, drift {drawn['drift']:.1f} grey levels"
    parts = []
    for model in (STUDENT, TEACHER):
        rows = [row for row in found.rows if row["model"] == model and row["steps"] in {1, 2, 4, 8, chosen}]
        figures = ", ".join(f"{row['steps']}: {row['frechet_distance']:.3g}" for row in rows)
        parts.append(f"{model} {figures}")
    word, reason = found.quality.verdict
    return f"Fréchet distance by steps: {'; '.join(parts)}; {counted(chosen, 'step')}: {word}, {reason}"
