"""Sampling and image grids."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion import samples
from diffusion.evaluation import filmstrip, plots
from diffusion.model import Config, Model
from diffusion.pairs.pixels import to_uint8, to_x_0
from diffusion.process import build
from diffusion.sampling import build as sampling
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import SAMPLERS
from flows.params import Params

CPU = torch.device("cpu")


class Halved(nn.Module):
    """Half of x_t, brighter by class."""

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:  # noqa: ARG002
        return x_t / 2 - (0 if y is None else y.view(-1, 1, 1, 1) / 10)


def model(params: Params, channels: int = 1, classes: tuple[str, ...] = ()) -> Model:
    process = params.process.model_copy(update={"parameterization": "eps", "zero_terminal_snr": False})
    network = params.network.model_copy(update={"classes": bool(classes)})
    config = Config(shape=(channels, 8, 6), classes=classes, network=network, process=process, x_0_mse=None)
    return Model(Halved(), build.process(process), config)


def options(params: Params, **changes: object) -> SampleOptions:
    plain = params.sample.model_dump() | {"steps": 5, "variance": "fixed-small"} | changes
    return SampleOptions.model_validate(plain)


def test_uint8_is_the_inverse_of_the_scaling() -> None:
    values = np.arange(256, dtype=np.uint8)
    assert (to_uint8(to_x_0(values, np.float32)) == values).all()
    assert to_uint8(np.array([-3.0, 3.0], np.float32)).tolist() == [0, 255]


@pytest.mark.parametrize("sampler", list(SAMPLERS))
def test_an_image_is_the_same_among_any_number(params: Params, sampler: str) -> None:
    few, many, rest = (
        samples.draw_samples(model(params), options(params, sampler=sampler, count=count), 3, CPU, first=first)
        for count, first in ((2, 0), (9, 0), (7, 2))
    )
    assert (many[:2] == few).all()
    assert (many[2:] == rest).all()
    assert not (many[2] == many[3]).all()


def test_classes_come_in_turn(params: Params) -> None:
    of_classes = model(params, classes=("a", "b", "c"))
    assert samples.classes_in_turn(model(params), 4, CPU) is None
    turns = samples.classes_in_turn(of_classes, 4, CPU, first=2)
    assert turns is not None
    assert turns.tolist() == [2, 0, 1, 2]
    guided, plain = (
        samples.draw_samples(made, options(params, count=3, guidance=1.0), 0, CPU).astype(int)
        for made in (of_classes, model(params))
    )
    brighter = (guided - plain).mean(axis=(1, 2, 3))
    assert brighter[0] == 0
    assert 0 < brighter[1] < brighter[2]


def test_it_can_be_stopped_at_each_step(params: Params) -> None:
    calls: list[None] = []
    samples.draw_samples(model(params), options(params, count=1), 0, CPU, lambda: calls.append(None))
    assert len(calls) == 5


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_holds_every_image(channels: int) -> None:
    images = np.random.default_rng(0).integers(256, size=(5, channels, 8, 6), dtype=np.uint8)
    picture = Image.open(io.BytesIO(samples.grid_png(images, side=1)))
    assert picture.mode == ("L" if channels == 1 else "RGB")
    pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
    for index in range(5):  # each pixel is a square of 8 x 8
        top, left = index // 3 * 65 + 1, index % 3 * 49 + 1
        cell = pixels[top : top + 64, left : left + 48].reshape(8, 8, 6, 8, channels)
        assert (cell == images[index].transpose(1, 2, 0)[:, None, :, None]).all()


@pytest.mark.parametrize(
    ("count", "side", "cell"), [(64, 8, 64), (4, 8, 256), (64, 28, 84), (1, 28, 504), (100, 63, 126), (9, 64, 64)]
)
def test_small_images_are_enlarged_by_whole_factors(count: int, side: int, cell: int) -> None:
    images = np.zeros((count, 3, side, side), np.uint8)
    size = count**0.5 * (cell + 1) + 1
    assert Image.open(io.BytesIO(samples.grid_png(images))).size == (size, size)


@pytest.mark.parametrize(("steps", "shown"), [(5, 6), (40, 9)])
def test_moments_lead_from_noise_to_the_samples(params: Params, steps: int, shown: int) -> None:
    made, chosen = model(params, classes=("a", "b", "c")), options(params, steps=steps, count=6)
    found = filmstrip.frames(made, chosen, 3, CPU)
    timesteps = sampling.sampling_timesteps(chosen, made.process.schedule)
    assert len(found) == shown
    assert [frame.t for frame in found][:: shown - 1] == [timesteps[0], -1]
    assert {frame.t for frame in found} <= {*timesteps, -1}
    places = [[*timesteps, -1].index(frame.t) for frame in found]
    assert max(np.diff(places)) - min(np.diff(places)) <= 1
    assert (found[0].x_t == to_uint8(samples.noise_for(3, 4, made.shape, CPU)(0).numpy())).all()
    assert (found[-1].x_t == samples.draw_samples(made, chosen, 3, CPU)[:4]).all()
    # What the network sees in the noise, and not in what a step made of it.
    noise = samples.noise_for(3, 4, made.shape, CPU)(0)
    t, y = torch.full((4,), timesteps[0]), samples.classes_in_turn(made, 4, CPU)
    seen = made.process.denoiser(made.net_for(y))(noise, t).x_0_hat
    assert (found[0].x_0_hat == to_uint8(seen.numpy())).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_filmstrip_has_a_place_for_each_picture(params: Params, channels: int) -> None:
    found = filmstrip.frames(model(params, channels), options(params), 0, CPU)
    png = plots.filmstrip(found)
    assert png == plots.filmstrip(found)
    picture = Image.open(io.BytesIO(png))
    assert picture.width > 60 * len(found)
    assert picture.height > picture.width  # eight rows of six upright pictures
