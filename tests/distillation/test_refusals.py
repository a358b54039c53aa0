"""What distill refuses, each with one line; which distillations resume; the held-out loss."""

import re
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from diffusion.distillation.heldout import heldout_loss
from diffusion.distillation.losses import ConsistencyLoss
from diffusion.distillation.options import DistillOptions
from diffusion.errors import UserError
from diffusion.model import Model
from diffusion.pairs.pairs import Pairs
from diffusion.process.timesteps import TIMESTEPS
from diffusion.storage.files import write_sums
from diffusion.training.distributed import World
from flows import dvc_yaml, yaml_files
from flows import fingerprint as fingerprints
from flows import params as parameters
from flows.paths import Paths
from flows.stages import distill
from tests.training import trees

CPU = torch.device("cpu")


def give_teacher(tree: Path, classes: bool = False, seed: int = 0, **process: Any) -> Model:
    """An untrained teacher, whose output is not zero."""
    params, pairs = parameters.load(tree / "params.yaml"), Pairs(Paths(tree).pairs, "train")
    model = Model.new(
        pairs.shape,
        params.network.model_copy(update={"classes": classes}),
        params.process.model_copy(update=process),
        pairs.manifest.classes,
        seed,
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.net.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
    model.save(tree / "models/ddpm")
    return model


@pytest.fixture
def tree(pairs_tree: Path, tmp_path: Path) -> Path:
    """A tree with pairs and an untrained teacher."""
    made = trees.copy(pairs_tree, tmp_path / "tree")
    give_teacher(made)
    return made


def guide(tree: Path, guidance: float) -> None:
    trees.change(tree, {"network": {"classes": True}, "distill": {"guidance": guidance}})


def refused(tree: Path) -> str:
    """The only line that distill writes, without its beginning."""
    done = trees.run(tree, "distill")
    assert done.returncode == 1
    found = re.fullmatch(r"ddpm distill: error: (.*)\n", done.stderr)
    assert found is not None, done.stderr
    assert not (tree / "models/student").exists()
    assert not list(tree.glob(".ddpm/checkpoints/*/*.json"))
    return found[1]


@pytest.mark.parametrize("name", ["eps", "mu"])
def test_teachers_that_cannot_see_the_image_in_noise(tree: Path, name: str) -> None:
    give_teacher(tree, parameterization=name)
    said = refused(tree)
    assert said.startswith(f"models/ddpm: predicts {name} (process.parameterization)")
    assert said.endswith("distillation needs a model trained to predict v or x_0")


@pytest.mark.parametrize("changes", [{"parameterization": "x_0"}, {"learned_variance": True}])
@pytest.mark.parametrize("method", ["consistency", "progressive"])
def test_all_others_are_distilled(tree: Path, method: str, changes: dict[str, Any]) -> None:
    """With guidance too, for classes; their student keeps the parameterization and a variance, if there is one."""
    teacher = give_teacher(tree, classes=True, **changes)
    fields = {"consistency": {"points": 4, "solver_steps": 2}, "progressive": {"teacher_steps": 4, "student_steps": 1}}
    guide(tree, 2.0)
    trees.change(tree, {"distill": {"steps": 2, "method": {"kind": method} | fields[method]}})
    done = trees.run(tree, "distill")
    assert done.returncode == 0, done.stderr
    assert Model.load(tree / "models/student").config == teacher.config


def test_guidance_without_classes(tree: Path) -> None:
    guide(tree, 1.5)
    assert refused(tree) == "distill.guidance: models/ddpm is not conditioned on classes; set it to 1.0"


def test_more_steps_than_timesteps(tree: Path) -> None:
    """Those of the teacher, which params.yaml no longer has."""
    trees.change(tree, {"process": {"num_timesteps": 10}, "sample": {"steps": 4}})
    done = trees.run(tree, "pairs")
    assert done.returncode == 0, done.stderr
    give_teacher(tree)
    trees.change(tree, {"process": {"num_timesteps": 100}, "distill": {"sampling_steps": 16}})
    assert refused(tree) == "distill.sampling_steps: 16 is more than the timesteps of models/ddpm (10)"


def test_pairs_of_another_schedule(tree: Path) -> None:
    give_teacher(tree, schedule=parameters.load(tree / "params.yaml").process.schedule, num_timesteps=99)
    assert "do not match the model's noise schedule or image shape" in refused(tree)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"augment": 0.1}, "augment must be 0: the teacher has learned images without augmentation"),
        ({"augment": "auto"}, "augment must be 0"),
        (
            {"method": {"kind": "consistency", "points": 4, "solver_steps": 5}},
            r"solver_steps \(5\) exceeds points \(4\)",
        ),
        ({"method": {"kind": "progressive", "teacher_steps": 12, "student_steps": 2}}, r"teacher_steps \(12\) must be"),
        ({"method": {"kind": "progressive", "teacher_steps": 2, "student_steps": 2}}, r"must be 2, 4, 8, \.\.\. times"),
        ({"method": {"kind": "progressive", "teacher_steps": 2, "student_steps": 4}}, r"must be 2, 4, 8, \.\.\. times"),
        ({"method": "progressive", "keep_best": True}, "progressive needs keep_best: false and patience: 0"),
        ({"method": "progressive", "patience": 3}, "progressive needs keep_best: false and patience: 0"),
        ({"method": "adversarial"}, "method"),
        ({"guidance": -1.0}, "guidance"),
        ({"sampling_steps": 0}, "sampling_steps"),
        ({"batch_size": 7, "accumulate": 2}, r"batch_size \(7\) must be a multiple of processes x accumulate \(2\)"),
        ({"steps": 0}, "steps and epochs are both 0"),
    ],
    ids=str,
)
def test_options_that_do_not_fit(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        DistillOptions.model_validate(changes)


def test_timesteps_that_never_draw_the_last_one() -> None:
    changes = {"process": {"zero_terminal_snr": True}, "distill": {"timesteps": "log-snr-normal"}}
    document = yaml_files.overlay(yaml_files.read_yaml(dvc_yaml.ROOT / "params.yaml"), changes)
    with pytest.raises(UserError, match=r"distill\.timesteps: log-snr-normal never draws the last timestep"):
        parameters.validate(document, "here")


def test_options_that_do() -> None:
    for changes in (
        {"method": {"kind": "consistency", "points": 4, "solver_steps": 4}, "keep_best": True, "patience": 2},
        {"method": {"kind": "progressive", "teacher_steps": 1024, "student_steps": 1}, "augment": 0},
    ):
        DistillOptions.model_validate(changes)


@pytest.mark.parametrize("file", ["model.safetensors", "config.json", "SHA256SUMS"])
@pytest.mark.parametrize("damage", ["missing", "damaged"])
def test_a_teacher_that_cannot_be_read(tree: Path, file: str, damage: str) -> None:
    path = tree / "models/ddpm" / file
    if damage == "missing":
        path.unlink()
    else:
        path.write_bytes(path.read_bytes()[:-9])
    assert refused(tree).startswith("models/ddpm")


def test_no_teacher(tree: Path) -> None:
    shutil.rmtree(tree / "models")
    assert refused(tree).startswith("models/ddpm")


def fingerprint(tree: Path, stage: str = "distill") -> str:
    params, paths = parameters.load(tree / "params.yaml"), Paths(tree, student=stage == "distill")
    return fingerprints.training_fingerprint(fingerprints.training_facts(stage, params, paths, CPU, World()))


@pytest.mark.parametrize(
    "changes",
    [
        {"seed": 1},
        {"distill": {"steps": 13}},
        {"distill": {"method": {"points": 4}}},
        {"network": {"classes": True}, "distill": {"guidance": 1.5}},
        {"distill": {"sampling_steps": 4}},
        {"sample": {"threshold": "dynamic"}},
    ],
    ids=str,
)
def test_parameters_of_the_distillation_are_in_its_fingerprint(tree: Path, changes: dict[str, Any]) -> None:
    before, of_train = fingerprint(tree), fingerprint(tree, "train")
    trees.change(tree, changes)
    assert fingerprint(tree) != before
    assert (fingerprint(tree, "train") != of_train) == bool({"seed", "network"} & changes.keys())


@pytest.mark.parametrize(
    "changes",
    [
        {"train": {"steps": 41}},
        {"network": {"base_channels": 16}},
        {"sample": {"steps": 5, "count": 9}},
        {"distill": {"processes": 2}},
        {"evaluate": {"resamples": 200}},
    ],
    ids=str,
)
def test_other_parameters_are_not(tree: Path, changes: dict[str, Any]) -> None:
    """The teacher has a network and process of its own, whatever params.yaml says; world.size counts processes."""
    before = fingerprint(tree)
    trees.change(tree, changes)
    assert fingerprint(tree) == before


def test_the_teacher_is_in_the_fingerprint(tree: Path) -> None:
    """Its weights, and its description."""
    found, config = {fingerprint(tree)}, tree / "models/ddpm/config.json"
    give_teacher(tree, seed=1)
    found.add(fingerprint(tree))
    config.write_text(config.read_text().replace('"v"', '"x_0"'))
    write_sums(tree / "models/ddpm")
    found.add(fingerprint(tree))
    assert len(found) == 3
    assert fingerprint(tree, "train") not in found


def test_each_stage_resumes_its_own_checkpoints_only(tree: Path) -> None:
    trees.stopped(tree, 3)
    assert "resuming" not in trees.stopped(tree, 5, stage="distill").stderr
    assert ", resuming from step 3\n" in trees.stopped(tree, 0).stderr
    assert ", resuming from step 5\n" in trees.stopped(tree, 0, stage="distill").stderr
    give_teacher(tree, seed=1)
    assert "resuming" not in trees.stopped(tree, 0, stage="distill").stderr


@pytest.mark.parametrize("name", sorted(TIMESTEPS))
def test_the_held_out_loss_is_over_the_timesteps_of_the_training(tree: Path, name: str) -> None:
    """Weighted as there, and so its expectation: here of t / T, for losses that have been observed to be t."""
    model, pairs = give_teacher(tree), Pairs(Paths(tree).pairs, "val")
    schedule, T = model.process.schedule, 100
    timesteps, seen = TIMESTEPS[name](schedule), list[Tensor]()
    for _ in range(200):
        timesteps.observe(torch.arange(T), torch.arange(T, dtype=torch.float64))

    def loss(net: Any, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor) -> Tensor:
        assert net is model.net
        assert x_0.shape == eps.shape == (len(t), 1, 8, 8)
        assert y.shape == t.shape
        seen.append(t)
        return t / T

    method: Any = loss
    found = heldout_loss(method, timesteps, model, pairs, CPU, lambda: None)
    t = torch.cat(seen)
    every, middle = torch.arange(T), (torch.arange(T) + 0.5) / T
    drawn, weight = timesteps.draw(every.repeat_interleave(T), middle.repeat(T))
    assert found.mse == pytest.approx((weight * drawn / T).mean().item(), abs=0.02)
    assert t.double().mean().item() == pytest.approx(drawn.double().mean().item(), abs=2)
    assert t.double().std().item() == pytest.approx(drawn.double().std().item(), abs=2)
    again = heldout_loss(method, timesteps, model, pairs, CPU, lambda: None)
    assert again == found


def test_the_student_begins_as_the_teacher_without_dropout(tree: Path) -> None:
    trees.change(tree, {"sample": {"threshold": "dynamic"}, "distill": {"sampling_steps": 4}})
    give_teacher(tree, classes=True)
    guide(tree, 2.5)
    made = distill.recipe(parameters.load(tree / "params.yaml"), Paths(tree, student=True), CPU)
    net, teacher = made.net(), Model.load(tree / "models/ddpm")
    assert not net.training
    assert all(parameter.requires_grad for parameter in net.parameters())
    weights = net.state_dict()
    assert all(value.equal(weights[name]) for name, value in teacher.net.state_dict().items())
    assert isinstance(made.loss, ConsistencyLoss)
    assert (made.loss.teacher.guidance, made.loss.teacher.threshold) == (2.5, "dynamic")
    drawing = made.drawing
    assert (drawing.sampler.kind, drawing.spacing, drawing.steps) == ("consistency", "angle", 4)
    assert (drawing.guidance, drawing.threshold, drawing.count) == (1.0, "dynamic", 36)
