"""Shards in WebDataset format, written by webdataset itself."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import webdataset
from PIL import Image

from diffusion.errors import UserError
from diffusion.sources.folders import Folder
from diffusion.sources.sources import open_source
from diffusion.sources.webdatasets import WebDataset

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
        ({"json": lambda _: {"label": None}}, ()),
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
    assert (found[3].key, found[3].file) == ("a-00003", "a.tar: 00003.png")


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
    np.testing.assert_array_equal(np.asarray(first.decode().image), PIXELS[1])
    assert first.left_out is None
    assert (second.file, second.left_out) == ("a.tar: x/2.cls", "not an image, or of a kind that Pillow cannot read")


def test_our_own_shards_are_a_source(pairs_tree: Path) -> None:
    source = open_source(pairs_tree / "data" / "shards")
    assert isinstance(source, WebDataset)
    assert source.own_splits.keys() == {"train", "val", "test"}
    assert source.classes == tuple(map(str, range(10)))


def test_a_tar_file_of_images_alone_is_a_folder(tmp_path: Path) -> None:
    assert isinstance(open_source(save(tmp_path / "a.tar", samples(range(3)))), Folder)


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ({"json": lambda _: b"{"}, "00000.json: not valid JSON"),
        ({"json": lambda _: b"\xff"}, "00000.json: not UTF-8 text"),
        ({"json": lambda _: b'{"label": [1]}'}, "00000.json: a label must be text or an integer (got [1])"),
    ],
)
def test_a_wrong_label_gets_one_line(tmp_path: Path, members: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_source(save(tmp_path / "a.tar", samples(range(1), **members)))
    assert str(caught.value) == f"{tmp_path / 'a.tar'}: {message}"
