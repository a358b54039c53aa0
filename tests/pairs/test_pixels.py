"""Images at one size and number of channels."""

from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import UserError
from diffusion.pairs.pixels import Fit, visible
from diffusion.sources.bands import Bands

RED = (255, 0, 0)


def test_images_are_fitted() -> None:
    clear = Image.new("RGBA", (6, 4), (0, 0, 0, 0))
    assert (Fit(3, 4, 6)(clear) == 255).all()
    assert Fit(1, 4, 6)(clear).shape == (1, 4, 6)
    grey = Fit(1, 4, 4)(Image.new("RGB", (8, 8), (255, 0, 0)))
    assert (grey == 76).all()  # luma of red, ITU-R 601
    stripes = Image.new("L", (30, 10))
    stripes.paste(255, (10, 0, 20, 10))
    assert (Fit(1, 5, 5)(stripes)[..., 1:4] == 255).all()  # its middle, not all of it squeezed
    values = np.arange(72, dtype=np.uint8).reshape(4, 6, 3)
    np.testing.assert_array_equal(Fit(3, 4, 6)(Image.fromarray(values)), values.transpose(2, 0, 1))


def test_padding_adds_background_at_both_sides() -> None:
    found = Fit(3, 4, 4, "pad", "#00ff00")(Image.new("RGB", (4, 2), RED))
    expected = np.zeros((4, 4, 3))
    expected[[0, 3]], expected[[1, 2]] = (0, 255, 0), RED
    np.testing.assert_array_equal(found, expected.transpose(2, 0, 1))
    grey = Fit(1, 4, 2, "pad", "#00ff00")(Image.new("L", (2, 2), 9))
    assert grey[0, :, 0].tolist() == [150, 9, 9, 150]  # luma of green, ITU-R 601


def test_stretching_distorts() -> None:
    halves = Image.new("L", (8, 2))
    halves.paste(255, (4, 0, 8, 2))
    assert Fit(1, 2, 2, "stretch", filter="box")(halves).tolist() == [[[0, 255], [0, 255]]]
    assert Fit(1, 2, 2, "crop", filter="box")(halves).tolist() == [[[0, 255], [0, 255]]]
    halves.paste(255, (3, 0, 8, 2))
    assert Fit(1, 2, 2, "stretch", filter="box")(halves)[0, 0, 0] == 64  # a quarter of its four columns
    assert Fit(1, 2, 2, "crop", filter="box")(halves)[0, 0, 0] == 255


@pytest.mark.parametrize(("name", "right"), [("box", [0, 128, 255]), ("nearest", [0, 255, 255])])
def test_filters(name: Any, right: list[int]) -> None:
    step = Image.fromarray(np.array([[0, 0, 0, 255, 255, 255]], np.uint8))
    assert Fit(1, 1, 3, "stretch", filter=name)(step).ravel().tolist() == right


def test_transparent_pixels_show_the_background() -> None:
    image = Image.new("RGBA", (2, 1), (*RED, 0))
    image.putpixel((1, 0), (0, 0, 255, 51))
    assert Fit(3, 1, 2, background="yellow")(image)[:, 0].T.tolist() == [[255, 255, 0], [204, 204, 51]]


def test_with_four_channels_pixels_stay_transparent() -> None:
    """Averaged with its weight, an invisible pixel does not tint the visible one beside it (Porter and Duff 1984)."""
    image = Image.new("RGBA", (2, 1), (0, 255, 0, 0))
    image.putpixel((1, 0), (*RED, 255))
    assert Fit(4, 1, 1, "stretch", filter="box")(image).ravel().tolist() == [255, 0, 0, 128]
    assert Fit(4, 1, 2, background="#123456")(image)[:, 0].T.tolist() == [[0x12, 0x34, 0x56, 0], [*RED, 255]]
    padded = Fit(4, 3, 2, "pad", "blue")(image)
    assert padded[:, 0].T.tolist() == [[0, 0, 255, 0]] * 2
    assert Fit(4, 1, 1)(Image.new("L", (1, 1), 7)).ravel().tolist() == [7, 7, 7, 255]


def test_channels_of_arrays_are_resized_like_pictures() -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), dtype=np.uint8)
    five = np.concatenate([pixels, pixels[..., :2]], axis=2)
    for resize in ("crop", "pad", "stretch"):
        rgb = Fit(3, 4, 5, resize)(Image.fromarray(pixels))
        np.testing.assert_array_equal(Fit(5, 4, 5, resize)(Bands.of(five)), rgb[[0, 1, 2, 0, 1]])


def test_channels_that_images_cannot_have_are_refused() -> None:
    with pytest.raises(UserError, match=r"^pairs\.channels: must be 5 for these images \(got 3\)$"):
        Fit(3, 2, 2)(Bands.of(np.zeros((2, 2, 5), np.uint8)))
    with pytest.raises(UserError, match=r"^pairs\.channels: must be 1, 3 or 4 for pictures \(got 5\)$"):
        Fit(5, 2, 2)(Image.new("L", (2, 2)))


@pytest.mark.parametrize(
    ("resize", "size", "cropped", "enlarged"),
    [
        ("crop", (8, 4), 0.5, False),
        ("crop", (4, 3), 0.25, True),
        ("crop", (4, 4), 0.0, False),
        ("pad", (8, 3), 0.0, False),
        ("pad", (3, 3), 0.0, True),
        ("stretch", (8, 3), 0.0, True),
        ("stretch", (8, 4), 0.0, False),
    ],
)
def test_what_is_cropped_and_enlarged(resize: Any, size: tuple[int, int], cropped: float, enlarged: bool) -> None:
    fit = Fit(1, 4, 4, resize)
    assert (fit.cropped(size), fit.enlarged(size)) == (cropped, enlarged)


def test_channels_shown() -> None:
    images = np.arange(5, dtype=np.uint8).reshape(1, 5, 1, 1)
    assert visible(images[:, :4]).ravel().tolist() == [0, 1, 2, 3]
    assert visible(images).ravel().tolist() == [0, 1, 2]
    assert visible(images[:, :2]).ravel().tolist() == [0]
    assert visible(images, (4, 0, 2)).ravel().tolist() == [4, 0, 2]


@pytest.mark.parametrize("wrong", [{"resize": "fill"}, {"filter": "sinc"}, {"background": "rot"}])
def test_unknown_names_are_refused_at_once(wrong: dict[str, Any]) -> None:
    (name,) = wrong
    with pytest.raises(UserError, match=rf"^{name}: must be .* \(got '{wrong[name]}'\)$"):
        Fit(3, 2, 2, **wrong)
