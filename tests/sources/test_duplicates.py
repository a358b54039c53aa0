"""Near-duplicates across splits."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.sources import duplicates
from diffusion.sources.duplicates import MAX_BITS, MIN_SIDE, SHOWN, Hashes, perceptual_hash
from diffusion.sources.shards import Images, write
from diffusion.sources.sources import open_source
from diffusion.sources.splits import Fractions
from diffusion.storage.tar import SPLITS, Split

RNG = np.random.default_rng(0)


def noise(number: int, side: int = 40, channels: int = 3) -> Image.Image:
    """A picture unlike any other."""
    rng = np.random.default_rng(number)
    return Image.fromarray(rng.integers(0, 256, (20, 20, channels), dtype=np.uint8)).resize((side, side))


def test_the_hash_compares_low_frequencies_with_their_median() -> None:
    """By the definition of the discrete cosine transform."""
    pixels = RNG.integers(0, 256, (32, 32), dtype=np.uint8)
    frequency, place = np.arange(16)[:, None], np.arange(32)
    cosines = np.cos(np.pi * frequency * (2 * place + 1) / 64)
    expected = cosines @ pixels @ cosines.T
    found = perceptual_hash(Image.fromarray(pixels))
    assert found is not None
    bits = np.unpackbits(np.frombuffer(found, np.uint8)).reshape(16, 16)
    assert np.array_equal(bits, expected > np.median(expected))


def test_small_images_have_none_and_transparency_is_white() -> None:
    assert perceptual_hash(noise(0, MIN_SIDE - 1)) is None
    assert perceptual_hash(noise(0, 90).crop((0, 0, 90, MIN_SIDE - 1))) is None
    clear = noise(1, channels=4)
    white = Image.new("RGBA", clear.size, "white")
    white.alpha_composite(clear)
    assert perceptual_hash(clear) == perceptual_hash(white.convert("RGB")) is not None


def hashes(count: int) -> list[bytes]:
    return [RNG.bytes(32) for _ in range(count)]


def changed(bits: bytes, count: int) -> bytes:
    """A hash with `count` other bits."""
    values = np.unpackbits(np.frombuffer(bits, np.uint8))
    values[RNG.permutation(256)[:count]] ^= 1
    return np.packbits(values).tobytes()


def collected(found: list[bytes | None]) -> Hashes:
    result = Hashes()
    for bits in found:
        result.add(bits)
    return result


def test_the_nearest_are_found_and_numbered_as_the_images_are() -> None:
    train = [None, *hashes(70), None, None]  # images 0, 71 and 72 are too small
    val = [*hashes(20), None, changed(train[70], MAX_BITS), changed(train[1], 3), changed(train[5], MAX_BITS + 1)]
    test = [changed(val[0], 2), changed(val[0], 1)]
    splits: dict[Split, Hashes] = {"train": collected(train), "val": collected(val), "test": collected(test)}
    found = {each.splits: each for each in duplicates.search(splits)}
    assert found["train", "val"].images == 2
    assert found["train", "val"].pairs == [(1, 22, 3), (70, 21, MAX_BITS)]
    assert found["train", "test"].images == 0
    assert found["val", "test"].pairs == [(0, 1, 1), (0, 0, 2)]


def many(kind: str) -> tuple[list[bytes], list[bytes]]:
    """Hashes of two splits."""
    train = hashes(300)
    if kind == "random":  # and one near-duplicate at each distance
        return train, [changed(train[bits], bits) for bits in range(30)] + hashes(200)
    if kind == "ties":  # the first of the nearest counts
        return train * 2, [changed(train[number], number % 5) for number in range(100)]
    if kind == "equal":
        return [train[0]] * 40, [train[0]] * 50
    if kind == "a part":  # all agree in one part of the bits, whichever it is
        values = np.unpackbits(np.frombuffer(b"".join(train), np.uint8)).reshape(-1, 256)
        values[:, int(RNG.integers(17)) :: 17] = 0
        train = [np.packbits(each).tobytes() for each in values]
        return train, [changed(each, 10) for each in train]
    spread = list[bytes]()  # a bit in each part but one
    for each in train[:170]:
        values = np.unpackbits(np.frombuffer(each, np.uint8))
        for part in {*range(17)} - {len(spread) % 17}:
            values[RNG.choice(np.arange(part, 256, 17))] ^= 1
        spread.append(np.packbits(values).tobytes())
    return train, spread


@pytest.mark.parametrize("kind", ["random", "ties", "equal", "a part", "spread"])
@pytest.mark.parametrize(("pairs", "share"), [(1, 1.0), (100, 1.0), (2**18, 1 / 200), (2**18, 0.0)])
def test_those_found_are_those_of_comparing_all(
    monkeypatch: pytest.MonkeyPatch, kind: str, pairs: int, share: float
) -> None:
    monkeypatch.setattr(duplicates, "PAIRS", pairs)
    monkeypatch.setattr(duplicates, "MAX_SHARE", share)
    train, val = many(kind)
    a, b = (np.unpackbits(np.frombuffer(b"".join(each), np.uint8)).reshape(-1, 256) for each in (train, val))
    distance = (a[None] != b[:, None]).sum(axis=2)  # (val, train)
    nearest, bits = distance.argmin(axis=1), distance.min(axis=1)
    expected = sorted((bits[number], number) for number in range(len(val)) if bits[number] <= MAX_BITS)
    (found,) = duplicates.search({"train": collected([*train]), "val": collected([*val]), "test": Hashes()})
    assert found.images == len(expected) > 0
    assert found.pairs == [(nearest[number], number, fewest) for fewest, number in expected[:SHOWN]]


def test_all_are_counted_but_few_are_named() -> None:
    train = hashes(3)
    val = [changed(train[number % 3], number % 4) for number in range(50)]
    splits: dict[Split, Hashes] = {"train": collected([*train]), "val": collected([*val]), "test": Hashes()}
    (between,) = duplicates.describe(duplicates.search(splits), lambda split, number: f"{split} {number}") or ()
    assert (between.first, between.second, between.images, len(between.pairs)) == ("train", "val", 50, SHOWN)
    assert between.pairs[1].model_dump() == {"numbers": (1, 4), "files": ("train 1", "val 4"), "bits": 0}


def sharded(source: Path, directory: Path) -> Any:
    directory.mkdir()
    return write(open_source(source), "name", directory, Fractions(0.1, 0.1), 1000)


def test_copies_of_other_bytes_are_named_in_the_manifest(tmp_path: Path) -> None:
    for split, numbers in (("train", range(8)), ("val", range(8, 12)), ("test", range(12, 16))):
        for number in numbers:
            path = tmp_path / "pictures" / split / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            noise(number).save(path)
    noise(3).save(path.with_name("again.jpg"), quality=80)
    noise(9).resize((80, 80)).save(path.with_name("larger.png"))
    noise(1, 20).save(path.with_name("small.png"))
    manifest = sharded(tmp_path / "pictures", tmp_path / "shards")
    found = {(each.first, each.second): each for each in manifest.near_duplicates}
    assert {splits: each.images for splits, each in found.items()} == {
        ("train", "val"): 0, ("train", "test"): 1, ("val", "test"): 1,
    }  # fmt: skip
    images = {split: Images(tmp_path / "shards", manifest.splits[split]) for split in SPLITS}
    for splits, files in {("train", "test"): ("3.png", "again.jpg"), ("val", "test"): ("9.png", "larger.png")}.items():
        (pair,) = found[splits].pairs
        assert pair.files == tuple(f"{split}/{file}" for split, file in zip(splits, files, strict=True))
        assert tuple(images[split].source(n) for split, n in zip(splits, pair.numbers, strict=True)) == pair.files


@pytest.mark.parametrize("side", [8, MIN_SIDE - 1])
def test_nothing_is_said_of_small_images(tmp_path: Path, side: int) -> None:
    images = np.stack([np.asarray(noise(number, side)) for number in range(60)])
    buffer = io.BytesIO()
    np.savez(buffer, images=images)
    (tmp_path / "a.npz").write_bytes(buffer.getvalue())
    assert sharded(tmp_path / "a.npz", tmp_path / "shards").near_duplicates is None
