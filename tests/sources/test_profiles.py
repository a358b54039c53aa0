"""ICC profiles: pictures in other colour spaces become sRGB, by the equations of the spaces."""

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image, ImageCms

from diffusion.sources.images import Unreadable, read_image
from tests.sources.encoders import (
    ADOBE_RGB,
    DISPLAY_P3,
    SRGB,
    cmyk_profile,
    encoded,
    grey_profile,
    lab_to_xyz,
    matrix_profile,
    png,
    tiff,
    to_srgb,
)

STEPS = np.array([0, 60, 128, 200, 255], np.uint8)
COLOURS = np.stack(np.meshgrid(STEPS, STEPS, STEPS, indexing="ij"), -1).reshape(5, 25, 3)
GREYS = np.arange(256, dtype=np.uint8).reshape(8, 32)
SPACES = {"Display P3": (DISPLAY_P3, 2.2), "Adobe RGB": (ADOBE_RGB, 2.199), "Mac": (SRGB, 1.8), "linear": (SRGB, 1.0)}
P3 = matrix_profile(DISPLAY_P3, 2.2)


def close(image: Image.Image, expected: NDArray[Any], levels: float = 3) -> None:
    assert np.abs(np.asarray(image) - expected).max() <= levels


@pytest.mark.parametrize("space", SPACES)
@pytest.mark.parametrize("kind", ["png", "tif", "webp"])
def test_rgb_spaces(tmp_path: Path, kind: str, space: str) -> None:
    to_xyz, gamma = SPACES[space]
    expected = to_srgb(COLOURS, to_xyz, round(gamma * 256) / 256)
    assert np.abs(expected - COLOURS).max() > 15
    path = tmp_path / f"a.{kind}"
    options = {"lossless": True} if kind == "webp" else {}
    Image.fromarray(COLOURS).save(path, icc_profile=matrix_profile(to_xyz, gamma), **options)
    close(read_image(path).image, expected)


@pytest.mark.parametrize("kind", ["jpg", "avif"])
def test_lossy_files_with_a_profile(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind}"
    Image.new("RGB", (16, 16), (200, 60, 30)).save(path, icc_profile=P3, quality=100)
    close(read_image(path).image, to_srgb(np.array([200, 60, 30]), DISPLAY_P3, 2.2), 6)


def test_alpha_and_palettes_are_kept(tmp_path: Path) -> None:
    alpha = np.arange(125, dtype=np.uint8).reshape(5, 25, 1)
    Image.fromarray(np.concatenate([COLOURS, alpha], axis=2)).save(tmp_path / "a.png", icc_profile=P3)
    close(read_image(tmp_path / "a.png").image, np.concatenate([to_srgb(COLOURS, DISPLAY_P3, 2.2), alpha], axis=2))
    palette = Image.fromarray(alpha[..., 0])
    palette.putpalette(COLOURS.tobytes())
    palette.save(tmp_path / "p.png", icc_profile=P3)
    close(read_image(tmp_path / "p.png").image, to_srgb(COLOURS, DISPLAY_P3, 2.2))


def test_a_rotated_picture_with_a_profile(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.fromarray(COLOURS).save(tmp_path / "a.tif", icc_profile=P3, exif=exif)
    close(read_image(tmp_path / "a.tif").image, np.rot90(to_srgb(COLOURS, DISPLAY_P3, 2.2), -1))


@pytest.mark.parametrize("gamma", [1.0, 1.8])
def test_grey(tmp_path: Path, gamma: float) -> None:
    """With a grey profile and with an RGB profile, 8 and 16 bits, with alpha and without."""
    gamma = round(gamma * 256) / 256
    linear = (GREYS[..., None] / 255) ** gamma * np.array([0.9642, 1.0, 0.8249])
    expected = encoded(linear)[..., 0]
    for number, profile in enumerate([grey_profile(gamma), matrix_profile(SRGB, gamma)]):
        for kind in ("png", "tif"):
            path = tmp_path / f"{number}.{kind}"
            Image.fromarray(GREYS).save(path, icc_profile=profile)
            assert read_image(path).image.mode == "L"
            close(read_image(path).image, expected)
            Image.fromarray(GREYS.astype(np.uint16) * 257).save(path, icc_profile=profile)
            if number == 1 and gamma == 1.0:
                with pytest.raises(Unreadable, match="16-bit pixels in a linear RGB space"):
                    read_image(path)
                continue
            assert read_image(path).image.mode == "L"
            close(read_image(path).image, expected)
        Image.fromarray(np.dstack([GREYS, GREYS.T.reshape(GREYS.shape)])).save(tmp_path / "la.png", icc_profile=profile)
        close(read_image(tmp_path / "la.png").image, np.dstack([expected] * 3 + [GREYS.T.reshape(GREYS.shape)]))


def test_dark_tones_of_16_bit_linear_grey_are_kept(tmp_path: Path) -> None:
    values = np.arange(0, 2048, 8, dtype=np.uint16).reshape(8, 32)
    Image.fromarray(values).save(tmp_path / "a.tif", icc_profile=grey_profile(1.0))
    expected = encoded((values[..., None] / 65535) * np.array([0.9642, 1.0, 0.8249]))[..., 0]
    close(read_image(tmp_path / "a.tif").image, expected, 2)


def test_16_bit_linear_rgb_is_refused_since_pillow_keeps_8_bits(tmp_path: Path) -> None:
    rows = [row.tobytes() for row in (COLOURS.astype(np.uint16) * 257).astype(">u2")]
    for gamma in (1.0, 2.2):
        profile = b"x\0\0" + zlib.compress(matrix_profile(ADOBE_RGB, gamma))
        (tmp_path / f"{gamma}.png").write_bytes(png(25, 5, 16, 2, rows, {b"iCCP": profile}))
    with pytest.raises(Unreadable, match="16-bit pixels in a linear RGB space"):
        read_image(tmp_path / "1.0.png")
    close(read_image(tmp_path / "2.2.png").image, to_srgb(COLOURS, ADOBE_RGB, 2.2))


PAPER = np.array([100.0, 0, 0])
INKS = np.array([[-20.0, -30, -35], [-25, 40, -5], [-10, -5, 60], [-35, 0, 0]])
"""What each ink adds to the paper's L*a*b*, of an idealized press."""


def inks_profile() -> bytes:
    on = np.stack(np.meshgrid(*[[0, 1]] * 4, indexing="ij"), -1)
    return cmyk_profile(PAPER + on @ INKS)


def printed(inks: NDArray[np.uint8]) -> NDArray[np.float64]:
    """uint8 CMYK (..., 4) in sRGB."""
    return encoded(lab_to_xyz(PAPER + inks / 255 @ INKS))


def test_cmyk(tmp_path: Path) -> None:
    steps = np.array([0, 90, 180, 255], np.uint8)
    inks = np.stack(np.meshgrid(*[steps] * 4, indexing="ij"), -1).reshape(16, 16, 4)
    image = Image.frombytes("CMYK", (16, 16), inks.tobytes())
    image.save(tmp_path / "a.tif", icc_profile=inks_profile())
    close(read_image(tmp_path / "a.tif").image, printed(inks))
    colour = np.array([0, 200, 180, 10], np.uint8)
    flat = Image.new("CMYK", (16, 16), tuple(colour.tolist()))
    flat.save(tmp_path / "a.jpg", icc_profile=inks_profile(), quality=100)
    close(read_image(tmp_path / "a.jpg").image, printed(colour))


def test_srgb_under_any_name_leaves_pixels_alone(tmp_path: Path) -> None:
    profile = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    Image.fromarray(COLOURS).save(tmp_path / "a.png", icc_profile=profile)
    np.testing.assert_array_equal(np.asarray(read_image(tmp_path / "a.png").image), COLOURS)


def test_jpeg_2000(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.fromarray(COLOURS).save(buffer, "JPEG2000", irreversible=False)
    content = buffer.getvalue()
    place = content.index(b"colr") - 4
    size = int.from_bytes(content[place : place + 4])
    box = b"colr\x02\0\0" + P3
    box = (len(box) + 4).to_bytes(4) + box
    header = content.index(b"jp2h") - 4
    grown = int.from_bytes(content[header : header + 4]) + len(box) - size
    content = content[:header] + grown.to_bytes(4) + content[header + 4 : place] + box + content[place + size :]
    (tmp_path / "a.jp2").write_bytes(content)
    close(read_image(tmp_path / "a.jp2").image, to_srgb(COLOURS, DISPLAY_P3, 2.2))


def test_profiles_that_cannot_be_applied_are_refused(tmp_path: Path) -> None:
    Image.fromarray(COLOURS).save(tmp_path / "grey.png", icc_profile=grey_profile(1.8))
    Image.fromarray(COLOURS).save(tmp_path / "cmyk.png", icc_profile=inks_profile())
    Image.fromarray(COLOURS).save(tmp_path / "damaged.jpg", icc_profile=b"no profile")
    Image.fromarray(COLOURS).save(tmp_path / "cut.tif", icc_profile=P3[:200])
    (tmp_path / "zlib.png").write_bytes(png(1, 1, 8, 0, [b"\0"], {b"iCCP": b"x\0\0no zlib stream"}))
    (tmp_path / "empty.tif").write_bytes(tiff(1, 1, [b"\0"], [8], 1, {34675: (1, [0] * 200)}))
    reasons = {}
    for path in tmp_path.iterdir():
        with pytest.raises(Unreadable) as caught:
            read_image(path)
        reasons[path.name] = str(caught.value)
    assert reasons == {
        "grey.png": "its ICC profile is for GRAY pixels, but it has RGB pixels",
        "cmyk.png": "its ICC profile is for CMYK pixels, but it has RGB pixels",
        "damaged.jpg": "a damaged ICC profile",
        "cut.tif": "a damaged ICC profile",
        "zlib.png": "a damaged ICC profile",
        "empty.tif": "a damaged ICC profile",
    }
