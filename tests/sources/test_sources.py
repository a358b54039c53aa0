"""Input formats."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diffusion.errors import UserError
from diffusion.sources.arrays import Arrays
from diffusion.sources.idx import Idx
from diffusion.sources.sources import open_source

IMAGES = np.random.default_rng(0).integers(0, 256, (5, 4, 3), dtype=np.uint8)


def idx(array: NDArray[np.uint8]) -> bytes:
    """An idx file, by the description on MNIST's page."""
    return bytes([0, 0, 8, array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()


def mnist(folder: Path, *, suffix: str = "", separator: str = "-") -> Path:
    folder.mkdir()
    for part, images, labels in [("train", IMAGES[:3], [7, 2, 7]), ("t10k", IMAGES[3:], [2, 9])]:
        for kind, array in [(f"images{separator}idx3", images), (f"labels{separator}idx1", np.array(labels, np.uint8))]:
            content = gzip.compress(idx(array)) if suffix else idx(array)
            (folder / f"{part}-{kind}-ubyte{suffix}").write_bytes(content)
    return folder


@pytest.mark.parametrize(("suffix", "separator"), [("", "-"), (".gz", "-"), ("", ".")])
def test_idx_files(tmp_path: Path, suffix: str, separator: str) -> None:
    source = open_source(mnist(tmp_path / "m", suffix=suffix, separator=separator))
    assert isinstance(source, Idx)
    assert source.own_splits == {
        "train": f"train-images{separator}idx3-ubyte{suffix}",
        "test": f"t10k-images{separator}idx3-ubyte{suffix}",
    }
    assert source.classes == ("2", "7", "9")
    samples = list(source)
    assert [sample.key for sample in samples] == [f"test-{i:07d}" for i in (0, 1)] + [
        f"train-{i:07d}" for i in range(3)
    ]
    assert [sample.label for sample in samples] == [0, 2, 1, 0, 1]
    assert [sample.split for sample in samples] == ["test"] * 2 + ["train"] * 3
    decoded = np.stack([np.asarray(sample.decode().image) for sample in samples])
    np.testing.assert_array_equal(decoded, IMAGES[[3, 4, 0, 1, 2]])
    assert len(source) == 5


@pytest.mark.parametrize(
    ("suffix", "cut", "message"),
    [
        ("", -5, r"train-images-idx3-ubyte: truncated at entry 2 of 3"),
        ("", 9, r"train-images-idx3-ubyte: not a readable idx file"),
        (".gz", -30, r"train-images-idx3-ubyte\.gz: damaged at entry \d of 3"),
        (".gz", -5, r"train-images-idx3-ubyte\.gz: damaged at its end"),
    ],
)
def test_a_truncated_idx_file_is_named(tmp_path: Path, suffix: str, cut: int, message: str) -> None:
    folder = mnist(tmp_path / "m", suffix=suffix)
    path = folder / f"train-images-idx3-ubyte{suffix}"
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(UserError, match=message):
        list(open_source(folder))


def test_an_idx_file_that_is_too_long_is_named(tmp_path: Path) -> None:
    folder = mnist(tmp_path / "m")
    with (folder / "train-labels-idx1-ubyte").open("ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match="train-labels-idx1-ubyte: contains data after its 3 entries"):
        open_source(folder)


def test_an_idx_file_of_another_kind_is_named(tmp_path: Path) -> None:
    folder = mnist(tmp_path / "m")
    (folder / "train-images-idx3-ubyte").write_bytes(b"\x00\x00\x0d\x03" + bytes(12))
    with pytest.raises(UserError, match="train-images-idx3-ubyte: not an idx file of 3-dimensional unsigned bytes"):
        open_source(folder)


def test_idx_labels_that_do_not_match_are_named(tmp_path: Path) -> None:
    folder = mnist(tmp_path / "m")
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([1, 2, 3], np.uint8)))
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte: 3 labels for 2 images of"):
        open_source(folder)


def test_idx_files_without_labels_or_test_part(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES))
    source = open_source(tmp_path)
    assert source.own_splits == {"train": "train-images-idx3-ubyte"}
    assert source.classes == ()
    assert [sample.label for sample in source] == [None] * 5


@pytest.mark.parametrize(("channels", "mode"), [((), "L"), ((1,), "L"), ((3,), "RGB"), ((4,), "RGBA")])
@pytest.mark.parametrize("compressed", [False, True])
def test_npz(tmp_path: Path, channels: tuple[int, ...], mode: str, compressed: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 6, 5, *channels), dtype=np.uint8)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", images=images, labels=[5, 3, 5])
    source = open_source(tmp_path / "a.npz")
    assert isinstance(source, Arrays)
    assert source.classes == ("3", "5")
    samples = list(source)
    assert [sample.label for sample in samples] == [1, 0, 1]
    assert {sample.decode().mode for sample in samples} == {mode}
    decoded = np.stack([np.asarray(sample.decode().image) for sample in samples])
    np.testing.assert_array_equal(decoded.reshape(images.shape), images)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 3, 3), np.uint8)}, "contains no array `images` .found: .'pictures'"),
        ({"images": np.zeros((2, 3), np.uint8)}, r"\(got uint8 of shape \(2, 3\)"),
        ({"images": np.zeros((2, 3, 3), complex)}, r"\(got complex128 of shape"),
        ({"images": np.zeros((2, 0, 3), np.uint8)}, r"\(got uint8 of shape \(2, 0, 3\)"),
        ({"images": np.zeros((2, 3, 3), np.uint8), "labels": np.zeros(3, int)}, "one for each image"),
        ({"images": np.zeros((2, 3, 3), np.uint8), "labels": np.zeros(2, object)}, "got object of shape"),
        ({"images": np.asfortranarray(np.zeros((2, 3, 3), np.uint8))}, "Fortran order"),
    ],
)
def test_unfit_npz_files_are_refused_in_one_line(
    tmp_path: Path, arrays: dict[str, NDArray[np.generic]], message: str
) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=message) as caught:
        open_source(path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_damaged_npz_file_is_named(tmp_path: Path) -> None:
    path = tmp_path / "a.npz"
    np.savez(path, images=np.arange(64 * 64 * 64, dtype=np.uint8).reshape(64, 64, 64))
    content = bytearray(path.read_bytes())
    content[150000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"a\.npz: damaged at entry \d+ of 64"):
        list(open_source(path))
    path.write_bytes(b"no zip file")
    with pytest.raises(UserError, match=r"a\.npz: not a readable"):
        open_source(path)


def test_minus_one_is_no_label(tmp_path: Path) -> None:
    for number, (labels, classes, expected) in enumerate([
        ([3, -1, 5, 3, -1], ("3", "5"), [0, None, 1, 0, None]),
        ([-1] * 5, (), [None] * 5),
        ([-2, -1, 0, 0, 0], ("-2", "0"), [0, None, 1, 1, 1]),
    ]):  # fmt: skip
        path = tmp_path / f"{number}.npz"
        np.savez(path, images=IMAGES, labels=np.array(labels, np.int8))
        source = open_source(path)
        assert source.classes == classes
        assert [sample.label for sample in source] == expected


def test_idx_files_in_a_wrapping_folder(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    mnist(tmp_path / "a" / "raw", suffix=".gz")
    assert isinstance(open_source(tmp_path), Idx)
    mnist(tmp_path / "b")
    with pytest.raises(UserError, match=r"several folders contain idx files; choose one of .*a/raw, .*b$"):
        open_source(tmp_path)


def test_unknown_forms_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    (tmp_path / "file.bin").write_bytes(b"a")
    for name in ["text", "file.bin"]:
        with pytest.raises(UserError, match=f"{name}: no images in a supported format; expected an .npz file"):
            open_source(tmp_path / name)
    with pytest.raises(UserError, match="missing: no such file or folder"):
        open_source(tmp_path / "missing")


def test_postscript_is_not_run(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "EPS")
    (tmp_path / "a.eps").write_bytes(buffer.getvalue())
    (sample,) = open_source(tmp_path)
    assert sample.rejected == "EPS, which Pillow cannot read; convert it to PNG or JPEG"
