"""Stages evaluate-student and export-student, on a tiny student of a tiny teacher of the digits."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
from huggingface_hub import ModelCard

from diffusion.distillation.sampling import student_sampling
from diffusion.evaluation import few_steps, quality
from diffusion.export import golden
from diffusion.model import Model, load_model
from diffusion.pairs.pixels import to_uint8
from diffusion.sampling.build import SampleOptions, sampling_timesteps
from diffusion.sampling.sampler import sample
from diffusion.storage.files import read_checked, sha256, write_json, write_sums
from tests import sharing
from tests.conftest import run_stages
from tests.flows.students import page_of, record_of, report_of, rows_of
from tests.training import trees

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
STEPS = [1, 2, 4, 8, 16, 50]
FIGURES = ("drift", "frechet_distance", "kid", "precision", "recall", "density", "coverage")
MADE = ("models/student-onnx", "reports/student", "reports/made_with")


@pytest.fixture(scope="module")
def student_tree(whole_tree: Path) -> Path:
    """The tree of all stages after those of the distillation, too; tests copy it."""

    def make(tree: Path) -> None:
        shutil.copytree(whole_tree, tree)
        trees.change(tree, {"export": {"variants": []}})
        run_stages(tree, "distill", "evaluate-student", "export-student")

    return sharing.once("student_tree", make)


@pytest.fixture
def tree(student_tree: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(student_tree, tmp_path / "tree"))


def failure(tree: Path, stage: str) -> str:
    """The last line that a failing stage says; it must leave the others' results alone."""
    before = trees.digests(tree, *MADE)
    done = trees.run(tree, stage)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert trees.digests(tree, *MADE) == before
    return done.stderr.splitlines()[-1]


def test_both_are_compared_by_number_of_steps(student_tree: Path) -> None:
    rows = rows_of(student_tree)
    assert [(row["model"], row["steps"]) for row in rows] == [
        (model, steps) for model in ("teacher", "student") for steps in STEPS
    ]
    assert {(row["model"], row["sampler"]) for row in rows} == {("teacher", "ddim"), ("student", "consistency")}
    for row in rows:
        assert (row["evaluations"], row["n"]) == (row["steps"], 40)
        for figure in FIGURES:
            assert row[f"{figure}_low"] <= row[figure] <= row[f"{figure}_high"]
    assert [row["drift"] for row in rows if (row["model"], row["steps"]) == ("teacher", 50)] == [0]
    assert all(row["drift"] > 0 for row in rows if (row["model"], row["steps"]) != ("teacher", 50))


def test_the_report_has_the_figures_of_the_chosen_number_of_steps_and_of_the_teacher(student_tree: Path) -> None:
    report, rows = report_of(student_tree), rows_of(student_tree)
    chosen = few_steps.row_of(rows, "student", 2)
    assert chosen is not None
    assert report["sampling_steps"] == 2
    for figure in FIGURES:
        assert {f"{figure}{end}": report[f"{figure}{end}"] for end in ("", "_low", "_high")}.items() <= chosen.items()
    for steps in (4, 8):
        teacher = few_steps.row_of(rows, "teacher", steps)
        assert teacher is not None
        assert report[f"teacher_frechet_distance_{steps}"] == teacher["frechet_distance"]
    of_teacher = json.loads((student_tree / "reports/evaluate.json").read_text())
    for name in ("mse", "mse_low", "val_mse", "bits_per_dim"):
        assert report[f"teacher_{name}"] == of_teacher[name]
    assert not {"mse", "val_mse", "bits_per_dim"} & report.keys()


def test_files_and_records(student_tree: Path) -> None:
    folder = student_tree / "reports/student/evaluation"
    assert {path.name for path in folder.iterdir()} == {
        "SHA256SUMS",
        "few_steps.csv",
        "quality.csv",
        "scored.json",
        "rows.png",
        "samples.png",
        "nearest.png",
    }
    assert json.loads(read_checked(folder / "scored.json")) == {
        "weights_sha256": sha256(student_tree / "models/student/model.safetensors"),
        "teacher_sha256": sha256(student_tree / "models/ddpm/model.safetensors"),
        "pairs_sha256": json.loads(read_checked(student_tree / "reports/evaluation/scored.json"))["pairs_sha256"],
        "val_pairs_sha256": json.loads(read_checked(student_tree / "reports/evaluation/scored.json"))[
            "val_pairs_sha256"
        ],
        "report_sha256": sha256(student_tree / "reports/student/evaluate.json"),
    }
    evaluated, exported = record_of(student_tree, "evaluate-student"), record_of(student_tree, "export-student")
    weights = {f"models/{name}/model.safetensors" for name in ("student", "ddpm")}
    assert evaluated["read"].keys() == weights | {"data/pairs/manifest.json"}
    assert evaluated["wrote"].keys() == {"reports/student/evaluate.json", "reports/student/report.html"}
    assert exported["read"].keys() == {
        "data/pairs/manifest.json",
        "models/student/model.safetensors",
        "reports/student/evaluate.json",
    }
    files = {f"models/student-onnx/{name}.onnx" for name in ("denoiser", "sampler")}
    assert exported["wrote"].keys() == files | {"models/student-onnx/README.md", "reports/student/export.json"}
    for record in (evaluated, exported):
        for name, digest in (record["read"] | record["wrote"]).items():
            assert sha256(student_tree / name) == digest
    assert evaluated["params"]["distill.sampling_steps"] == exported["params"]["distill.sampling_steps"] == 2
    assert "sample.steps" not in evaluated["params"]  # of no concern here, as are export.steps and export.sampler


def test_the_card_names_the_teacher(student_tree: Path) -> None:
    card, report = ModelCard.load(student_tree / "models/student-onnx/README.md"), report_of(student_tree)
    assert card.data.tags == ["diffusion", "ddpm", "distillation"]
    figures = {result.metric_type: result.metric_value for result in card.data.eval_results}
    assert figures["frechet_distance"] == report["frechet_distance"]
    teacher = sha256(student_tree / "models/ddpm/model.safetensors")
    assert f"distilled from a model whose `model.safetensors` has the SHA-256 `{teacher}`" in card.text
    assert f"| MSE of the predicted noise (predicting zero: 1) | {report['teacher_mse']:.4g} |" in card.text
    assert f"| `sampler.onnx` | `{sha256(student_tree / 'models/student-onnx/sampler.onnx')}` |" in card.text


def test_the_teacher_keeps_its_results(student_tree: Path, whole_tree: Path) -> None:
    before = trees.digests(whole_tree, "models", "reports")
    assert before.items() <= trees.digests(student_tree, "models", "reports").items()


def test_evaluate_student_writes_the_same_bytes_again(tree: Path, student_tree: Path) -> None:
    """For export-student, which shares its code with export, the test of all stages shows it."""
    shutil.rmtree(tree / "reports/student/evaluation")
    run_stages(tree, "evaluate-student")
    assert trees.digests(tree, *MADE) == trees.digests(student_tree, *MADE)


def test_the_page(student_tree: Path) -> None:
    page = page_of(student_tree)
    assert "Report of the distillation" in page
    assert "The student in 2 steps:" in page
    assert "the teacher in 8 DDIM steps" in page
    assert "The student in 1 step:" in page
    assert "Samples in 2 steps: still learning" in page
    assert "features of a classifier trained on this data" in page
    assert "Held-out noise MSE" in page
    assert "distill.sampling_steps" in page
    assert "40 samples of each" in page
    assert sha256(student_tree / "models/ddpm/model.safetensors") in page


def test_another_number_of_steps_without_quality(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """There are drift, pictures and a page; there are never more steps than timesteps, of which there are 100."""
    monkeypatch.setattr(few_steps, "STEPS", (1, 2, 8, 100, 101))
    trees.change(tree, {"distill": {"sampling_steps": 3}, "evaluate": {"quality_samples": 0}, "sample": {"count": 5}})
    done = trees.run(tree, "evaluate-student")
    assert done.returncode == 0, done.stderr
    rows, report = rows_of(tree), report_of(tree)
    assert [row["steps"] for row in rows] == 2 * [1, 2, 3, 8, 100]
    assert {row["n"] for row in rows} == {5}
    assert ",".join(rows[0]) == "model,sampler,steps,evaluations,drift,drift_low,drift_high,n"
    chosen = few_steps.row_of(rows, "student", 3)
    assert chosen is not None
    assert (report["sampling_steps"], report["drift"]) == (3, chosen["drift"])
    assert "quality" not in report
    assert "teacher_mse" in report
    assert "real images" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last == f"evaluate-student: samples in 3 steps, drift {chosen['drift']:.1f} grey levels"
    names = {path.name for path in (tree / "reports/student/evaluation").iterdir()}
    assert names == {"SHA256SUMS", "few_steps.csv", "scored.json", "rows.png", "samples.png"}
    page = page_of(tree)
    assert "Fréchet distance" not in page
    assert "drift" in page


def test_too_few_images_for_quality(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quality, "MIN_IMAGES", 1000)
    monkeypatch.setattr(few_steps, "STEPS", (1, 2))
    done = trees.run(tree, "evaluate-student")
    assert done.returncode == 0, done.stderr
    assert "samples are not compared with real images, which takes 1000 held-out images" in done.stderr
    assert {row["n"] for row in rows_of(tree)} == {4}  # sample.count
    page_of(tree)


def test_figures_of_another_teacher_are_not_copied(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(few_steps, "STEPS", (1, 2))
    trees.change(tree, {"evaluate": {"quality_samples": 0}})
    scored = tree / "reports/evaluation/scored.json"
    write_json(scored, json.loads(scored.read_text()) | {"weights_sha256": "0" * 64})
    write_sums(scored.parent)
    run_stages(tree, "evaluate-student")
    assert not [name for name in report_of(tree) if name.startswith("teacher_")]
    assert "Held-out noise MSE" not in page_of(tree)
    shutil.rmtree(scored.parent)  # as where the teacher was never evaluated
    run_stages(tree, "evaluate-student")
    assert not [name for name in report_of(tree) if name.startswith("teacher_")]


def test_a_student_of_another_teacher_is_refused(tree: Path) -> None:
    """As after another training; damaged weights are reported as damaged, see below."""
    Model.load(tree / "models/ddpm").save(tree / "models/ddpm")  # the same again
    other = Model.load(tree / "models/ddpm")
    with torch.no_grad():
        next(other.net.parameters()).add_(0.1)
    other.save(tree / "models/ddpm")
    assert failure(tree, "evaluate-student") == (
        "ddpm evaluate-student: error: models/student: not distilled from models/ddpm as it is now; "
        "`dvc repro distill/dvc.yaml:distill` distils it again"
    )


AGAIN = "delete it, run `make scrub` (the DVC cache may hold the same damaged file), then `dvc repro"


@pytest.mark.parametrize(
    ("stage", "name", "remedy"),
    [
        ("evaluate-student", "models/student/model.safetensors", f"{AGAIN} distill/dvc.yaml`"),
        ("evaluate-student", "models/ddpm/model.safetensors", f"{AGAIN}`"),
        ("evaluate-student", "data/pairs/manifest.json", f"{AGAIN}`"),
        ("export-student", "models/student/model.safetensors", f"{AGAIN} distill/dvc.yaml`"),
        ("export-student", "data/pairs/manifest.json", f"{AGAIN}`"),
    ],
)
def test_damaged_and_missing_inputs(tree: Path, stage: str, name: str, remedy: str) -> None:
    path = tree / name
    content = path.read_bytes()
    path.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    said = failure(tree, stage)
    assert said.startswith(f"ddpm {stage}: error: {name}: damaged (")
    assert said.endswith(f"; {remedy}")
    path.unlink()
    said = failure(tree, stage)
    made_by = {"models/student": "distill/dvc.yaml:distill", "models/ddpm": "train", "data/pairs": "pairs"}
    target = made_by["/".join(name.split("/")[:2])]
    assert said == f"ddpm {stage}: error: {name}: No such file or directory; `dvc repro {target}` writes it"


def test_damaged_reports(tree: Path) -> None:
    """Of the teacher, whose figures are copied, and of the student, which the graphs hold."""
    for stage, name, target in (
        ("evaluate-student", "reports/evaluate.json", "dvc repro`"),
        ("export-student", "reports/student/evaluate.json", "dvc repro distill/dvc.yaml`"),
    ):
        trees.change(tree, {"evaluate": {"quality_samples": 0}})
        path = tree / name
        path.write_bytes(path.read_bytes() + b" ")
        done = trees.run(tree, stage)
        assert done.returncode == 1
        assert f"{name}: damaged (" in done.stderr.splitlines()[-1]
        assert done.stderr.splitlines()[-1].endswith(target)


def run_sampler(tree: Path, steps: int, **more: Any) -> tuple[np.ndarray, np.ndarray, dict[str, str]]:
    """Images of sampler.onnx and their noise, with its metadata."""
    session = ort.InferenceSession(tree / "models/student-onnx/sampler.onnx", providers=["CPUExecutionProvider"])
    facts = dict(session.get_modelmeta().custom_metadata_map)
    assert golden.check(session, facts).exact
    noise = np.random.default_rng(steps).standard_normal((6, 1, 8, 8), np.float32)
    images = session.run(["images"], {"noise": noise, "steps": np.array([steps])} | more)[0]
    return images, noise, facts


def with_torch(model: Model, options: SampleOptions, noise: np.ndarray, y: np.ndarray | None = None) -> np.ndarray:
    timesteps = sampling_timesteps(options, model.process.schedule)
    sampler = model.sampler(options, None if y is None else torch.from_numpy(y))
    drawn = sample(sampler, lambda _: torch.from_numpy(noise), timesteps)
    return to_uint8(drawn.numpy()).transpose(0, 2, 3, 1)


def assert_same_pictures(found: np.ndarray, expected: np.ndarray) -> None:
    off = np.abs(found.astype(int) - expected)
    assert off.max() <= 1
    assert (off > 0).mean() < 0.01
    assert expected.std() > 1


@pytest.mark.parametrize("steps", [0, 1, 2, 4])
def test_the_sampler_in_onnx_draws_the_pictures_of_torch(student_tree: Path, steps: int) -> None:
    images, noise, facts = run_sampler(student_tree, steps)
    model = load_model(student_tree / "models/student", CPU)
    given = SampleOptions(threshold="clip")
    assert_same_pictures(images, with_torch(model, student_sampling(given, steps or 2), noise))
    expected = {"sampler": "consistency", "gamma": "0.0", "steps": "2", "spacing": "angle", "guidance": "1.0"}
    assert {f"ddpm.{key}": value for key, value in expected.items()}.items() <= facts.items()
    assert facts["ddpm.stochastic"] == "false"
    assert facts["ddpm.weights_sha256"] == sha256(student_tree / "models/student/model.safetensors")
    assert json.loads(facts["ddpm.heldout"]) == report_of(student_tree)
    report = json.loads((student_tree / "reports/student/export.json").read_text())
    assert report["sampler"]["images"] == 64
    assert report["denoiser"]["max_difference"] < 1e-4


def replace(tree: Path, name: str, seed: int) -> Model:
    """An untrained model of classes and a learned variance, whose output is not zero."""
    old = load_model(tree / "models" / name, CPU).config
    process = old.process.model_copy(update={"learned_variance": True})
    network = old.network.model_copy(update={"classes": True})
    made = Model.new(old.shape, network, process, old.classes, seed)
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in made.net.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    made.save(tree / "models" / name)
    return made


def test_classes_and_a_learned_variance(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Guidance is built in: the graph takes none, whatever `sample.guidance` says."""
    monkeypatch.setattr(few_steps, "STEPS", (1, 2))
    student, _ = replace(tree, "student", 1), replace(tree, "ddpm", 2)
    record = record_of(tree, "distill")
    record["read"]["models/ddpm/model.safetensors"] = sha256(tree / "models/ddpm/model.safetensors")
    write_json(tree / "reports/made_with/distill.json", record)
    changes = {"sampling_steps": 4, "guidance": 2.0}
    trees.change(tree, {"process": {"learned_variance": True}, "network": {"classes": True}})
    trees.change(tree, {"distill": changes, "sample": {"guidance": 3.0, "count": 12, "variance": "learned"}})
    trees.change(tree, {"evaluate": {"quality_samples": 0}, "export": {"max_loss": 9.0}})
    run_stages(tree, "evaluate-student", "export-student")
    assert [(row["steps"], row["evaluations"]) for row in rows_of(tree)] == [
        *((1, 2), (2, 4), (4, 8)),  # the guided teacher
        *((1, 1), (2, 2), (4, 4)),
    ]
    y = np.array([0, 3, 9, -1, 5, 0])
    options = student_sampling(SampleOptions(), 4)
    for steps in (0, 1):
        images, noise, facts = run_sampler(tree, steps, y=y)
        assert (facts["ddpm.guidance"], facts["ddpm.variance"]) == ("1.0", "fixed-small")
        assert_same_pictures(images, with_torch(student, student_sampling(options, steps or 4), noise, y))
    graph = onnx.load(tree / "models/student-onnx/sampler.onnx")
    assert [value.name for value in graph.graph.input] == ["noise", "steps", "y"]
    assert {row["n"] for row in rows_of(tree)} == {12}
