"""Parquet files in the form of Hugging Face's `datasets`, written here with pyarrow alone."""

import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from diffusion.errors import UserError
from diffusion.sources.parquet import Parquet
from diffusion.sources.sources import open_source

PIXELS = np.random.default_rng(0).integers(0, 256, (200, 3, 4, 3), dtype=np.uint8)
NAMES = ["cat", "dog", "eel"]


def png(number: int) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(PIXELS[number]).save(buffer, "PNG")
    return buffer.getvalue()


def save(path: Path, numbers: range, labels: list[Any], names: list[str] | None = NAMES, **columns: list[Any]) -> Path:
    """Images as `datasets` writes them, in row groups of 50."""
    images = pa.array(
        [{"bytes": png(number), "path": f"{number}.png"} for number in numbers],
        pa.struct([("bytes", pa.binary()), ("path", pa.string())]),
    )
    table = pa.table({"image": images, "label": pa.array(labels), **columns})
    features = {"image": {"_type": "Image"}, "label": {"names": names, "_type": "ClassLabel"} if names else {}}
    metadata = {"huggingface": json.dumps({"info": {"features": features}})}
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table.replace_schema_metadata(metadata), path, row_group_size=50)
    return path


def test_one_file(tmp_path: Path) -> None:
    source = open_source(save(tmp_path / "pictures.parquet", range(120), [number % 3 for number in range(120)]))
    assert isinstance(source, Parquet)
    assert (len(source), source.classes, source.own_splits) == (120, ("cat", "dog", "eel"), {})
    samples = list(source)
    assert [sample.label for sample in samples] == [number % 3 for number in range(120)]
    assert samples[77].file == "pictures.parquet[77]"
    assert len({sample.key for sample in samples}) == 120
    (tmp_path / "pictures.parquet").rename(tmp_path / "train-00000-of-00001.PARQUET")
    renamed = open_source(tmp_path / "train-00000-of-00001.PARQUET")
    assert renamed.own_splits == {}
    assert [sample.key for sample in renamed] == [sample.key for sample in samples]
    np.testing.assert_array_equal(np.stack([np.asarray(each.decode().image) for each in samples]), PIXELS[:120])


def test_files_of_splits(tmp_path: Path) -> None:
    save(tmp_path / "set" / "data" / "train-00001-of-00002.parquet", range(5, 8), [0, 1, 2])
    save(tmp_path / "set" / "data" / "train-00000-of-00002.parquet", range(5), [0] * 5)
    save(tmp_path / "set" / "data" / "test-00000-of-00001-0123456789abcdef.parquet", range(8, 10), [1, -1])
    (tmp_path / "set" / "README.md").write_text("a data set card")
    source = open_source(tmp_path / "set")
    assert source.own_splits == {
        "train": "data/train-00000-of-00002.parquet and data/train-00001-of-00002.parquet",
        "test": "data/test-00000-of-00001-0123456789abcdef.parquet",
    }
    samples = list(source)
    assert [(sample.split, sample.label) for sample in samples] == [
        ("test", 1), ("test", None), *[("train", 0)] * 6, ("train", 1), ("train", 2)
    ]  # fmt: skip
    assert len({sample.key for sample in samples}) == len(source) == 10
    np.testing.assert_array_equal(np.asarray(samples[0].decode().image), PIXELS[8])
    (tmp_path / "set" / "data").rename(tmp_path / "set" / "renamed")
    assert [sample.label for sample in open_source(tmp_path / "set")] == [sample.label for sample in samples]


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["train/0.parquet", "test/0.parquet", "extra/0.parquet"], "extra/0.parquet: its name states no split, unlike"),
        (["train-test.parquet", "train.parquet"], "train-test.parquet: its name states several splits"),
        (["train.parquet", "other.zip"], "set: contains Parquet files and archives (other.zip); keep one kind"),
    ],
)
def test_names_that_leave_splits_open_are_refused(tmp_path: Path, names: list[str], message: str) -> None:
    for name in names:
        save(tmp_path / "set" / name, range(2), [0, 1])
    with pytest.raises(UserError) as caught:
        open_source(tmp_path / "set")
    assert message in str(caught.value)


def test_folders_of_splits(tmp_path: Path) -> None:
    for number, name in enumerate(("default/train/0000.parquet", "default/test/0000.parquet")):
        save(tmp_path / name, range(number, number + 1), [0])
    assert [sample.split for sample in open_source(tmp_path)] == ["test", "train"]


def test_files_with_other_classes_are_refused(tmp_path: Path) -> None:
    save(tmp_path / "a.parquet", range(2), [0, 1], ["cat", "dog"])
    save(tmp_path / "b.parquet", range(2), [0, 1], ["dog", "cat"])
    with pytest.raises(UserError, match=r"b.parquet: column label has other classes, or another type, than a.parquet"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("labels", "classes", "right"),
    [
        (["b", "a", None, "b"], ("a", "b"), [1, 0, None, 1]),
        ([10, 9, None, -1], ("9", "10"), [1, 0, None, None]),
        ([10.0, 9.0, None, float("nan")], ("9", "10"), [1, 0, None, None]),
    ],
)
def test_labels_without_names(tmp_path: Path, labels: list[Any], classes: tuple[str, ...], right: list[Any]) -> None:
    source = open_source(save(tmp_path / "a.parquet", range(4), labels, names=None))
    assert source.classes == classes
    assert [sample.label for sample in source] == right


def test_bytes_alone_and_no_labels(tmp_path: Path) -> None:
    table = pa.table({"picture": pa.array([png(0), b"no image"], pa.large_binary()), "text": ["a", "b"]})
    parquet.write_table(table, tmp_path / "a.parquet")
    first, second = open_source(tmp_path / "a.parquet")
    np.testing.assert_array_equal(np.asarray(first.decode().image), PIXELS[0])
    assert first.label is None
    with pytest.raises(Exception, match="not an image, or of a kind that Pillow cannot read"):
        second.decode()


def test_an_image_of_which_only_the_path_is_there_is_rejected(tmp_path: Path) -> None:
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    images = pa.array([{"bytes": None, "path": "/etc/a.png"}, None, {"bytes": png(0), "path": None}], kind)
    parquet.write_table(pa.table({"image": images}), tmp_path / "a.parquet")
    assert [sample.rejected for sample in open_source(tmp_path / "a.parquet")] == [
        "its bytes are not in the file, only its path; save the data set with its images",
        "its row has no image",
        None,
    ]


def test_a_file_without_rows_is_refused(tmp_path: Path) -> None:
    parquet.write_table(pa.table({"image": pa.array([], pa.binary())}), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a\.parquet: contains no images$"):
        open_source(tmp_path / "a.parquet")


def test_what_cannot_be_used_gets_one_line(tmp_path: Path) -> None:
    def message(path: Path) -> str:
        with pytest.raises(UserError) as caught:
            list(open_source(path))
        assert "\n" not in str(caught.value)
        return str(caught.value).removeprefix(f"{tmp_path}/")

    (tmp_path / "a.parquet").write_bytes(b"no Parquet file")
    assert message(tmp_path / "a.parquet").startswith("a.parquet: not a readable Parquet file (")
    parquet.write_table(pa.table({"text": ["a"]}), tmp_path / "b.parquet")
    assert message(tmp_path / "b.parquet") == "b.parquet: has no column with the bytes of images (found: text)"
    parquet.write_table(pa.table({"x": [b"a"], "y": [b"b"]}), tmp_path / "c.parquet")
    assert message(tmp_path / "c.parquet").startswith("c.parquet: several columns may hold images: x, y; name one")
    save(tmp_path / "d.parquet", range(2), [0, 3])
    assert message(tmp_path / "d.parquet") == "d.parquet: row 1: no class has the label 3"
    save(tmp_path / "e.parquet", range(2), [[1], [2]], names=None)
    assert message(tmp_path / "e.parquet").startswith("e.parquet: column label: must be integers or text (got")
    save(tmp_path / "set" / "train.parquet", range(2), [0, 1])
    parquet.write_table(pa.table({"picture": [png(0)], "label": [0]}), tmp_path / "set" / "test.parquet")
    assert message(tmp_path / "set") == "set/train.parquet: has no column picture, unlike test.parquet"
    whole = save(tmp_path / "f.parquet", range(120), [0] * 120).read_bytes()
    (tmp_path / "f.parquet").write_bytes(whole[:4] + bytes(100) + whole[104:])
    assert message(tmp_path / "f.parquet").startswith("f.parquet: damaged (")
