"""Pictures."""

import io

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor, nn

from diffusion.evaluation import samples
from diffusion.params import Params
from diffusion.process import build


def test_uint8_is_the_inverse_of_the_scaling() -> None:
    values = np.arange(256, dtype=np.uint8)
    assert (samples.to_uint8(values.astype(np.float32) / 127.5 - 1) == values).all()
    assert samples.to_uint8(np.array([-3.0, 3.0], np.float32)).tolist() == [0, 255]


@pytest.mark.parametrize("sampler", ["ddpm", "ddim"])
def test_an_image_is_the_same_among_any_number(params: Params, sampler: str) -> None:
    class Halved(nn.Module):
        def forward(self, x_t: Tensor, t: Tensor) -> Tensor:  # noqa: ARG002
            return x_t / 2

    process = build.process(params.process)
    options = params.sample.model_copy(update={"sampler": sampler, "steps": 5, "eta": 0.7})
    few, many = (
        samples.draw_samples(
            Halved(), process, (1, 8, 8), options.model_copy(update={"count": count}), 3, torch.device("cpu")
        )
        for count in (2, 9)
    )
    assert (many[:2] == few).all()
    assert not (many[2] == many[3]).all()


@pytest.mark.parametrize("channels", [1, 3])
def test_the_grid_holds_every_image(channels: int) -> None:
    images = np.random.default_rng(0).integers(256, size=(5, channels, 8, 6), dtype=np.uint8)
    picture = Image.open(io.BytesIO(samples.grid_png(images, side=1)))
    assert picture.mode == ("L" if channels == 1 else "RGB")
    pixels = np.asarray(picture).reshape(picture.height, picture.width, channels)
    for index in range(5):
        top, left = index // 3 * 9 + 1, index % 3 * 7 + 1
        assert (pixels[top : top + 8, left : left + 6] == images[index].transpose(1, 2, 0)).all()


def test_small_images_are_enlarged() -> None:
    images = np.zeros((64, 1, 8, 8), np.uint8)
    assert Image.open(io.BytesIO(samples.grid_png(images))).size == (521, 521)
