"""WebDataset shards."""

import hashlib
import json
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import UserError, counted
from diffusion.sources.descriptions import describe_classes, describe_sizes
from diffusion.sources.rejections import TooFewImages
from diffusion.sources.shards import MANIFEST, Images, Manifest, write
from diffusion.sources.sources import open_source
from diffusion.sources.splits import Fractions
from diffusion.storage.files import sha256, write_sums
from diffusion.storage.tar import SPLITS

Reader = Callable[[list[str]], list[dict[str, Any]]]


def shard(source: Path, directory: Path, **options: Any) -> Manifest:
    directory.mkdir()
    settings = {"fractions": Fractions(0.2, 0.2), "samples_per_shard": 100} | options
    return write(open_source(source), "name", directory, **settings)


def npz(path: Path, n: int) -> Path:
    images = np.random.default_rng(0).integers(0, 256, (n, 6, 5, 3), dtype=np.uint8)
    np.savez(path, images=images, labels=np.arange(n) % 3)
    return path


def splits(directory: Path) -> dict[str, str]:
    """The split of each key."""
    found: dict[str, str] = {}
    for path in directory.glob("*.tar"):
        with tarfile.open(path) as tar:
            found |= dict.fromkeys((name.split(".")[0] for name in tar.getnames()), path.name.split("-")[0])
    return found


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """A folder of 40 pictures, and some that cannot be read."""
    for index in range(40):
        path = tmp_path / "pictures" / "ab"[index % 2] / f"{index}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (4, 4 + index), (index, 0, 255)).save(path)
    return tmp_path / "pictures"


def test_same_source_same_bytes(tmp_path: Path, pictures: Path) -> None:
    for name in ("x", "y"):
        shard(pictures, tmp_path / name, samples_per_shard=9)
    files = sorted(path.name for path in (tmp_path / "x").iterdir())
    assert len(files) >= 5
    for file in files:
        assert (tmp_path / "x" / file).read_bytes() == (tmp_path / "y" / file).read_bytes()


def test_any_webdataset_reader_opens_them(tmp_path: Path, webdataset_samples: Reader) -> None:
    source = npz(tmp_path / "a.npz", 50)
    manifest = shard(source, tmp_path / "shards", samples_per_shard=20)
    images, labels = (np.load(source)[name] for name in ("images", "labels"))
    seen = []
    for split in SPLITS:
        tars = manifest.splits[split].shards
        assert [tar.samples for tar in tars[:-1]] == [20] * (len(tars) - 1)
        paths = [str(tmp_path / "shards" / tar.name) for tar in tars]
        samples = webdataset_samples(paths)
        assert len(samples) == manifest.splits[split].samples
        for sample in samples:
            index = int(sample["__key__"])
            np.testing.assert_array_equal(np.asarray(sample["png"]), images[index])
            assert sample["json"] == {
                "label": int(labels[index]), "class": str(labels[index]), "source": f"a.npz[{index}]",
                "size": [5, 6], "mode": "RGB",
            }  # fmt: skip
            seen.append(index)
    assert sorted(seen) == list(range(50))


def test_manifest_says_what_is_there(tmp_path: Path) -> None:
    source = npz(tmp_path / "a.npz", 60)
    manifest = shard(source, tmp_path / "shards")
    assert Manifest.read(tmp_path / "shards" / MANIFEST) == manifest
    for contents in manifest.splits.values():
        for tar in contents.shards:
            path = tmp_path / "shards" / tar.name
            assert (tar.bytes, tar.sha256) == (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
    pixels = np.load(source)["images"].reshape(-1, 3) / 255
    assert manifest.statistics.keys() == {"RGB"}
    assert manifest.statistics["RGB"].images == 60
    np.testing.assert_allclose(manifest.statistics["RGB"].mean, pixels.mean(axis=0), atol=1e-8)
    np.testing.assert_allclose(manifest.statistics["RGB"].std, pixels.std(axis=0), atol=1e-8)
    assert manifest.smallest == manifest.largest == (5, 6)
    assert manifest.classes == ("0", "1", "2")


def test_sizes_and_modes_are_counted(tmp_path: Path, pictures: Path) -> None:
    Image.new("L", (90, 2), 255).save(pictures / "a" / "grey.png")
    manifest = shard(pictures, tmp_path / "shards")
    assert (manifest.smallest, manifest.largest) == ((4, 2), (90, 43))
    assert {mode: statistics.images for mode, statistics in manifest.statistics.items()} == {"L": 1, "RGB": 40}
    assert manifest.statistics["L"].mean == (1.0,)
    assert manifest.statistics["L"].std == (0.0,)


def test_new_images_move_no_old_ones(tmp_path: Path, pictures: Path) -> None:
    shard(pictures, tmp_path / "before")
    for index in range(30):
        Image.new("L", (3, 3), index).save(pictures / "a" / f"0{index}.bmp")
    shard(pictures, tmp_path / "after")
    before, after = splits(tmp_path / "before"), splits(tmp_path / "after")
    assert set(before.values()) == set(SPLITS)
    assert before.items() <= after.items()
    assert len(after) == 70


def test_split_shares_are_as_asked(tmp_path: Path) -> None:
    manifest = shard(npz(tmp_path / "a.npz", 2000), tmp_path / "shards", fractions=Fractions(0.1, 0.3))
    assert abs(manifest.splits["val"].samples / 2000 - 0.1) < 0.03
    assert abs(manifest.splits["test"].samples / 2000 - 0.3) < 0.04


def test_own_test_split_is_kept_and_val_is_taken_from_train(tmp_path: Path) -> None:
    for part, n in (("train", 40), ("test", 7)):
        for index in range(n):
            path = tmp_path / "source" / part / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("L", (3, 3), index + (200 if part == "test" else 0)).save(path)
    manifest = shard(tmp_path / "source", tmp_path / "shards", fractions=Fractions(0.2, 0.5))
    assert manifest.splits["test"].samples == 7
    assert manifest.splits["val"].samples + manifest.splits["train"].samples == 40
    assert 1 <= manifest.splits["val"].samples <= 16
    assert {split for key, split in splits(tmp_path / "shards").items() if key.startswith("test-")} == {"test"}


def bomb() -> bytes:
    """A tiny PNG file that claims to be 60000 x 60000."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", 60000, 60000, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def test_damaged_images_are_listed_with_their_reason(tmp_path: Path, pictures: Path) -> None:
    whole = (pictures / "a" / "38.png").read_bytes()
    (pictures / "a" / "cut.png").write_bytes(whole[:60])
    (pictures / "a" / "notes.txt").write_text("no image")
    (pictures / "b" / "bomb").write_bytes(bomb())
    (pictures / "b" / "bomb.png").write_bytes(bomb())
    Image.new("F", (3, 3)).save(pictures / "b" / "float.tif")
    manifest = shard(pictures, tmp_path / "shards")
    reasons = {rejected.file: rejected.reason for rejected in manifest.rejected}
    assert list(reasons) == ["a/cut.png", "a/notes.txt", "b/bomb", "b/bomb.png", "b/float.tif"]
    assert "truncated" in reasons["a/cut.png"] or "broken" in reasons["a/cut.png"]
    assert reasons["a/notes.txt"] == "not an image by its name or content"
    assert reasons["b/bomb"].startswith("3600000000 pixels, more than shard.max_pixels (89478485); increase")
    assert reasons["b/bomb"] == reasons["b/bomb.png"]
    assert "32 bits" in reasons["b/float.tif"]
    assert sum(contents.samples for contents in manifest.splits.values()) == 40


@pytest.mark.parametrize(
    ("name", "target", "reason"),
    [
        ("a/bad.png", "/proc/self/mem", "Input/output error"),
        ("a/bad", "/proc/self/mem", "Input/output error"),
        ("c/bad", "/proc/self/mem", "Input/output error"),
        ("a/gone.png", "nowhere", "No such file or directory"),
        ("c/gone.png", "nowhere", "No such file or directory"),
        ("c/gone", "nowhere", "No such file or directory"),
        ("b/itself.png", "itself.png", "Too many levels of symbolic links"),
    ],
)
def test_what_the_system_cannot_read_ends_the_stage(
    tmp_path: Path, pictures: Path, name: str, target: str, reason: str
) -> None:
    """Otherwise images, or a whole class, would be missing until the disk is mounted again."""
    (pictures / "c").mkdir()
    (pictures / name).symlink_to(target)
    with pytest.raises(UserError) as caught:
        shard(pictures, tmp_path / "shards")
    assert str(caught.value) == f"{pictures / name}: cannot be read ({reason})"


def test_no_usable_image_is_an_error(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source" / "bomb.png").write_bytes(bomb())
    Image.new("F", (3, 3)).save(tmp_path / "source" / "float.tif")
    with pytest.raises(UserError, match=r"name: 2 images, of which none can be used; the first: bomb\.png: "):
        shard(tmp_path / "source", tmp_path / "shards")


@pytest.mark.parametrize(
    ("images", "fractions", "message"),
    [
        (
            9,
            (0.001, 0.5),
            "split val; increase shard.val_fraction, or add images",
        ),
        (
            9,
            (0.5, 0.001),
            "split test; increase shard.test_fraction, or add images",
        ),
        (
            9,
            (0.5, 0.499),
            "split train; decrease shard.val_fraction or shard.test_fraction",
        ),
    ],
)
def test_an_empty_split_is_an_error(tmp_path: Path, images: int, fractions: tuple[float, float], message: str) -> None:
    with pytest.raises(TooFewImages, match=f"^name: {counted(images, 'image')}, of which none fell into the {message}"):
        shard(npz(tmp_path / "a.npz", images), tmp_path / "shards", fractions=Fractions(*fractions))


@pytest.mark.parametrize(("images", "counted"), [(1, "1 image"), (2, "2 images")])
def test_fewer_images_than_splits_are_an_error(tmp_path: Path, images: int, counted: str) -> None:
    with pytest.raises(TooFewImages, match=f"^name: only {counted}; add some, since train, val and test need at least"):
        shard(npz(tmp_path / "a.npz", images), tmp_path / "shards")


def test_an_own_split_without_a_usable_image_is_an_error(tmp_path: Path, pictures: Path) -> None:
    (pictures / "a").rename(pictures / "train")
    (pictures / "b").rename(pictures / "val")
    for path in (pictures / "val").iterdir():
        path.write_bytes(b"")
    with pytest.raises(TooFewImages, match=r"^name: no image of the source's split val \(val/\) can be used$"):
        shard(pictures, tmp_path / "shards")


def test_random_access(tmp_path: Path, webdataset_samples: Reader) -> None:
    manifest = shard(npz(tmp_path / "a.npz", 50), tmp_path / "shards", samples_per_shard=7)
    images = Images(tmp_path / "shards", manifest.splits["train"])
    paths = [str(tmp_path / "shards" / tar.name) for tar in manifest.splits["train"].shards]
    expected = webdataset_samples(paths)
    assert len(images) == len(expected)
    for index in reversed(range(len(images))):
        image, label = images[index]
        assert image.tobytes() == expected[index]["png"].tobytes()
        assert label == expected[index]["json"]["label"]


def test_damaged_shards_are_named(tmp_path: Path) -> None:
    manifest = shard(npz(tmp_path / "a.npz", 50), tmp_path / "shards")
    path = tmp_path / "shards" / "train-000000.tar"
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(
        UserError, match=r"train-000000\.tar: damaged \(it does not match its digest in manifest\.json\)"
    ):
        Images(tmp_path / "shards", manifest.splits["train"])
    path.unlink()
    with pytest.raises(UserError, match=r"train-000000\.tar: cannot be read "):
        Images(tmp_path / "shards", manifest.splits["train"])
    (tmp_path / "shards" / "manifest.json").write_text(json.dumps({"old": 1}))
    with pytest.raises(UserError, match=r"manifest\.json: damaged \(it does not match its digest in SHA256SUMS\)"):
        Manifest.read(tmp_path / "shards" / MANIFEST)
    write_sums(tmp_path / "shards")
    with pytest.raises(UserError, match=r"manifest\.json: not in format 1, .*: source: missing; "):
        Manifest.read(tmp_path / "shards" / MANIFEST)
    (tmp_path / "shards" / "SHA256SUMS").unlink()
    with pytest.raises(UserError, match=r"SHA256SUMS: No such file .* \(written by an earlier version\)$"):
        Manifest.read(tmp_path / "shards" / MANIFEST)


def test_members_carry_no_trace_of_the_machine(tmp_path: Path) -> None:
    shard(npz(tmp_path / "a.npz", 50), tmp_path / "shards")
    with tarfile.open(tmp_path / "shards" / "train-000000.tar") as tar:
        assert {(m.mtime, m.uid, m.gid, m.uname, m.gname, m.mode) for m in tar} == {(0, 0, 0, "", "", 0o644)}
        assert tar.getnames() == sorted(tar.getnames())
    assert len(sha256(tmp_path / "shards" / "manifest.json")) == 64


def test_a_manifest_states_its_format(tmp_path: Path) -> None:
    directory = tmp_path / "shards"
    manifest = shard(npz(tmp_path / "a.npz", 50), directory)
    content = json.loads((directory / MANIFEST).read_bytes())
    assert content.pop("format") == 1
    (directory / MANIFEST).write_text(json.dumps(content))  # as written before manifests stated it
    write_sums(directory)
    assert Manifest.read(directory / MANIFEST) == manifest
    (directory / MANIFEST).write_text(json.dumps(content | {"format": 2}))
    write_sums(directory)
    with pytest.raises(
        UserError,
        match=r"manifest\.json: not in format 1, .*: format: input should be 1 \(got 2\)$",
    ):
        Manifest.read(directory / MANIFEST)


@pytest.mark.parametrize(
    ("smallest", "largest", "right"),
    [
        ((8, 6), (8, 6), "8x6"),
        ((1, 1), (4000, 4000), "1 to 4000 wide and 1 to 4000 high"),  # of 4000x1 and 1x4000; none has 4000x4000
        ((320, 240), (640, 240), "320 to 640 wide and 240 high"),
        ((320, 240), (320, 480), "320 wide and 240 to 480 high"),
    ],
)
def test_sizes_are_described_by_axis(smallest: tuple[int, int], largest: tuple[int, int], right: str) -> None:
    assert describe_sizes(smallest, largest) == right


def test_one_of_a_kind_is_described_in_the_singular() -> None:
    assert describe_classes((), (), 1) == "no classes, 1 image"
    assert describe_classes((), (), 2) == "no classes, 2 images"
    assert describe_classes(("cat",), (1,), 2) == "1 class: cat 1; 1 image without a class"
    assert describe_classes(("cat", "dog"), (1, 3), 6) == "2 classes: cat 1, dog 3; 2 images without a class"
