"""Arrays of any type, number of channels and order of axes."""

import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diffusion.errors import UserError
from diffusion.pairs.pixels import Fit
from diffusion.sources import arrays, shards
from diffusion.sources.arrays import Arrays
from diffusion.sources.bands import Bands
from diffusion.sources.images import Picture, Unreadable, digest, read_image
from diffusion.sources.reading import Reading
from diffusion.sources.shards import Images
from diffusion.sources.splits import Fractions
from tests.sources.encoders import tiff


def save(path: Path, images: NDArray[np.generic]) -> Path:
    np.save(path, images)
    return path


def decoded(source: Arrays) -> list[Picture]:
    return [sample.decode() for sample in source]


@pytest.mark.parametrize(
    ("values", "value_range", "right"),
    [
        (np.array([0, 128, 32896, 65535], "<u2"), (), [0, 0, 128, 255]),  # 128 / 257 is below a half
        (np.array([0, 129, 32896, 65535], ">u2"), (), [0, 1, 128, 255]),  # and 129 / 257 above
        (np.array([0, 0.5, 1, 0.25]), (), [0, 128, 255, 64]),  # 127.5 and 63.75
        (np.array([-1, 0, 1, 0.5], "<f4"), (), [0, 128, 255, 191]),
        (np.array([0, 1, 0.5, 0], ">f2"), (), [0, 255, 128, 0]),
        (np.array([-1024, 976, 2976, 3071], "<i2"), (-1024, 2976), [0, 128, 255, 255]),
        (np.array([0, 4095, 8190, 9000], "u2"), (4095, 8190), [0, 0, 255, 255]),
        (np.array([0, 1, 2, 3], "u1"), (0, 3), [0, 85, 170, 255]),
    ],
)
def test_values_are_brought_to_8_bits(
    tmp_path: Path, values: NDArray[np.generic], value_range: tuple[float, ...], right: list[int]
) -> None:
    source = Arrays(save(tmp_path / "a.npy", values.reshape(1, 2, 2)), Reading(value_range=value_range))
    (picture,) = decoded(source)
    assert isinstance(picture.image, Image.Image)
    assert picture.image.mode == "L"
    assert np.asarray(picture.image).ravel().tolist() == right


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (np.array([0, 1.5, 2, 3]), "float64 values from 0 to 3, whose black and white levels are unknown; set shard"),
        (np.array([-0.5, 0, 1, 1.25]), "float64 values from -0.5 to 1.25, whose"),
        (np.array([-5, 0, 1, 7], "i2"), r"int16 values from -5 to 7, .* for instance to -5 and 7$"),
        (np.array([0, 1, 2, 3], "u4"), "uint32 values from 0 to 3"),
        (np.full(4, 5.0), r"float64 values from 5 to 5, .* --value-range\)$"),
        (np.full(4, np.nan), "contains no finite values"),
    ],
)
def test_an_unknown_range_is_a_question(tmp_path: Path, values: NDArray[np.generic], message: str) -> None:
    source = Arrays(save(tmp_path / "a.npy", values.reshape(1, 2, 2)))
    with pytest.raises(UserError, match=rf"a\.npy: {message}"):
        decoded(source)


def test_clipped_values_are_warned_of_and_others_than_numbers_refused(tmp_path: Path) -> None:
    values = np.array([[[0, 5], [9, 10]], [[1, 2], [3, 4]], [[0, np.inf], [1, 2]]])
    source = Arrays(save(tmp_path / "a.npy", values), Reading(value_range=(1, 9)))
    first, second, third = source
    assert first.decode().warnings == ("2 of 4 values lie outside 1 to 9 and were clipped",)
    assert second.decode().warnings == ()
    with pytest.raises(Unreadable, match=r"^contains values that are not finite numbers$"):
        third.decode()


@pytest.mark.parametrize(
    ("shape", "layout", "right"),
    [
        ((2, 6, 8, 3), "auto", "channels-last"),
        ((2, 32, 32, 3), "auto", "channels-last"),
        ((2, 64, 64, 13), "auto", "channels-last"),
        ((2, 16, 16, 13), "auto", "channels-last"),
        ((2, 12, 14, 6), "auto", "channels-last"),
        ((2, 4, 4, 3), "auto", "channels-last"),  # four channels of 4x3 pixels are less plausible
        ((2, 3, 4, 4), "auto", "channels-first"),
        ((2, 3, 6, 8), "auto", "channels-first"),
        ((2, 3, 32, 32), "auto", "channels-first"),
        ((2, 1, 28, 28), "auto", "channels-first"),
        ((2, 4, 64, 64), "auto", "channels-first"),
        ((2, 13, 64, 64), "auto", "channels-first"),
        ((2, 13, 16, 16), "auto", "channels-first"),
        ((2, 6, 12, 14), "auto", "channels-first"),
        ((2, 6, 8, 8), "channels-last", "channels-last"),
        ((2, 6, 5, 5), "channels-first", "channels-first"),
        ((2, 10, 12, 13), "auto", None),
        ((2, 13, 12, 10), "auto", None),
        ((2, 7, 12, 14), "auto", None),
        ((2, 6, 5, 5), "auto", None),
        ((2, 8, 8, 8), "auto", None),
        ((2, 4, 4, 4), "auto", None),
        ((2, 3, 32, 3), "auto", None),
        ((2, 1, 5, 3), "auto", None),
    ],
)
def test_the_order_of_the_axes_is_found_or_asked_for(
    tmp_path: Path, shape: tuple[int, ...], layout: str, right: str | None
) -> None:
    images = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    reading = Reading(layout=layout)  # type: ignore[arg-type]
    if right is None:
        with pytest.raises(UserError, match=r"may be \(N, H, W, C\) or \(N, C, H, W\); set shard.layout .* --layout"):
            Arrays(save(tmp_path / "a.npy", images), reading)
        return
    expected = images.transpose(0, 2, 3, 1) if right == "channels-first" else images
    pictures = decoded(Arrays(save(tmp_path / "a.npy", images), reading))
    for picture, pixels in zip(pictures, expected, strict=True):
        found = picture.image.pixels() if isinstance(picture.image, Bands) else np.asarray(picture.image)
        np.testing.assert_array_equal(found.reshape(pixels.shape), pixels)


def test_four_channels_are_alpha_in_8_bits_only(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 6, 6, 4), dtype=np.uint8)
    (eight,) = decoded(Arrays(save(tmp_path / "8.npy", images)))
    assert eight.image.mode == "RGBA"
    (sixteen,) = decoded(Arrays(save(tmp_path / "16.npy", images.astype(np.uint16) * 257)))
    assert (sixteen.image.mode, sixteen.mode) == ("4 channels", "uint16")
    np.testing.assert_array_equal(Fit(4, 6, 6)(sixteen.image), images[0].transpose(2, 0, 1))


def test_channels_survive_the_shards(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (40, 5, 6, 7), dtype=np.uint8)
    images[39] = images[0]
    source = Arrays(save(tmp_path / "a.npy", images), Reading(layout="channels-first"))
    (tmp_path / "shards").mkdir()
    manifest = shards.write(source, "a", tmp_path / "shards", Fractions(0.2, 0.2), 100)
    assert manifest.copies == 1
    statistics = manifest.statistics["5 channels"]
    np.testing.assert_allclose(statistics.mean, images.mean((0, 2, 3)) / 255, atol=1e-9)
    np.testing.assert_allclose(statistics.std, images.std((0, 2, 3)) / 255, atol=1e-9)
    assert (manifest.smallest, manifest.largest) == ((7, 6), (7, 6))
    kept = [image for split in manifest.splits.values() for image, _ in Images(tmp_path / "shards", split)]
    assert all(isinstance(image, Bands) for image in kept)
    assert sorted(map(digest, kept)) == sorted(digest(Bands.of(image.transpose(1, 2, 0))) for image in images)
    assert json.loads((tmp_path / "shards" / "manifest.json").read_text())["statistics"].keys() == {"5 channels"}


def test_the_values_are_described(tmp_path: Path) -> None:
    deep = np.array([12, 13, 4000, 4095], np.uint16).reshape(1, 2, 2)
    assert Arrays(save(tmp_path / "a.npy", deep)).describe_values() == (
        "uint16 from 12 to 4095, brought to 8 bits: 0 becomes 0, 65535 255; "
        "--value-range 12 4095 (or shard.value_range) would use all 8 bits"
    )
    assert Arrays(tmp_path / "a.npy", Reading(value_range=(0, 4095))).describe_values() == (
        "uint16 from 12 to 4095, brought to 8 bits: 0 becomes 0, 4095 255"
    )
    assert Arrays(save(tmp_path / "b.npy", deep.astype(np.uint8))).describe_values() == ""


@pytest.mark.parametrize(("change", "right"), [(-1, 15), (1, 17)])
def test_the_size_of_the_file_is_checked_first(tmp_path: Path, change: int, right: int) -> None:
    path = save(tmp_path / "a.npy", np.zeros((4, 2, 2), np.uint8))
    content = path.read_bytes()
    path.write_bytes(content[:change] if change < 0 else content + bytes(change))
    with pytest.raises(UserError, match=rf"contains {right} bytes for uint8 of shape \(4, 2, 2\), which needs 16$"):
        Arrays(path)


@pytest.mark.parametrize("name", ["a.png", "a.tif", "a.pgm", "float.tif", "int.tif"])
def test_the_range_holds_for_greyscale_pictures_with_more_than_8_bits(tmp_path: Path, name: str) -> None:
    values = np.array([[90, 100, 2148], [4195, 4196, 60000]])
    dtype = {"float.tif": np.float32, "int.tif": np.int32}.get(name, np.uint16)
    Image.fromarray(values.astype(dtype)).save(tmp_path / name)
    picture = read_image(tmp_path / name, Reading(value_range=(100, 4196)))
    assert isinstance(picture.image, Image.Image)
    assert np.asarray(picture.image).tolist() == [[0, 0, 128], [255, 255, 255]]  # 2048 / 4096 of 255 is 127.5
    assert picture.warnings == ("2 of 6 values lie outside 100 to 4196 and were clipped",)


def test_the_range_does_not_hold_for_other_pictures(tmp_path: Path) -> None:
    Image.new("RGB", (2, 2), (0, 7, 255)).save(tmp_path / "a.png")
    assert read_image(tmp_path / "a.png", Reading(value_range=(5, 9))) == read_image(tmp_path / "a.png")
    Image.fromarray(np.full((2, 2), np.nan, np.float32)).save(tmp_path / "nan.tif")
    with pytest.raises(Unreadable, match=r"^contains values that are not finite numbers$"):
        read_image(tmp_path / "nan.tif", Reading(value_range=(5, 9)))
    with pytest.raises(Unreadable, match=r"^mode F: pixels of 32 bits .*; set shard\.value_range$"):
        read_image(tmp_path / "nan.tif")


def test_one_picture_is_not_taken_for_many(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"probably a single picture; save images\[None\] instead, or images\["):
        Arrays(save(tmp_path / "a.npy", np.zeros((64, 64, 3), np.uint8)))


def test_labels_are_checked_before_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    np.savez_compressed(tmp_path / "a.npz", images=np.zeros((2, 5, 5), np.uint8), labels=np.zeros(10**6, np.int64))
    monkeypatch.setattr(arrays, "rows", None)
    with pytest.raises(UserError, match=r"one for each image \(got int64 of shape \(1000000,\)\)$"):
        Arrays(tmp_path / "a.npz")


def test_warnings_are_listed_up_to_a_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "MAX_WARNINGS", 30)
    images = np.random.default_rng(0).integers(0, 9, (40, 5, 6))
    (tmp_path / "shards").mkdir()
    source = Arrays(save(tmp_path / "a.npy", images), Reading(value_range=(1, 7)))
    manifest = shards.write(source, "a", tmp_path / "shards", Fractions(0.2, 0.2), 100)
    assert (len(manifest.warnings), manifest.more_warnings) == (30, 10)


RAMP = np.array([[0, 1000], [3000, 4000]])


@pytest.mark.parametrize(
    ("dtype", "factor", "kind", "photometric", "right"),
    [
        ("<i2", 1, 2, 1, [[0, 64], [191, 255]]),
        ("<i4", 1, 2, 1, [[0, 64], [191, 255]]),
        ("<u4", 10**6, 1, 1, [[0, 64], [191, 255]]),  # beyond what a signed integer holds
        ("<f4", 1, 3, 1, [[0, 64], [191, 255]]),
        ("<f4", 1, 3, 0, [[255, 191], [64, 0]]),  # white is 0
        (">u2", 1, 1, 1, [[0, 64], [191, 255]]),
        (">i2", 1, 2, 1, None),
        (">i4", 1, 2, 1, None),
        (">f4", 1, 3, 1, None),
    ],
)
def test_tiff_files_of_any_type_are_read_right_or_refused(
    tmp_path: Path, dtype: str, factor: int, kind: int, photometric: int, right: list[list[int]] | None
) -> None:
    pixels = (RAMP * factor).astype(dtype)
    content = tiff(2, 2, [pixels.tobytes()], [8 * pixels.itemsize], photometric, {339: (3, [kind])}, dtype[0])
    (tmp_path / "a.tif").write_bytes(content)
    reading = Reading(value_range=(0, 4000 * factor))
    if right is None:
        with pytest.raises(Unreadable, match=r"big-endian order, which Pillow misreads"):
            read_image(tmp_path / "a.tif", reading)
        return
    picture = read_image(tmp_path / "a.tif", reading)
    assert isinstance(picture.image, Image.Image)
    assert np.asarray(picture.image).tolist() == right


def test_masks_of_0_and_1(tmp_path: Path) -> None:
    mask = np.array([[[False, True]] * 2] * 3)
    (first, *_) = decoded(Arrays(save(tmp_path / "bool.npy", mask)))
    assert isinstance(first.image, Image.Image)
    assert np.asarray(first.image).tolist() == [[0, 255]] * 2
    assert Arrays(save(tmp_path / "a.npy", mask.astype(np.uint8))).describe_values() == (
        "uint8 from 0 to 1, brought to 8 bits: 0 becomes 0, 255 255; "
        "--value-range 0 1 (or shard.value_range) would use all 8 bits"
    )


def test_arrays_have_the_limit_of_pixels(tmp_path: Path) -> None:
    path = save(tmp_path / "a.npy", np.zeros((2, 3, 7, 8), np.uint8))
    assert len(Arrays(path, Reading(max_pixels=56))) == 2
    with pytest.raises(UserError, match=r"images of 56 pixels, more than shard\.max_pixels \(55\)$"):
        Arrays(path, Reading(max_pixels=55))


def test_labels_that_are_no_array(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", images=np.zeros((2, 5, 5), np.uint8))
    with zipfile.ZipFile(tmp_path / "a.npz", "a") as archive:
        archive.writestr("labels.npy", b"no array")
    with pytest.raises(UserError, match=r"not a readable \.npz file \(its header is damaged\)$"):
        Arrays(tmp_path / "a.npz")
