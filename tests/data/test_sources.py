"""Formats in."""

import gzip
import io
import struct
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diffusion.data.sources import Folder, Idx, Npz, open_source
from diffusion.errors import UserError

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


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (6, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 100 if mode in ("L", "P") else None).save(path)


@pytest.mark.parametrize(("suffix", "separator"), [("", "-"), (".gz", "-"), ("", ".")])
def test_idx_files(tmp_path: Path, suffix: str, separator: str) -> None:
    source = open_source(mnist(tmp_path / "m", suffix=suffix, separator=separator))
    assert isinstance(source, Idx)
    assert source.own_splits == {"train", "test"}
    assert source.classes == ("2", "7", "9")
    samples = list(source)
    assert [sample.key for sample in samples] == [f"train-{i:07d}" for i in range(3)] + [
        f"test-{i:07d}" for i in (0, 1)
    ]
    assert [sample.label for sample in samples] == [1, 0, 1, 0, 2]
    assert [sample.split for sample in samples] == ["train"] * 3 + ["test"] * 2
    np.testing.assert_array_equal(np.stack([np.asarray(sample.decode()) for sample in samples]), IMAGES)
    assert len(source) == 5


@pytest.mark.parametrize(
    ("suffix", "cut", "message"),
    [
        ("", -5, r"train-images-idx3-ubyte: truncated: it ends at entry 2 of 3"),
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
    with pytest.raises(UserError, match="train-labels-idx1-ubyte: goes on after its 3 entries"):
        open_source(folder)


def test_an_idx_file_of_another_kind_is_named(tmp_path: Path) -> None:
    folder = mnist(tmp_path / "m")
    (folder / "train-images-idx3-ubyte").write_bytes(b"\x00\x00\x0d\x03" + bytes(12))
    with pytest.raises(UserError, match="train-images-idx3-ubyte: not an idx file of 3-dimensional unsigned bytes"):
        open_source(folder)


def test_idx_labels_that_do_not_match_are_named(tmp_path: Path) -> None:
    folder = mnist(tmp_path / "m")
    (folder / "t10k-labels-idx1-ubyte").write_bytes(idx(np.array([1, 2, 3], np.uint8)))
    with pytest.raises(UserError, match="t10k-labels-idx1-ubyte: 3 labels for the 2 images of"):
        open_source(folder)


def test_idx_files_without_labels_or_test_part(tmp_path: Path) -> None:
    (tmp_path / "train-images-idx3-ubyte").write_bytes(idx(IMAGES))
    source = open_source(tmp_path)
    assert source.own_splits == {"train"}
    assert source.classes == ()
    assert [sample.label for sample in source] == [None] * 5


@pytest.mark.parametrize(("channels", "mode"), [((), "L"), ((1,), "L"), ((3,), "RGB"), ((4,), "RGBA")])
@pytest.mark.parametrize("compressed", [False, True])
def test_npz(tmp_path: Path, channels: tuple[int, ...], mode: str, compressed: bool) -> None:
    images = np.random.default_rng(0).integers(0, 256, (3, 1, 5, *channels), dtype=np.uint8)
    (np.savez_compressed if compressed else np.savez)(tmp_path / "a.npz", images=images, labels=[5, 3, 5])
    source = open_source(tmp_path / "a.npz")
    assert isinstance(source, Npz)
    assert source.classes == ("3", "5")
    samples = list(source)
    assert [sample.label for sample in samples] == [1, 0, 1]
    assert {sample.decode().mode for sample in samples} == {mode}
    decoded = np.stack([np.asarray(sample.decode()) for sample in samples])
    np.testing.assert_array_equal(decoded.reshape(images.shape), images)


@pytest.mark.parametrize(
    ("arrays", "message"),
    [
        ({"pictures": np.zeros((2, 3, 3), np.uint8)}, "has no array `images`; it has pictures"),
        ({"images": np.zeros((2, 3, 3), np.float32)}, "they are float32 of shape"),
        ({"images": np.zeros((2, 3, 3, 2), np.uint8)}, r"they are uint8 of shape \(2, 3, 3, 2\)"),
        ({"images": np.zeros((2, 3, 3), np.uint8), "labels": np.zeros(3, int)}, "one for each image"),
        ({"images": np.zeros((2, 3, 3), np.uint8), "labels": np.zeros(2, object)}, "not a readable .npz file"),
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


def test_folder_with_classes(tmp_path: Path) -> None:
    for name in ["dogs/rex.png", "cats/tom.png", "cats/tom.jpg", "cats/old/tom.bmp", "stray.webp", ".hidden/x.png"]:
        save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    source = open_source(tmp_path)
    assert isinstance(source, Folder)
    assert source.classes == ("cats", "dogs")
    assert source.own_splits == frozenset()
    labels = {sample.file: sample.label for sample in source}
    assert labels == {
        "cats/notes.txt": 0, "cats/old/tom.bmp": 0, "cats/tom.jpg": 0, "cats/tom.png": 0, "dogs/rex.png": 1,
        "stray.webp": None,
    }  # fmt: skip
    assert list(labels) == sorted(labels)
    assert len(source) == len(labels)


def test_keys_are_unique_safe_and_a_function_of_the_path_alone(tmp_path: Path) -> None:
    names = ["a/b.png", "a/b.bmp", "a-b.png", "a b.png", "a.b.png", "ü/ß.png", "é.png", f"{'x' * 200}.png"]
    for name in names:
        save(tmp_path / name)
    before = {sample.file: sample.key for sample in open_source(tmp_path)}
    assert len(set(before.values())) == len(names)
    assert all(key.replace("-", "").replace("_", "").isalnum() and key.isascii() for key in before.values())
    assert max(map(len, before.values())) < 90
    assert before["a/b.png"].startswith("a-b-")
    save(tmp_path / "a" / "a.png")
    after = {sample.file: sample.key for sample in open_source(tmp_path)}
    assert before.items() <= after.items()


def test_folder_with_its_own_splits(tmp_path: Path) -> None:
    for name in ["train/a/1.png", "train/b/2.png", "test/c/3.png"]:
        save(tmp_path / name)
    source = open_source(tmp_path)
    assert source.own_splits == {"train", "test"}
    assert source.classes == ("a", "b", "c")
    assert [(sample.split, sample.label) for sample in source] == [("test", 2), ("train", 0), ("train", 1)]
    save(tmp_path / "other" / "4.png")
    assert open_source(tmp_path).classes == ("other", "test", "train")


def test_unknown_forms_are_refused_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "text").mkdir()
    (tmp_path / "text" / "a.txt").write_text("a")
    (tmp_path / "file.bin").write_bytes(b"a")
    for name in ["text", "file.bin"]:
        with pytest.raises(UserError, match=f"{name}: no images in a known form; looked for an .npz file"):
            open_source(tmp_path / name)
    with pytest.raises(UserError, match="missing: no such file or folder"):
        open_source(tmp_path / "missing")


def test_postscript_is_not_run(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.new("L", (4, 4)).save(buffer, "EPS")
    (tmp_path / "a.eps").write_bytes(buffer.getvalue())
    with pytest.raises(UserError, match="no images in a known form"):
        open_source(tmp_path)
