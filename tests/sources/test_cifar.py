"""CIFAR's binary version, by its description: the label (CIFAR-100: two), then 1024 red, green and blue values each."""

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from diffusion.errors import UserError
from diffusion.sources.cifar import Cifar
from diffusion.sources.sources import open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (12, 32, 32, 3), dtype=np.uint8)


def record(labels: bytes, pixels: NDArray[np.uint8]) -> bytes:
    return labels + b"".join(pixels[..., channel].tobytes() for channel in range(3))


def cifar10(folder: Path) -> Path:
    folder.mkdir()
    names = [*(f"data_batch_{number}.bin" for number in range(1, 6)), "test_batch.bin"]
    for number, name in enumerate(names):
        content = b"".join(record(bytes([(2 * number + i) % 10]), PIXELS[2 * number + i]) for i in range(2))
        (folder / name).write_bytes(content)
    (folder / "batches.meta.txt").write_text("\n".join(f"class{number}" for number in range(10)) + "\n\n")
    return folder


def test_cifar_10(tmp_path: Path) -> None:
    source = open_source(cifar10(tmp_path / "cifar"))
    assert isinstance(source, Cifar)
    assert len(source) == 12
    assert source.classes == tuple(f"class{number}" for number in range(10))
    assert source.own_splits["test"] == "test_batch.bin"
    samples = list(source)
    order = [10, 11, *range(10)]  # the test split first
    assert [sample.label for sample in samples] == [number % 10 for number in order]
    assert [sample.split for sample in samples] == ["test"] * 2 + ["train"] * 10
    assert samples[0].file == "test_batch.bin[0]"
    assert len({sample.key for sample in samples}) == 12
    decoded = np.stack([np.asarray(sample.decode().image) for sample in samples])
    np.testing.assert_array_equal(decoded, PIXELS[order])


def test_cifar_100_has_its_fine_labels(tmp_path: Path) -> None:
    for name, number in (("train.bin", 0), ("test.bin", 1)):
        (tmp_path / name).write_bytes(record(bytes([7, number]), PIXELS[number]))
    (tmp_path / "fine_label_names.txt").write_text("apple\nbear\n")
    (tmp_path / "coarse_label_names.txt").write_text("fruit\n")
    source = open_source(tmp_path)
    assert source.classes == ("apple", "bear")
    assert [(sample.split, sample.label) for sample in source] == [("test", 1), ("train", 0)]
    np.testing.assert_array_equal(np.asarray(next(iter(source)).decode().image), PIXELS[1])


def test_an_incomplete_or_cut_version_gets_one_line(tmp_path: Path) -> None:
    folder = cifar10(tmp_path / "cifar")
    batch = folder / "data_batch_3.bin"
    batch.write_bytes(batch.read_bytes()[:-1])
    with pytest.raises(UserError, match=r"data_batch_3.bin: 6145 bytes, not a multiple of 3073"):
        open_source(folder)
    batch.unlink()
    with pytest.raises(UserError, match=r"data_batch_3.bin: not there; .* is not the complete binary version of CIFAR"):
        open_source(folder)


def test_a_label_without_a_name_gets_one_line(tmp_path: Path) -> None:
    folder = cifar10(tmp_path / "cifar")
    (folder / "batches.meta.txt").write_text("one\ntwo\n")
    with pytest.raises(UserError, match=r"data_batch_2.bin\[0\] has the label 2, but batches.meta.txt names 2"):
        list(open_source(folder))
