"""Tables of labels beside images."""

import json
from pathlib import Path

import pytest
from PIL import Image

from diffusion.errors import UserError
from diffusion.sources.reading import Reading
from diffusion.sources.sources import open_source

CSV = "file_name,label\n1.png,dog\nsub/2.png,cat\n3.png,\n"
ROWS = [("1.png", "dog"), ("sub/2.png", "cat"), ("3.png", None)]
TABLES = {
    "metadata.csv": CSV,
    "labels.csv": f"\ufefffilename,x,class\r\n1.png,,dog\r\n./sub/2.png,,cat\r\n3.png,,\r\n",  # noqa: F541
    "metadata.jsonl": "\n".join(json.dumps({"file_name": name, "label": label, "text": "a"}) for name, label in ROWS),
    "dataset.json": json.dumps({"labels": ROWS}),
}


def pictures(folder: Path, *names: str) -> Path:
    for number, name in enumerate(names):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (4, 4), number).save(folder / name)
    return folder


def labelled(folder: Path) -> dict[str, str | None]:
    source = open_source(folder)
    return {
        sample.file: sample.rejected or (None if sample.label is None else source.classes[sample.label])
        for sample in source
    }


@pytest.mark.parametrize("name", TABLES)
def test_a_table_states_the_classes(tmp_path: Path, name: str) -> None:
    pictures(tmp_path, "1.png", "sub/2.png", "3.png", "4.png")
    (tmp_path / name).write_text(TABLES[name], encoding="utf-8", newline="")
    assert labelled(tmp_path) == {"1.png": "dog", "3.png": None, "4.png": None, "sub/2.png": "cat"}
    assert open_source(tmp_path).classes == ("cat", "dog")


def test_integer_labels_are_in_numerical_order(tmp_path: Path) -> None:
    names = [f"{number}.png" for number in range(12)]
    pictures(tmp_path, *names)
    (tmp_path / "dataset.json").write_text(json.dumps({"labels": [[name, 11 - i] for i, name in enumerate(names)]}))
    source = open_source(tmp_path)
    assert source.classes == tuple(map(str, range(12)))
    assert {sample.file: sample.label for sample in source}["1.png"] == 10


def test_each_split_may_have_its_table(tmp_path: Path) -> None:
    pictures(tmp_path, "train/a.png", "train/b.png", "test/a.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\na.png,x\nb.png,y\n")
    (tmp_path / "test" / "metadata.csv").write_text("file_name,label\na.png,y\n")
    assert labelled(tmp_path) == {"test/a.png": "y", "train/a.png": "x", "train/b.png": "y"}
    assert open_source(tmp_path).own_splits == {"train": "train/", "test": "test/"}


def test_files_that_are_not_there_are_reported(tmp_path: Path) -> None:
    pictures(tmp_path, "1.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\n1.png,a\n2.png,b\n../3.png,b\n")
    missing = "in the table of labels, but there is no such file"
    assert labelled(tmp_path) == {"1.png": "a", "2.png": missing, "../3.png": missing}


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,text\n1.png,a cat\n"),
        ("metadata.csv", "file_name,label\ncat/1.png,\ndog/2.png,\n"),
        ("labels.csv", "ClassId,Name\n0,cat\n"),
        ("labels.csv", "id,breed\n1,poodle\n"),
        ("dataset.json", '{"labels": null}'),
        ("dataset.json", '{"labels": 3}'),
        ("dataset.json", '{"labels": {"background": 0, "tumour": 1}}'),
        ("dataset.json", '{"labels": ["cat", "dog"]}'),
        ("dataset.json", "{}"),
        ("dataset.json", "[]"),
    ],
)
def test_a_table_without_labels_leaves_the_folders_names(tmp_path: Path, name: str, text: str) -> None:
    pictures(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / name).write_text(text)
    assert labelled(tmp_path) == {
        "cat/1.png": "cat", "dog/2.png": "dog", name: "not an image by its name or content",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("metadata.csv", "file_name,label\n1.png,a\n1.png,b\n", "line 3: 1.png has the labels a and b"),
        ("metadata.csv", "file_name,label\n1.png,a,b\n", "line 2: expected an object, or as many values"),
        ("metadata.csv", "file_name,label\n,a\n", "line 2: no file_name"),
        ("metadata.csv", "file_name,label\n./,a\n", "line 2: './' is not a file"),
        ("metadata.csv", "file_name,label\n/,a\n", "line 2: '/' is not a file"),
        ("metadata.csv", 'file_name,label\n"1.png,a\n', "line 2: unexpected end of data"),
        ("metadata.jsonl", '{"file_name": "1.png", "label": "a"}\n{"file_name', "line 2: not valid JSON"),
        ("metadata.jsonl", "3\n", "line 1: expected an object"),
        ("metadata.jsonl", '{"file_name": 3, "label": 1}', "line 1: no file_name"),
        (
            "metadata.jsonl",
            '{"file_name": "1.png", "label": 1.5}',
            "line 1: a label must be text or an",
        ),
        (
            "metadata.jsonl",
            '{"file_name": "1.png", "label": true}',
            "line 1: a label must be text or an",
        ),
        ("dataset.json", "[", "not valid JSON"),
        ("dataset.json", '{"labels": [["1.png"]]}', "labels[0]: must be a file and its label (got ['1.png'])"),
        ("dataset.json", '{"labels": [["1.png", [1]]]}', "labels[0]: a label must be text or an integer (got [1])"),
    ],
)
def test_a_wrong_table_gets_one_line(tmp_path: Path, name: str, text: str, message: str) -> None:
    pictures(tmp_path, "1.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError) as caught:
        open_source(tmp_path)
    assert str(caught.value).startswith(f"{tmp_path / name}, {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["", "images", "images/set"])
def test_a_table_above_or_beside_the_images_counts(tmp_path: Path, place: str) -> None:
    pictures(tmp_path, "images/set/a/1.png", "images/set/b/2.png")
    inside = str(Path("images/set").relative_to(place or "."))
    (tmp_path / place / "metadata.csv").write_text(f"File_Name,Label\n{inside}/a/1.png,x\n{inside}/b/../b/2.png,y\n")
    assert set(labelled(tmp_path).values()) == {"x", "y"}


def test_a_table_of_some_images_in_folders_is_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "train/cat/1.png", "test/cat/2.png")
    (tmp_path / "train" / "metadata.csv").write_text("file_name,label\ncat/1.png,x\n")
    with pytest.raises(UserError, match=r"labels 1 image, but not test/cat/2.png, whose folder could be its class"):
        open_source(tmp_path)


def test_folders_named_like_splits_need_confirmation_with_a_table_too(tmp_path: Path) -> None:
    pictures(tmp_path, "seg_train/1.png", "seg_test/2.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\nseg_train/1.png,x\nseg_test/2.png,y\n")
    with pytest.raises(UserError, match="named like a split"):
        open_source(tmp_path)
    assert open_source(tmp_path, Reading(split_names_as_classes=True)).classes == ("x", "y")


@pytest.mark.parametrize(
    ("label", "right"),
    [
        ("3.0", "3"),
        ("NaN", None),
        ('"\\ud83d"', "\\ud83d"),
        (f'"{"9" * 5000}"', "9" * 5000),
        ('"a\u2028b"', "a\u2028b"),
    ],
)
def test_odd_labels(tmp_path: Path, label: str, right: str | None) -> None:
    pictures(tmp_path, "1.png", "2.png")
    (tmp_path / "metadata.jsonl").write_text(
        f'{{"file_name": "1.png", "label": {label}}}\n{{"file_name": "2.png", "label": "z"}}', encoding="utf-8"
    )
    assert labelled(tmp_path) == {"1.png": right, "2.png": "z"}


def test_decomposed_names_of_macos_are_found(tmp_path: Path) -> None:
    pictures(tmp_path, "cafe\u0301.png")
    (tmp_path / "metadata.csv").write_text("file_name,label\ncaf\u00e9.png,x\n", encoding="utf-8")
    assert set(labelled(tmp_path).values()) == {"x"}


def test_two_tables_in_one_place_are_refused(tmp_path: Path) -> None:
    pictures(tmp_path, "1.png")
    for name in ("metadata.csv", "labels.csv"):
        (tmp_path / name).write_text(CSV)
    with pytest.raises(UserError, match=r"metadata.csv: labels.csv states labels, too; keep one of them"):
        open_source(tmp_path)


def test_a_table_that_is_no_text_gets_one_line(tmp_path: Path) -> None:
    pictures(tmp_path, "1.png")
    (tmp_path / "metadata.csv").write_bytes("file_name,label\n1.png,ä\n".encode("utf-16"))
    with pytest.raises(UserError, match=r"metadata.csv: not UTF-8 text \(byte 0\); save it as UTF-8"):
        open_source(tmp_path)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.csv", "file_name,label\n1,x\n2,y\n"),  # names without their ending
        ("labels.csv", "image,class\n1,x\n"),
        ("dataset.json", '{"labels": [["1", 6]]}'),
    ],
)
def test_labels_of_other_files_are_not_ignored(tmp_path: Path, name: str, text: str) -> None:
    pictures(tmp_path, "cat/1.png", "dog/2.png")
    (tmp_path / name).write_text(text)
    with pytest.raises(UserError, match=rf"{name}: names only files that are not there, such as 1; correct the names"):
        open_source(tmp_path)
