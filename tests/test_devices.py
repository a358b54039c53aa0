"""Devices other than the CPU: their selection, and that tensors of two devices are never mixed."""

import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusion.errors import UserError
from diffusion.evaluation import heldout, likelihood
from diffusion.evaluation.likelihood import Draws
from diffusion.model import Config, Model, new_network
from diffusion.nn import build as networks
from diffusion.pairs.pairs import Batch, Pairs
from diffusion.process import build as processes
from diffusion.process import schedule
from diffusion.samples import noise_for
from diffusion.sampling.build import SampleOptions, sampling_timesteps
from diffusion.sampling.editing import image_to_image, inpaint, mix, repaint_path
from diffusion.sampling.sampler import SAMPLERS, sample
from diffusion.training import loop
from diffusion.training.state import new_state
from flows.params import Params
from flows.paths import Paths
from tests import pretended

SHAPE, CLASSES, CPU = (1, 8, 8), tuple("0123456789"), torch.device("cpu")
Where = torch.device


@pytest.fixture(scope="module")
def pool() -> Iterator[ProcessPoolExecutor]:
    """A process with the simulated device, which PyTorch cannot unregister."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=spawn, initializer=pretended.register) as made:
        yield made


def assert_same_on_both(float64: bool, check: Callable[..., list[Tensor]], *arguments: Any) -> None:
    """`check` returns the same numbers on the CPU and on the simulated device, with and without float64."""
    schedule.has_float64 = lambda device: float64 or device.type != pretended.NAME  # in a separate process
    found = []
    for where in (CPU, torch.device(pretended.NAME, 0)):
        with pretended.Pretended(float64) if where.type == pretended.NAME else nullcontext():
            found.append([tensor.cpu() for tensor in check(where, *arguments)])
    assert found[0]
    for one, other in zip(*found, strict=True):
        assert other.device.type == "cpu"
        torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-6)


def model_on(where: Where, params: Params) -> Model:
    """A network whose output is not zero, and its process."""
    torch.manual_seed(0)
    net = new_network(SHAPE, len(CLASSES), params.network, params.process)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape))
    if where.type == pretended.NAME:
        pretended.moved(net)
    config = Config(shape=SHAPE, classes=CLASSES, network=params.network, process=params.process, x_0_mse=None)
    return Model(net, processes.process(params.process), config)


def training(where: Where, params: Params) -> list[Tensor]:
    """The state after three steps, and its point of the loss curve."""

    def fetch(step: int) -> Batch:
        rng = np.random.default_rng(step)
        x_0, eps = (rng.standard_normal((8, *SHAPE), dtype=np.float32) for _ in range(2))
        t, y, u = rng.integers(0, 100, 8), rng.integers(-1, 3, 8), rng.random(8)
        return Batch(x_0.clip(-1, 1), t, eps, y, u, rng.random((8, 8 if augmented else 0), np.float32))

    model, augmented = model_on(where, params), params.train.augmentation(1000) > 0
    state = new_state(model.net.train(), params.train, model.process.schedule, augmented=augmented)  # type: ignore[arg-type]
    trainer = loop.Trainer(params.train, 0, model.process.loss, fetch, state.net)
    for _ in range(3):
        loop.step(state, trainer)
    point = trainer.add_point(state)
    assert point
    assert not state.skipped
    images = torch.zeros(2, *SHAPE).to(where)
    # Timesteps may also be on the device of the images.
    losses = model.loss(images, torch.tensor([3, 90]).to(where), images + 0.5)
    assert losses.device == where
    return [*state.tensors().values(), torch.tensor([*point.values()])]


@torch.inference_mode()
def sampling(where: Where, params: Params) -> list[Tensor]:
    """Images of every sampler, by image-to-image and by inpainting."""
    model, found = model_on(where, params), []
    x_0 = torch.linspace(-1, 1, 64).view(1, *SHAPE).expand(2, *SHAPE).to(where)
    for kind in SAMPLERS:
        options = SampleOptions.model_validate(params.sample.model_dump() | {"sampler": kind, "steps": 4})
        sampler, z = model.sampler(options, torch.tensor([0, 2]).to(where)), noise_for(0, 2, SHAPE, where)
        visited = sampling_timesteps(options, model.process.schedule)
        found.append(sample(sampler, z, visited))
        mixed = mix(x_0[:1], -x_0[:1], torch.tensor([0.25, 0.5], dtype=torch.float64))
        found.append(image_to_image(sampler, model.process.schedule, z, visited[1:], mixed))
    keep = (x_0[:1] > 0).float()
    *_, last = inpaint(sampler, model.process.schedule, z, repaint_path(visited, 2, 2), x_0, keep)
    return [*found, last]


def evaluation(where: Where, params: Params, tree: Path) -> list[Tensor]:
    """Held-out errors and likelihood."""
    model, pairs = model_on(where, params), Pairs(Paths(tree).pairs, "val")
    mse = heldout.quick_mse(model, pairs, where, lambda: None, blocks=1).mse
    errors = heldout.x_0_mse(model, pairs, where, 0, lambda: None)
    draws = Draws(images=2, edges=np.array([0, 1, 50, 100]), seed=0)
    found = [torch.tensor(mse), torch.tensor(errors)]
    for values in (None, np.unique(pairs.x_0(0))):
        terms = likelihood.measure(model, model.variance(params.sample.variance), pairs, draws, where, values=values)
        found += [torch.from_numpy(terms.prior), torch.from_numpy(terms.steps)]
    return found


def small(params: Params, **sections: dict[str, Any]) -> Params:
    """With a small class-conditional network."""
    plain = params.model_dump()
    plain["network"] |= {"base_channels": 8, "channel_multipliers": (1,), "attention_levels": (0,), "classes": True}
    plain["process"] |= {"num_timesteps": 100}
    plain["sample"] |= {"variance": "fixed-small", "steps": 4, "guidance": 2.0}
    plain["export"] |= {"steps": 4}
    for name, values in sections.items():
        plain[name] |= values
    return Params.model_validate(plain)


LEARNED = {"process": {"learned_variance": True}, "sample": {"variance": "learned"}}


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("sections", [{}, LEARNED | {"train": {"optimizer": "adamw", "accumulate": 2, "augment": 0.2}}])
def test_training_mixes_no_devices(
    pool: ProcessPoolExecutor, params: Params, sections: dict[str, Any], float64: bool
) -> None:
    pool.submit(assert_same_on_both, float64, training, small(params, **sections)).result()


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("sections", [{}, LEARNED])
def test_sampling_mixes_no_devices(
    pool: ProcessPoolExecutor, params: Params, sections: dict[str, Any], float64: bool
) -> None:
    pool.submit(assert_same_on_both, float64, sampling, small(params, **sections)).result()


@pytest.mark.parametrize("float64", [True, False])
@pytest.mark.parametrize("sections", [{}, LEARNED])
def test_evaluation_mixes_no_devices(
    pool: ProcessPoolExecutor, params: Params, pairs_tree: Path, sections: dict[str, Any], float64: bool
) -> None:
    pool.submit(assert_same_on_both, float64, evaluation, small(params, **sections), pairs_tree).result()


@pytest.mark.parametrize(
    ("there", "chosen"),
    [
        ({}, "cpu"),
        ({"cuda": 2}, "cuda:1"),
        ({"mps": 1}, "mps"),
        ({"xpu": 2}, "xpu:1"),
        ({"cuda": 2, "mps": 1, "xpu": 2}, "cuda:1"),
        ({"mps": 1, "xpu": 2}, "mps"),
    ],
)
def test_auto_is_the_first_device_that_is_there(
    monkeypatch: pytest.MonkeyPatch, there: dict[str, int], chosen: str
) -> None:
    has(monkeypatch, there)
    assert networks.device("auto", local_rank=1) == torch.device(chosen)


@pytest.mark.parametrize("name", ["cuda", "cuda:0", "mps", "xpu", "xpu:3"])
def test_a_device_that_is_not_there_is_named(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    has(monkeypatch, {})
    with pytest.raises(UserError, match=rf"device: {name}(:0)? is not available; set device to auto or cpu"):
        networks.device(name)


def test_a_device_is_chosen_by_its_number(monkeypatch: pytest.MonkeyPatch) -> None:
    has(monkeypatch, {"cuda": 2, "mps": 1, "xpu": 2})
    for name in ("cuda:1", "xpu:1", "mps", "cpu"):
        assert networks.device(name) == torch.device(name)
    with pytest.raises(UserError, match="cuda:2 is not available"):
        networks.device("cuda:2")


def has(monkeypatch: pytest.MonkeyPatch, there: dict[str, int]) -> None:
    """Let PyTorch only see these devices."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: there.get("cuda", 0))
    monkeypatch.setattr(torch.xpu, "device_count", lambda: there.get("xpu", 0))
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: bool(there.get("mps")))
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda _: None)


@pytest.mark.parametrize(
    ("name", "float64"), [("cpu", True), ("cuda:1", True), ("mps", False), ("xpu:0", True), ("xpu:1", False)]
)
def test_coefficients_are_computed_where_float64_is(monkeypatch: pytest.MonkeyPatch, name: str, float64: bool) -> None:
    device = torch.device(name)
    properties = {0: type("Properties", (), {"has_fp64": True}), 1: type("Properties", (), {"has_fp64": False})}
    monkeypatch.setattr(torch.xpu, "get_device_properties", lambda device: properties[device.index])
    assert schedule.float64_device(device) == (device if float64 else CPU)
