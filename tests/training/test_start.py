"""Trainings that start from the weights of a model in data/models."""

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from diffusion.model import Config, Model
from diffusion.nn.unet import UNetOptions
from diffusion.nn.uvit import UViTOptions
from diffusion.pairs.pairs import Batches, Pairs
from diffusion.process.build import ProcessOptions
from diffusion.storage.files import parse_csv, sha256
from diffusion.training.distributed import World
from flows import fingerprint, made_with, start
from flows import params as parameters
from flows.origin import Origin
from flows.paths import Paths
from flows.stages import train
from tests.training import trees

CPU = torch.device("cpu")
STILL: dict[str, Any] = {
    "steps": 1,
    "log_every": 1,
    "preview_every": 1,
    "learning_rate": 1e-30,
    "optimizer": {"kind": "muon", "learning_rate": 1e-30},
    "weight_decay": 0.0,
    "timesteps": "stored",
    "augment": 0,
}
"""One step that changes no weight."""


@pytest.fixture(scope="module")
def source(pairs_tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tree with a finished training."""
    tree = trees.copy(pairs_tree, tmp_path_factory.mktemp("source") / "tree")
    done = trees.run(tree)
    assert done.returncode == 0, done.stderr
    assert ", starting from random weights\n" in done.stderr
    return tree


def bring(model: Path, tree: Path, name: str = "first") -> Path:
    """Put a model where a training can start from it."""
    target = tree / "data/models" / name
    shutil.copytree(model, target)
    Origin(run="calm-owl", weights_sha256=sha256(target / "model.safetensors")).write(target)
    return target


@pytest.fixture
def tree(source: Path, tmp_path: Path) -> Path:
    """A tree in which a training starts from the model of `source`."""
    tree = tmp_path / "tree"
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns("models", "reports", ".ddpm"))
    bring(source / "models/ddpm", tree)
    trees.change(tree, {"train": STILL | {"start_from": "first"}})
    return tree


def heldout(tree: Path) -> float:
    return parse_csv((tree / "reports/train_curves/heldout.csv").read_bytes())[-1]["mse"]


def test_a_training_begins_with_exactly_these_weights(source: Path, tree: Path) -> None:
    params = parameters.load(tree / "params.yaml")
    given = load_file(source / "models/ddpm/model.safetensors")
    for seed in (0, 1):  # several processes build it, each with random numbers of its own
        torch.manual_seed(seed)
        net = train.recipe(params.model_copy(update={"seed": seed}), Paths(tree), CPU).net()
        own = net.state_dict()
        assert own.keys() == given.keys()
        assert all(torch.equal(own[name], given[name]) for name in given)
        assert net.training
        assert all(parameter.requires_grad for parameter in net.parameters())


def test_the_first_loss_and_measurement_are_those_of_the_source(source: Path, tree: Path) -> None:
    done = trees.run(tree)
    assert done.returncode == 0, done.stderr
    assert ", starting from the weights of run calm-owl (data/models/first)\n" in done.stderr
    model = Model.load(source / "models/ddpm")
    batch = Batches(Pairs(tree / "data/pairs", "train"), 0, 32)(0)
    x_0, t, eps = map(torch.from_numpy, (batch.x_0, batch.t, batch.eps))
    x_t = model.process.schedule.alpha_bar[t].sqrt().float()[:, None, None, None] * x_0
    x_t += (1 - model.process.schedule.alpha_bar[t]).sqrt().float()[:, None, None, None] * eps
    with torch.no_grad():
        eps_hat = model.process.parameterization.to_eps(model.net(x_t, t, None), x_t, t)
    loss = (eps_hat - eps).square().mean().item()  # Ho et al. 2020, algorithm 1
    (row,) = parse_csv((tree / "reports/train_curves/loss.csv").read_bytes())
    assert row["loss"] == pytest.approx(loss, rel=1e-5)
    assert heldout(tree) == pytest.approx(heldout(source), rel=1e-6)
    before, after = (load_file(root / "models/ddpm/model.safetensors") for root in (source, tree))
    assert all(torch.allclose(before[name], after[name], rtol=0, atol=1e-29) for name in before)


def test_a_resumed_training_says_so_and_gives_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    trees.change(tree, {"train": {"steps": 4, "learning_rate": 0.002, "log_every": 2}})
    whole = tmp_path / "whole"
    shutil.copytree(tree, whole)
    assert trees.run(whole).returncode == 0
    assert ", starting from the weights of run calm-owl (data/models/first)\n" in trees.stopped(tree, 2).stderr
    done = trees.run(tree)
    assert done.returncode == 0, done.stderr
    assert ", resuming from step 2\n" in done.stderr
    assert trees.digests(tree, "models", "reports") == trees.digests(whole, "models", "reports")


def test_weights_in_a_file_train_like_the_same_ones_in_memory(source: Path, tmp_path: Path) -> None:
    """With several processes: tests/training/test_processes.py."""
    tree = tmp_path / "tree"
    shutil.copytree(source, tree, ignore=shutil.ignore_patterns("models", "reports", ".ddpm"))
    trees.save_initial_weights(tree, "initial")
    trees.change(tree, {"train": {"start_from": "initial"}})
    done = trees.run(tree)
    assert ", starting from the weights of a model of unknown origin (data/models/initial)\n" in done.stderr
    for part in ("models", "reports/train_curves", "reports/train.json"):
        assert trees.digests(tree, part) == trees.digests(source, part)


SHAPE, NETWORK, PROCESS = (1, 8, 8), UNetOptions(base_channels=8), ProcessOptions(num_timesteps=100)
OURS = Config(shape=SHAPE, classes=("0", "1"), network=NETWORK, process=PROCESS, x_0_mse=None)


def changed(**changes: Any) -> Config:
    """`OURS` with other fields of the model, its network (`n_`) or its process (`p_`)."""
    for part in ("network", "process"):
        own = {name[2:]: value for name, value in changes.items() if name.startswith(f"{part[0]}_")}
        options = getattr(OURS, part).model_dump() | own
        changes = {name: value for name, value in changes.items() if not name.startswith(f"{part[0]}_")}
        changes[part] = type(getattr(OURS, part))(**options)
    return OURS.model_copy(update=changes)


@pytest.mark.parametrize(
    ("theirs", "differences"),
    [
        (OURS, []),
        (changed(n_dropout=0.1, p_weighting={"kind": "min-snr", "gamma": 4.0}, p_loss="l1"), []),
        (OURS.model_copy(update={"classes": ("a",), "x_0_mse": (0.1,) * 100}), []),  # it is not conditioned on them
        (changed(shape=(3, 8, 8)), ["pairs.channels 3, not 1"]),
        (changed(shape=(1, 16, 32)), ["pairs.height 16, not 8", "pairs.width 32, not 8"]),
        (changed(n_base_channels=16), ["network.base_channels 16, not 8"]),
        (changed(n_fourier_features=(3,)), ["network.fourier_features [3], not []"]),
        (changed(n_classes=True), ["network.classes true, not false"]),
        (changed(p_schedule="linear"), ['process.schedule "linear", not "cosine"']),
        (changed(p_num_timesteps=50), ["process.num_timesteps 50, not 100"]),
        (changed(p_zero_terminal_snr=True, p_weighting="snr-plus-one"), ["process.zero_terminal_snr true, not false"]),
        (changed(p_parameterization="eps"), ['process.parameterization "eps", not "v"']),
        (changed(p_learned_variance=True), ["process.learned_variance true, not false"]),
        (OURS.model_copy(update={"network": UViTOptions()}), ['network.kind "uvit", not "unet"']),
    ],
)
def test_what_must_be_the_same(theirs: Config, differences: list[str]) -> None:
    assert start.differences(theirs, OURS) == differences


def test_the_names_of_the_classes_must_be_the_same() -> None:
    ours, theirs = changed(n_classes=True), changed(n_classes=True, classes=("a", "b"))
    assert start.differences(ours, ours) == []
    assert start.differences(theirs, ours) == ["classes ['a', 'b'], not ['0', '1']"]


def test_another_network_is_refused_in_one_line(tree: Path) -> None:
    trees.change(tree, {"network": {"base_channels": 16}})
    done = trees.run(tree)
    assert done.returncode == 1
    assert done.stderr == (
        "ddpm train: error: train.start_from: the model in data/models/first has network.base_channels 8, not 16; set "
        "the same parameters, or start from another model\n"
    )
    assert not (tree / "models").exists()


def test_damaged_files_are_refused(tree: Path) -> None:
    model = tree / "data/models/first"
    for name, damage in (("model.safetensors", "does not match its digest"), ("config.json", "does not match its dig")):
        content = (model / name).read_bytes()
        (model / name).write_bytes(content[:-9] + bytes([content[-9] ^ 1]) + content[-8:])
        done = trees.run(tree)
        assert done.returncode == 1
        assert f"error: {model.relative_to(tree)}/{name}: damaged" in done.stderr
        assert damage in done.stderr
        (model / name).write_bytes(content)
    for text in ("{", "[]", '{"weights_sha256": 5}', '{"weights_sha256": "", "other": ""}'):
        (model / "origin.json").write_text(text)
        assert "origin.json: damaged; import the model again" in trees.run(tree).stderr
    Origin(weights_sha256="0" * 64).write(model)
    assert "origin.json: describes other weights than model.safetensors" in trees.run(tree).stderr
    (model / "model.safetensors").unlink()
    done = trees.run(tree)
    assert done.stderr.startswith("ddpm train: error: train.start_from: data/models/first holds no model; `ddpm import")


def facts(tree: Path) -> dict[str, Any]:
    params = parameters.load(tree / "params.yaml")
    return fingerprint.training_facts("train", params, Paths(tree), CPU, World())


def test_the_weights_are_part_of_the_fingerprint_and_their_name_is_not(tree: Path) -> None:
    first = facts(tree)
    trees.change(tree, {"train": {"start_from": ""}})
    random = facts(tree)
    assert first == random | {"start": sha256(tree / "data/models/first/SHA256SUMS")}
    assert "start_from" not in random["params"]["train"]  # the fingerprint is the same as without this parameter
    bring(tree / "data/models/first", tree, "again")
    trees.change(tree, {"train": {"start_from": "again"}})
    assert facts(tree) == first
    Model.new(SHAPE, NETWORK).save(tree / "data/models/other")
    trees.change(tree, {"train": {"start_from": "other"}})
    other = facts(tree)
    assert other["start"] not in (first["start"], None)
    assert len({fingerprint.training_fingerprint(each) for each in (first, random, other)}) == 3


@pytest.mark.parametrize("name", ["data/models/first", "..", ".hidden", "a b", "-x", "é"])
def test_a_name_is_no_path(name: str) -> None:
    with pytest.raises(ValueError, match="must be the name of a folder in data/models, or ''"):
        parameters.Train(start_from=name)
    assert parameters.Train().start_from == ""
    assert parameters.Train(start_from="calm-owl_2.1").start_from == "calm-owl_2.1"


def test_the_record_of_a_training_has_the_digest_of_these_weights(source: Path, tree: Path) -> None:
    params, paths = parameters.load(tree / "params.yaml"), Paths(tree)
    assert trees.run(tree).returncode == 0
    assert made_with.difference(paths, "train", params) is None
    shutil.rmtree(tree / "data/models/first")
    Model.new(SHAPE, NETWORK).save(tree / "data/models/first")
    assert made_with.difference(paths, "train", params) == (
        "data/models/first/model.safetensors is not the file that train read"
    )
    assert "start_from" in (source / "reports/made_with/train.json").read_text()


def test_where_a_model_comes_from() -> None:
    of: dict[str, str] = {"weights_sha256": "0"}
    assert str(Origin(**of)) == "a model of unknown origin"
    assert str(Origin(folder="old/model", **of)) == "the folder old/model"
    assert str(Origin(folder="old/model", run="calm-owl", **of)) == "run calm-owl"
    assert str(Origin(version="ddpm version 3", **of)) == "ddpm version 3"
    assert str(Origin(version="ddpm version 3", run="calm-owl", **of)) == "ddpm version 3, trained in run calm-owl"
