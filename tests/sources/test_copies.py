"""Splits by pixels: copies under other names stay together, and never cross from train to a source's own test split."""

import hashlib
import json
import shutil
import struct
import tarfile
import tracemalloc
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.sources.images import Picture
from diffusion.sources.shards import Manifest, Sample, write
from diffusion.sources.sources import open_source
from diffusion.sources.splits import Fractions, Splitter
from diffusion.storage.tar import SPLITS, Split

RNG = np.random.default_rng(3)
FRACTIONS: dict[str, Any] = {"fractions": Fractions(0.2, 0.2), "samples_per_shard": 100}


def shard(source: Path, directory: Path) -> Manifest:
    directory.mkdir()
    return write(open_source(source), "name", directory, **FRACTIONS)


def contents(directory: Path) -> dict[str, str]:
    """The split of each file of the source."""
    result = {}
    for path in sorted(directory.glob("*.tar")):
        with tarfile.open(path) as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    result[json.load(tar.extractfile(member))["source"]] = path.name.split("-")[0]  # type: ignore[arg-type]
    return result


def picture(path: Path, seed: int) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)).save(path)
    return path


def test_copies_under_other_names_and_in_other_forms_share_a_split(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for index in range(60):
        path = picture(source / "a" / f"{index}.png", index)
        shutil.copy(path, source / "a" / f"copy-{index}.png")
        (source / "b").mkdir(exist_ok=True)
        with Image.open(path) as image:
            image.save(source / "b" / f"{index}.bmp")
            image.convert("RGBA").save(source / "b" / f"{index}.webp", lossless=True)
    manifest = shard(source, tmp_path / "shards")
    splits = contents(tmp_path / "shards")
    assert len(splits) == 240
    for index in range(60):
        names = (f"a/{index}.png", f"a/copy-{index}.png", f"b/{index}.bmp", f"b/{index}.webp")
        assert len({splits[name] for name in names}) == 1
    assert set(splits.values()) == set(SPLITS)
    assert (manifest.copies, manifest.rejected) == (180, ())


def test_the_split_is_a_hash_of_the_pixels(tmp_path: Path) -> None:
    """By the definition: BLAKE2b (64 bits) of the shape (H, W, 4) and the RGBA pixels, as a share of 2**64."""
    for index in range(40):
        picture(tmp_path / "source" / f"{index}.png", index)
    shard(tmp_path / "source", tmp_path / "shards")
    for name, split in contents(tmp_path / "shards").items():
        with Image.open(tmp_path / "source" / name) as image:
            pixels = np.asarray(image.convert("RGBA"))
        digest = hashlib.blake2b(struct.pack("<3Q", 6, 5, 4) + pixels.tobytes(), digest_size=8).digest()
        place = struct.unpack(">Q", digest)[0] / 2**64
        assert split == ("val" if place < 0.2 else "test" if place < 0.4 else "train")


def test_new_names_and_new_images_move_nothing(tmp_path: Path) -> None:
    for index in range(50):
        picture(tmp_path / "before" / f"{index}.png", index)
        picture(tmp_path / "after" / f"renamed-{index}.png", index)
        picture(tmp_path / "after" / f"new-{index}.png", 1000 + index)
    shard(tmp_path / "before", tmp_path / "x")
    shard(tmp_path / "after", tmp_path / "y")
    before, after = contents(tmp_path / "x"), contents(tmp_path / "y")
    assert {f"renamed-{name}": split for name, split in before.items()}.items() <= after.items()


def test_a_copy_of_an_own_test_image_is_rejected_and_one_of_val_goes_to_val(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for index in range(30):
        picture(source / "train" / f"{index}.png", index)
    for index in range(5):
        picture(source / "test" / f"{index}.png", 100 + index)
        picture(source / "valid" / f"{index}.png", 200 + index)
    picture(source / "test" / "copy-in-test.png", 100)
    picture(source / "train" / "of-test.png", 100)
    picture(source / "train" / "of-test-2.png", 101)
    picture(source / "valid" / "of-test-3.png", 102)
    picture(source / "train" / "of-val.png", 200)
    picture(source / "train" / "of-train.png", 0)
    manifest = shard(source, tmp_path / "shards")
    splits = contents(tmp_path / "shards")
    assert {rejected.file: rejected.reason for rejected in manifest.rejected} == dict.fromkeys(
        ("valid/of-test-3.png", "train/of-test-2.png", "train/of-test.png"),
        "a copy of an image in the source's test split",
    )
    assert splits["train/of-val.png"] == "val"
    assert splits["train/of-train.png"] == "train"
    assert {split: contents.samples for split, contents in manifest.splits.items()} == {
        "train": 31, "val": 6, "test": 6,
    }  # fmt: skip
    assert manifest.copies == 6


def test_val_is_split_off_an_own_train_split_with_all_copies(tmp_path: Path) -> None:
    source = tmp_path / "source"
    for index in range(60):
        shutil.copy(picture(source / "train" / f"{index}.png", index), source / "train" / f"copy-{index}.png")
    picture(source / "test" / "0.png", 100)
    shard(source, tmp_path / "shards")
    splits = contents(tmp_path / "shards")
    pairs = [(splits[f"train/{index}.png"], splits[f"train/copy-{index}.png"]) for index in range(60)]
    assert set(pairs) == {("train", "train"), ("val", "val")}


def test_idx_files_drop_copies_of_their_test_part(tmp_path: Path) -> None:
    images = RNG.integers(0, 256, (40, 3, 3), dtype=np.uint8)
    for part, pixels in (("train", images), ("t10k", images[[7, 7, 9]])):
        header = bytes([0, 0, 8, 3]) + struct.pack(">3I", *pixels.shape)
        (tmp_path / f"{part}-images-idx3-ubyte").write_bytes(header + pixels.tobytes())
    manifest = shard(tmp_path, tmp_path / "shards")
    assert [rejected.file for rejected in manifest.rejected] == [
        "train-images-idx3-ubyte[7]", "train-images-idx3-ubyte[9]"
    ]  # fmt: skip
    assert manifest.splits["test"].samples == 3
    assert manifest.copies == 3


def test_warnings_and_several_pages_are_in_the_manifest(tmp_path: Path) -> None:
    for index in range(20):
        picture(tmp_path / "source" / f"{index}.png", index)
    frames = [Image.new("L", (3, 3), value) for value in (9, 99)]
    frames[0].save(tmp_path / "source" / "film.gif", save_all=True, append_images=frames[1:])
    exif = Image.Exif()
    exif[0x0112] = 1
    frames[0].save(tmp_path / "source" / "odd.tif", exif=exif)
    content = (tmp_path / "source" / "odd.tif").read_bytes()
    entry = struct.pack("<HHI", 0x0112, 3, 1)
    assert content.count(entry) == 1
    (tmp_path / "source" / "odd.tif").write_bytes(content.replace(entry, struct.pack("<HHI", 0x0112, 3, 2)))
    manifest = shard(tmp_path / "source", tmp_path / "shards")
    assert manifest.multipage == 1
    assert [(remark.file, remark.reason) for remark in manifest.warnings] == [
        ("odd.tif", "Metadata Warning, tag 274 had too many entries: 2, expected 1")
    ]


class Many:
    """A source of `count` small images that differ in a few pixels."""

    classes = ()
    own_splits: dict[Any, str] = {}  # noqa: RUF012

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[Sample]:
        for index in range(self.count):
            yield Sample(f"{index:07d}", str(index), None, None, partial(self._decode, index))

    def _decode(self, index: int, _: int = 0) -> Picture:
        return Picture(Image.frombytes("L", (4, 1), struct.pack(">I", index)), "L")


class Parts(Many):
    """`count` images in each of the source's own splits."""

    own_splits = {"train": "x", "val": "y", "test": "z"}  # noqa: RUF012

    def __iter__(self) -> Iterator[Sample]:
        splits: tuple[Split, ...] = ("test", "val", "train")
        for number, split in enumerate(splits):
            for index in range(self.count):
                place = number * self.count + index
                yield Sample(f"{split}-{index:07d}", str(place), None, split, partial(self._decode, place))


def test_the_digests_of_an_own_split_are_sorted_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sort, sorted_sizes = np.sort, list[int]()

    def counting(values: Any) -> Any:
        sorted_sizes.append(len(values))
        return sort(values)

    monkeypatch.setattr(np, "sort", counting)
    write(Parts(50), "name", tmp_path, **FRACTIONS)
    assert sorted_sizes == [50, 50]


def test_memory_grows_by_little_more_than_the_digests(tmp_path: Path) -> None:
    peaks = []
    for count in (500, 3500):
        (tmp_path / str(count)).mkdir()
        tracemalloc.start()
        write(Many(count), "name", tmp_path / str(count), **FRACTIONS | {"samples_per_shard": 200})
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert (peaks[1] - peaks[0]) / 3000 < 80  # bytes per image


@pytest.mark.parametrize("own", [{}, {"train": "x"}, {"train": "x", "test": "y"}, {"train": "x", "val": "y"}])
def test_shares_of_the_hash(own: dict[Any, str]) -> None:
    found = [Splitter(own, Fractions(0.1, 0.3))(None, int(place * 2**64)) for place in (np.arange(1000) + 0.5) / 1000]
    shares = {split: found.count(split) for split in SPLITS}
    val, test = (0 if "val" in own else 100), (0 if "test" in own else 300)
    assert shares == {"train": 1000 - val - test, "val": val, "test": test}
