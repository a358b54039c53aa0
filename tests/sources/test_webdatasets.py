"""Shards in WebDataset format, written by webdataset itself."""

import io
import resource
import tarfile
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image
from webdataset.tariterators import group_by_keys, tar_file_expander

from diffusion.errors import UserError
from diffusion.sources import trees
from diffusion.sources.folders import Folder
from diffusion.sources.images import Unreadable
from diffusion.sources.sources import open_source
from diffusion.sources.webdatasets import WebDataset
from tests.fuzz import IMAGES

PIXELS = np.random.default_rng(0).integers(0, 256, (40, 3, 4, 3), dtype=np.uint8)


def save(path: Path, samples: list[dict[str, Any]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with webdataset.TarWriter(str(path)) as writer:
        for sample in samples:
            writer.write(sample)
    return path


def samples(numbers: range, **members: Any) -> list[dict[str, Any]]:
    return [
        {"__key__": f"{number:05}", "png": Image.fromarray(PIXELS[number])}
        | {name: make(number) for name, make in members.items()}
        for number in numbers
    ]


@pytest.mark.parametrize(
    ("members", "classes"),
    [
        ({"cls": lambda number: number % 11}, tuple(map(str, range(11)))),
        ({"json": lambda number: {"label": number % 11, "size": [3, 4]}}, tuple(map(str, range(11)))),
        ({"json": lambda _: {"label": 0, "class": "cat"}}, ("cat",)),
    ],
)
def test_one_shard(tmp_path: Path, members: dict[str, Any], classes: tuple[str, ...]) -> None:
    source = open_source(save(tmp_path / "a.tar", samples(range(30), **members)))
    assert isinstance(source, WebDataset)
    assert source.classes == classes
    found = list(source)
    assert len(found) == len(source) == 30
    np.testing.assert_array_equal(np.stack([np.asarray(sample.decode().image) for sample in found]), PIXELS[:30])
    if len(classes) == 11:
        assert [sample.label for sample in found] == [number % 11 for number in range(30)]
    assert found[3].file == "a.tar: 00003.png"
    assert len({sample.key for sample in found}) == 30


def test_a_folder_of_shards_has_their_splits(tmp_path: Path) -> None:
    save(tmp_path / "set" / "train-000001.tar", samples(range(5, 9), cls=lambda _: "b"))
    save(tmp_path / "set" / "train-000000.tar", samples(range(5), cls=lambda _: "a"))
    save(tmp_path / "set" / "val-000000.tar", samples(range(9, 10)))
    save(tmp_path / "set" / "test-000000.tar.gz", samples(range(10, 12), cls=lambda _: "b"))
    (tmp_path / "set" / "manifest.json").write_text("{}")
    source = open_source(tmp_path / "set")
    assert source.own_splits == {
        "train": "train-000000.tar and train-000001.tar", "val": "val-000000.tar", "test": "test-000000.tar.gz",
    }  # fmt: skip
    assert source.classes == ("a", "b")
    found = list(source)
    assert [(sample.split, sample.label) for sample in found] == [
        *[("test", 1)] * 2, ("val", None), *[("train", 0)] * 5, *[("train", 1)] * 4
    ]  # fmt: skip
    assert len({sample.key for sample in found}) == 12


def test_the_names_of_samples_need_little_memory(tmp_path: Path) -> None:
    """Of the open shard, tarfile keeps 2.6 kB per sample."""
    for number in range(10):
        image = Image.fromarray(PIXELS[number])
        save(
            tmp_path / "set" / f"{number:05}.tar",
            [{"__key__": f"{number:05}{index:05}", "png": image, "cls": "a"} for index in range(50)],
        )
    tracemalloc.start()
    try:
        source = open_source(tmp_path / "set")
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(list(source)) == 500
    assert kept < 130_000 + 40 * 500


def test_the_first_image_of_several_counts_and_a_sample_without_is_rejected(tmp_path: Path) -> None:
    path = save(
        tmp_path / "a.tar",
        [
            {
                "__key__": "x/1",
                "cls": 0,
                "input.png": Image.fromarray(PIXELS[1]),
                "mask.png": Image.fromarray(PIXELS[2]),
            },
            {"__key__": "x/2", "cls": 1, "txt": "no image"},
        ],
    )
    first, second = open_source(path)
    picture = first.decode()
    np.testing.assert_array_equal(np.asarray(picture.image), PIXELS[1])
    assert picture.warnings == ("the first image of its sample is used, not x/1.mask.png",)
    assert first.rejected is None
    assert (second.file, second.rejected) == ("a.tar: x/2.cls", "not an image, or of a kind that Pillow cannot read")


def test_our_own_shards_are_a_source(pairs_tree: Path) -> None:
    source = open_source(pairs_tree / "data" / "shards")
    assert isinstance(source, WebDataset)
    assert source.own_splits.keys() == {"train", "val", "test"}
    assert source.classes == tuple(map(str, range(10)))


@pytest.mark.parametrize(
    "others",
    [
        {},
        {"dataset.json": b'{"labels": null}'},
        {"cat/metadata.json": b'{"label": "x"}'},
        {"cat/00000.json": b'{"shapes": [], "label": null}'},
        {"info.json": b'{"label": ["x"]}', "cat/tsconfig.json": b"{ // comment"},
    ],
)
def test_a_tar_file_without_labels_of_samples_is_a_folder(tmp_path: Path, others: dict[str, bytes]) -> None:
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for name, content in ({"cat/00000.png": IMAGES["png"], "dog/00001.png": IMAGES["png"]} | others).items():
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    source = open_source(tmp_path / "a.tar")
    assert isinstance(source, Folder)
    assert source.classes == ("cat", "dog")
    (tmp_path / "set").mkdir()
    (tmp_path / "a.tar").rename(tmp_path / "set" / "a.tar")
    with pytest.raises(UserError, match=r"set: its tar files contain folders, but no labels"):
        open_source(tmp_path / "set")


@pytest.mark.parametrize("wrong", [b"{", b"\xff", b"[" * 100000])
def test_a_sample_whose_label_cannot_be_read_is_rejected(tmp_path: Path, wrong: bytes) -> None:
    path = save(tmp_path / "a.tar", samples(range(2), json=lambda number: wrong if number else {"label": 5}))
    first, second = open_source(path)
    assert (first.label, first.rejected) == (0, None)
    assert second.rejected is not None
    assert second.rejected.startswith("its label cannot be read (")


def test_keys_differ_where_names_do(tmp_path: Path) -> None:
    image = Image.fromarray(PIXELS[0])
    keys = ["a/b", "a-b", "\u732b", "\u72ac", "x" * 90]
    for shard in ("0.tar", "1.tar"):
        save(tmp_path / "set" / shard, [{"__key__": key, "png": image, "cls": 1} for key in keys])
    found = {sample.key for sample in open_source(tmp_path / "set")}
    assert len(found) == 10
    assert max(map(len, found)) < 80


def save_members(path: Path, *names: str) -> bytes:
    """Write a tar file; members have the content that their names suggest. Returns the file."""
    with tarfile.open(path, "w") as archive:
        for name in names:
            member, content = tarfile.TarInfo(name), b"5" if name.endswith(".cls") else IMAGES["png"]
            if "link" in name:
                member.type, member.linkname, content = tarfile.SYMTYPE, "/etc/hostname", b""
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path.read_bytes()


def as_webdataset_reads(path: Path) -> list[dict[str, Any]]:
    with path.open("rb") as stream:  # its WebDataset leaves files open
        return list(group_by_keys(tar_file_expander([{"url": path.name, "stream": stream}])))


def test_well_formed_shards_are_read_as_webdataset_reads_them(tmp_path: Path) -> None:
    keys = ["b/2", "b/10", "v1.0/1", "v1.0/2", "a", "\u732b/x"]
    extensions = ("JPG", "cls", "gif", "input.cls", "txt")
    path = tmp_path / "a.tar"
    with tarfile.open(path, "w") as archive:
        for number, key in enumerate(keys):
            for extension in extensions:
                content = IMAGES.get(extension.lower(), f"{number}{extension}".removesuffix("cls").encode())
                member = tarfile.TarInfo(f"{key}.{extension}")
                member.size = len(content)
                archive.addfile(member, io.BytesIO(content))
    theirs = as_webdataset_reads(path)
    source = open_source(path)
    assert [sample["__key__"] for sample in theirs] == keys
    assert [sample.file for sample in source] == [f"a.tar: {sample['__key__']}.JPG" for sample in theirs]
    assert [source.classes[sample.label or 0] for sample in source] == [each["cls"].decode() for each in theirs]
    for ours, each in zip(source, theirs, strict=True):
        with Image.open(io.BytesIO(each["jpg"])) as image:
            assert ours.decode().image.size == image.size[::-1]  # its EXIF data turn it


@pytest.mark.parametrize(
    ("names", "reasons"),
    [
        (("0.png", "link.png"), [None, "a link or device in an archive; only regular files are read"]),
        (("0.png", "plain"), [None, None]),
        (("0.png", "__a__/1.png"), [None, None]),
        (("0.png", "__a__"), [None, None]),
    ],
)
def test_members_that_webdataset_drops_are_used_or_reported(
    tmp_path: Path, names: tuple[str, ...], reasons: list[str | None]
) -> None:
    save_members(tmp_path / "a.tar", *names, "0.cls")
    assert len(as_webdataset_reads(tmp_path / "a.tar")) < len(names)
    found = []
    for sample in open_source(tmp_path / "a.tar"):
        try:
            sample.decode()
            found.append(sample.rejected)
        except Unreadable as error:
            found.append(str(error))
    assert found == reasons


def test_members_that_webdataset_separates_are_one_sample(tmp_path: Path) -> None:
    save_members(tmp_path / "a.tar", "0.png", "1.png", "0.cls", "1.cls")
    assert [each["__key__"] for each in as_webdataset_reads(tmp_path / "a.tar")] == ["0", "1", "0", "1"]
    assert [(sample.file, sample.label) for sample in open_source(tmp_path / "a.tar")] == [
        ("a.tar: 0.png", 0),
        ("a.tar: 1.png", 0),
    ]


@pytest.mark.parametrize("damage", ["cut between members", "a damaged header"])
def test_damage_that_webdataset_takes_for_the_end_is_refused(tmp_path: Path, damage: str) -> None:
    path = tmp_path / "a.tar"
    content = save_members(path, "0.cls", "0.png", "1.cls", "1.png")
    second = content.index(b"1.cls")
    path.write_bytes(content[:second] + (b"" if damage.startswith("cut") else b"x" * 512 + content[second + 512 :]))
    assert [each["__key__"] for each in as_webdataset_reads(path)] == ["0"]
    with pytest.raises(UserError, match=r"a.tar: not a readable tar archive \(truncated: its end is missing\)"):
        open_source(path)


def test_a_member_too_large_for_memory_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """webdataset reads any member, since its `select_files` is given nothing but the name."""
    save_members(tmp_path / "a.tar", "0.png", "0.cls")
    monkeypatch.setattr(trees, "MAX_MEMBER_BYTES", 50)
    ((theirs,), (ours,)) = as_webdataset_reads(tmp_path / "a.tar"), open_source(tmp_path / "a.tar")
    assert theirs["png"] == IMAGES["png"]
    with pytest.raises(Unreadable, match="bytes when uncompressed, more than 50"):
        ours.decode()


def test_the_label_is_in_the_member_named_like_the_sample(tmp_path: Path) -> None:
    members = {"json": {"label": "cat"}, "meta.json": {"label": None}, "a.meta.json": {"label": "no"}}
    path = save(tmp_path / "a.tar", [{"__key__": "0", "png": Image.fromarray(PIXELS[0])} | members])
    assert open_source(path).classes == ("cat",)


def test_one_shard_is_open_at_a_time(tmp_path: Path) -> None:
    for number in range(300):
        save(tmp_path / "set" / f"{number}.tar", samples(range(1), cls=lambda _: 1))
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (len(list(Path("/proc/self/fd").iterdir())) + 100, hard))
    try:
        assert sum(1 for _ in open_source(tmp_path / "set")) == 300
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
