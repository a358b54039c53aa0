"""A model's directory: saving, loading, and one-line errors."""

import json
import random
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save

from diffusion.errors import UserError
from diffusion.model import FILES, Config, Model, load_model, new_network, save_model
from diffusion.process.denoiser import Guided
from diffusion.storage.files import write_sums
from flows.params import Params

CPU = torch.device("cpu")
SHAPE = (1, 8, 8)


@pytest.fixture
def saved(params: Params, tmp_path: Path) -> tuple[Path, Model]:
    """A small model of two classes, and its directory."""
    network = params.network.model_copy(update={"base_channels": 8, "classes": True})
    errors = tuple(0.001 * t for t in range(params.process.num_timesteps))
    config = Config(shape=SHAPE, classes=("a", "b"), network=network, process=params.process, x_0_mse=errors)
    net = new_network(SHAPE, 2, network, params.process)
    save_model(tmp_path / "ddpm", net, config)
    return tmp_path / "ddpm", Model(net, load_model(tmp_path / "ddpm", CPU).process, config)


def change(directory: Path, **changes: Any) -> None:
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps(config | changes))
    write_sums(directory)


def test_what_is_written_is_read(saved: tuple[Path, Model]) -> None:
    directory, model = saved
    found = load_model(directory, CPU)
    assert found.config == model.config
    assert found.num_classes == 2
    ours, theirs = found.net.state_dict(), model.net.state_dict()
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert found.variance("analytic") is not None


def test_a_class_is_asked_for_only_of_a_network_that_knows_some(saved: tuple[Path, Model]) -> None:
    directory, _ = saved
    y = torch.tensor([1])
    model = load_model(directory, CPU)
    assert isinstance(model.net_for(y, 2.0), Guided)
    assert model.net_for(None) is model.net
    network = model.config.network.model_copy(update={"classes": False})
    deaf = Model(model.net, model.process, model.config.model_copy(update={"network": network}))
    assert deaf.num_classes == 0
    assert deaf.net_for(y, 2.0) is deaf.net


def test_a_variance_that_the_model_does_not_have_is_refused(saved: tuple[Path, Model]) -> None:
    directory, _ = saved
    with pytest.raises(UserError, match=r"learned needs a model trained with process\.learned_variance"):
        load_model(directory, CPU).variance("learned")
    change(directory, x_0_mse=None)
    with pytest.raises(UserError, match="analytic needs an estimate that this model does not have"):
        load_model(directory, CPU).variance("analytic")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"x_0_mse": [0.5]}, "config.json: x_0_mse has 1 value for 1000 timesteps"),
        ({"process": {}}, "config.json: process.schedule: missing"),
        ({"more": 1}, "config.json: more: no such parameter"),
        ({"shape": [1, 8]}, "config.json: shape.2: missing"),
        ({"classes": ["a", "b", "c"]}, "model.safetensors: does not match the network in config.json"),
    ],
)
def test_a_directory_that_does_not_fit_together_gets_one_line(
    saved: tuple[Path, Model], changes: dict[str, Any], message: str
) -> None:
    directory, _ = saved
    change(directory, **changes)
    with pytest.raises(UserError) as caught:
        load_model(directory, CPU)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_files_of_another_program_get_one_line(saved: tuple[Path, Model]) -> None:
    directory, _ = saved
    weights = load_file(directory / "model.safetensors")
    few = save({name: tensor for name, tensor in weights.items() if "head" not in name})
    for content in (few, b"no weights"):
        (directory / "model.safetensors").write_bytes(content)
        write_sums(directory)
        with pytest.raises(UserError, match=r"model\.safetensors: does not match the network in config.json$"):
            load_model(directory, CPU)
    (directory / "config.json").write_text("{")
    write_sums(directory)
    with pytest.raises(UserError, match=r"config\.json: not valid JSON "):
        load_model(directory, CPU)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "SHA256SUMS"])
def test_each_of_many_flipped_bits_is_found(saved: tuple[Path, Model], name: str) -> None:
    directory, _ = saved
    content, pick = (directory / name).read_bytes(), random.Random(0)
    for _ in range(15):
        changed, bit = bytearray(content), pick.randrange(8 * len(content))
        changed[bit // 8] ^= 1 << bit % 8
        (directory / name).write_bytes(changed)
        with pytest.raises(UserError, match=r"(model\.safetensors|config\.json): damaged") as caught:
            load_model(directory, CPU)
        assert "it does not match its digest in SHA256SUMS" in str(caught.value)
        assert name == "SHA256SUMS" or f"{directory / name}: " in str(caught.value)
        assert "\n" not in str(caught.value)
    (directory / name).write_bytes(content)
    load_model(directory, CPU)


def test_the_digests_are_those_of_sha256sum(saved: tuple[Path, Model]) -> None:
    directory, _ = saved
    before = (directory / "SHA256SUMS").read_bytes()
    write_sums(directory)
    assert (directory / "SHA256SUMS").read_bytes() == before
    done = subprocess.run(["sha256sum", "--check", "--strict", "SHA256SUMS"], cwd=directory, capture_output=True)
    assert (done.returncode, done.stdout) == (0, b"config.json: OK\nmodel.safetensors: OK\n")


def test_a_model_of_an_earlier_version_is_refused(saved: tuple[Path, Model]) -> None:
    directory, _ = saved
    (directory / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"has no SHA256SUMS, .* train or import again$"):
        load_model(directory, CPU)
    (directory / "config.json").unlink()
    with pytest.raises(UserError, match=r"config\.json: No such file or directory$"):
        load_model(directory, CPU)


def test_saving_deletes_nothing_but_a_model(
    saved: tuple[Path, Model], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, model = saved
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(
        UserError, match=r"mine: contains a file that is not part of a model \(notes\.txt\); choose another folder$"
    ):
        model.save(tmp_path / "mine")
    monkeypatch.chdir(tmp_path / "mine")
    for name in ("", ".", "..", "../mine"):
        with pytest.raises(UserError):
            model.save(name)
    (tmp_path / "mine" / "notes.txt").rename(tmp_path / "notes.txt")
    with pytest.raises(UserError, match="cannot be written"):
        model.save("")
    assert [entry.name for entry in tmp_path.iterdir() if entry.is_file()] == ["notes.txt"]
    model.save(tmp_path / "model")
    model.save(tmp_path / "model")
    assert sorted(entry.name for entry in (tmp_path / "model").iterdir()) == sorted(FILES)
