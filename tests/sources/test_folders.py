"""Folders of images: splits, classes, wrappers, links."""

import os
from collections import Counter
from pathlib import Path

import pytest
from PIL import Image

from diffusion.errors import UserError
from diffusion.sources.folders import Folder
from diffusion.sources.reading import Reading
from diffusion.sources.sources import open_source


def save(path: Path, mode: str = "RGB", size: tuple[int, int] = (6, 5)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, 100 if mode in ("L", "P") else None).save(path)


def folder(root: Path, *names: str) -> Folder:
    for name in names:
        if name.endswith((".txt", ".xml", ".csv")):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text("no image")
        else:
            save(root / name)
    source = open_source(root)
    assert isinstance(source, Folder)
    return source


def found(source: Folder) -> dict[str, tuple[str | None, str | None]]:
    """Split and class of each readable file."""
    result = {}
    for sample in source:
        sample.decode()
        result[sample.file] = (sample.split, None if sample.label is None else source.classes[sample.label])
    return result


def test_folder_with_classes(tmp_path: Path) -> None:
    for name in ["dogs/rex.png", "cats/tom.png", "cats/tom.jpg", "cats/old/tom.bmp", "stray.webp", ".hidden/x.png"]:
        save(tmp_path / name)
    (tmp_path / "empty").mkdir()
    (tmp_path / "cats" / "notes.txt").write_text("no image")
    source = open_source(tmp_path)
    assert isinstance(source, Folder)
    assert source.classes == ("cats", "dogs")
    assert source.own_splits == {}
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
    assert source.own_splits == {"train": "train/", "test": "test/"}
    assert source.classes == ("a", "b", "c")
    assert [(sample.split, sample.label) for sample in source] == [("test", 2), ("train", 0), ("train", 1)]


@pytest.mark.parametrize(
    ("train", "val", "test"),
    [
        ("train", "valid", "test"), ("train", "validation", None), ("Train", None, "Test"),
        ("TRAINING", "dev", "testing"), ("training", "Val", "Testing"), ("train", None, None),
    ],
)  # fmt: skip
def test_the_usual_names_are_splits(tmp_path: Path, train: str, val: str | None, test: str | None) -> None:
    parts = {"train": train, "val": val, "test": test}
    source = folder(tmp_path, *(f"{name}/{label}/1.png" for name in parts.values() if name for label in ("cat", "dog")))
    assert source.classes == ("cat", "dog")
    assert source.own_splits == {split: f"{name}/" for split, name in parts.items() if name}
    assert found(source) == {
        f"{name}/{label}/1.png": (split, label) for split, name in parts.items() if name for label in ("cat", "dog")
    }
    order = [sample.split for sample in source]
    assert order == sorted(order, key=["test", "val", "train"].index)


def test_two_names_of_one_split(tmp_path: Path) -> None:
    source = folder(tmp_path, "train/a/1.png", "val/a/2.png", "dev/a/3.png")
    assert source.own_splits == {"train": "train/", "val": "dev/ and val/"}
    assert Counter(split for split, _ in found(source).values()) == {"train": 1, "val": 2}


def test_other_files_and_folders_next_to_the_splits_are_ignored(tmp_path: Path) -> None:
    source = folder(
        tmp_path, "train/a/1.png", "test/a/2.png", "annotations/1.xml", "annotations/deep/2.xml", "labels.csv",
        "@eaDir/thumb.png", "__MACOSX/train/._1.png", "train/a/@eaDir/1.png", "train/notes/about.txt", ".git/x.png",
    )  # fmt: skip
    (tmp_path / "empty").mkdir()
    assert source.classes == ("a",)
    assert found(source) == {"train/a/1.png": ("train", "a"), "test/a/2.png": ("test", "a")}
    assert len(source) == 2


def test_images_outside_of_the_splits_are_refused_by_name(tmp_path: Path) -> None:
    source = folder(tmp_path, "train/a/1.png", "test/a/2.png", "sample.png", "README.txt")
    outside = [sample for sample in source if sample.split is None]
    assert [sample.file for sample in outside] == ["sample.png"]
    assert outside[0].rejected == "outside the folders of the splits"


def test_what_is_no_image_is_known_before_it_is_decoded(tmp_path: Path) -> None:
    folder(tmp_path, "a/1.png", "a/notes.txt", "a/picture.png")
    (tmp_path / "a" / "picture.png").rename(tmp_path / "a" / "picture")
    (tmp_path / "a" / "2.nef").write_bytes(b"")
    source = open_source(tmp_path)
    assert {sample.file: sample.rejected for sample in source} == {
        "a/1.png": None, "a/2.nef": "camera raw; develop it to TIFF, PNG or JPEG first",
        "a/notes.txt": "not an image by its name or content", "a/picture": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("names", "classes", "splits"),
    [
        (["set/cat/1.png", "set/dog/2.png", "readme.txt"], ("cat", "dog"), {}),
        (["a/b/set/cat/1.png", "a/b/set/dog/2.png"], ("cat", "dog"), {}),
        (["images/train/cat/1.png", "images/val/cat/2.png", "labels/1.txt"], ("cat",), {"train", "val"}),
        (["set/Train/cat/1.png", "set/Test/cat/2.png", "__MACOSX/set/1.png"], ("cat",), {"train", "test"}),
        (["train/images/cat/1.png", "train/images/dog/1.png", "test/images/cat/2.png", "test/images/dog/2.png"],
         ("cat", "dog"), {"train", "test"}),
        (["train/cat/1.png", "train/dog/2.png"], ("cat", "dog"), {"train"}),
        (["train/cat/old/1.png", "train/cat/new/1.png", "test/cat/2.png", "test/dog/3.png"],
         ("cat", "dog"), {"train", "test"}),
        (["train/1.png", "test/2.png"], (), {"train", "test"}),
        (["cat/1.png"], ("cat",), {}),
        (["set/cat/1.png", "stray.png"], ("set",), {}),
    ],
)  # fmt: skip
def test_wrapping_folders_are_seen_through(
    tmp_path: Path, names: list[str], classes: tuple[str, ...], splits: set[str]
) -> None:
    source = folder(tmp_path, *names)
    assert source.classes == classes
    assert source.own_splits.keys() == set(splits)
    images = {name for name in names if name.endswith(".png") and not name.startswith("__MACOSX")}
    assert found(source).keys() == images


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["train/1.png", "test/2.png", "masks/3.png"], "test, train"),
        (["cat/1.png", "dog/1.png", "Test/2.png"], "Test"),
        (["val/1.png", "test/2.png"], "test, val"),
        (["train2017/1.png", "val2017/2.png"], "train2017, val2017"),
        (["training_images/1.png", "test-set/2.png"], "test-set, training_images"),
        (["train/cat/1.png", "train/test/2.png", "test/cat/3.png"], "test"),
        (
            ["seg_train/seg_train/sea/1.png", "seg_test/seg_test/sea/2.png", "seg_pred/seg_pred/3.png"],
            "seg_test, seg_train",
        ),
        (
            ["trainA/1.png", "trainB/2.png", "testA/3.png", "testB/4.png"],
            "testA, testB, trainA, trainB",
        ),
        (["DIV2K_train_HR/1.png", "DIV2K_valid_HR/2.png"], "DIV2K_train_HR, DIV2K_valid_HR"),
        (["CarsTrain/1.png", "CarsTest/2.png"], "CarsTest, CarsTrain"),
        (
            ["car/1.png", "bullet-train/2.png", "freight train/3.png"],
            "bullet-train, freight train",
        ),
    ],
)
def test_a_class_named_like_a_split_must_be_confirmed(tmp_path: Path, names: list[str], named: str) -> None:
    for name in names:
        save(tmp_path / name)
    with pytest.raises(
        UserError, match=f": named like a split, but read as a class: {named}; .* --split-names-as-classes"
    ) as caught:
        open_source(tmp_path)
    assert "\n" not in str(caught.value)
    confirmed = open_source(tmp_path, Reading(split_names_as_classes=True))
    assert set(named.split(", ")) <= set(confirmed.classes)
    assert len(list(confirmed)) == len(names)


@pytest.mark.parametrize(
    ("names", "named"),
    [
        (["bottle/train/good/1.png", "bottle/test/broken/2.png", "cable/train/good/3.png", "cable/test/bent/4.png"],
         "bottle/test"),
        (["ds/train/a/1.png", "ds/test/a/2.png", "cover.png"], "ds/test"),
        (["images/train/1.png", "images/val/2.png", "masks/train/1.png", "masks/val/2.png"], "images/train"),
        (["train/cat/1.png", "train/cat/more/test_set/2.png", "test/cat/3.png"], "train/cat/more/test_set"),
        (["set/a/b/Testing/1.png", "set/b/1.png"], "set/a/b/Testing"),
    ],
)  # fmt: skip
def test_a_folder_named_like_a_split_inside_a_class_must_be_confirmed(
    tmp_path: Path, names: list[str], named: str
) -> None:
    with pytest.raises(UserError) as caught:
        folder(tmp_path, *names)
    assert str(caught.value).startswith(
        f"{tmp_path}: named like a split, but read as part of a class: {named}; if it is not a split, "
    )
    assert "--split-names-as-classes" in str(caught.value)
    assert "\n" not in str(caught.value)
    confirmed = open_source(tmp_path, Reading(split_names_as_classes=True))
    assert {sample.file for sample in confirmed} == set(names)


@pytest.mark.parametrize("name", ["freight train", "bullet-train", "unit_test", "CrashTest", "test 1"])
def test_only_exact_names_become_splits(tmp_path: Path, name: str) -> None:
    save(tmp_path / name / "1.png")
    save(tmp_path / "car" / "2.png")
    source = open_source(tmp_path, Reading(split_names_as_classes=True))
    assert (set(source.classes), source.own_splits) == ({"car", name}, {})


def test_other_names_are_no_splits(tmp_path: Path) -> None:
    names = ("bullet-trains", "contest", "development", "device", "latest", "mandeville", "protest", "test tube",
             "trainer", "training shoe", "valid passport", "valley", f"train{'1' * 100}x")  # fmt: skip
    source = folder(tmp_path, *(f"{name}/{name}/1.png" for name in names))
    assert source.classes == tuple(sorted(names))


def test_files_without_images_in_a_folder_named_like_a_split_are_no_matter(tmp_path: Path) -> None:
    assert folder(tmp_path, "cat/1.png", "cat/test/notes.txt", "dog/2.png").classes == ("cat", "dog")


def test_links_are_followed_and_loops_end(tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "deep" / "1.png")
    save(tmp_path / "elsewhere" / "2.png")
    save(tmp_path / "set" / "cat" / "3.png")
    (tmp_path / "set" / "dog").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "set" / "cat" / "4.png").symlink_to(tmp_path / "set" / "cat" / "3.png")
    (tmp_path / "set" / "cat" / "up").symlink_to("../..", target_is_directory=True)
    (tmp_path / "elsewhere" / "self").symlink_to(".", target_is_directory=True)
    source = open_source(tmp_path / "set")
    assert source.classes == ("cat", "dog")
    assert {sample.file: sample.label for sample in source} == {
        "cat/3.png": 0, "cat/4.png": 0, "cat/up/elsewhere/2.png": 0, "cat/up/elsewhere/deep/1.png": 0,
        "dog/2.png": 1, "dog/deep/1.png": 1,
    }  # fmt: skip
    assert len(found(source)) == 6


@pytest.mark.parametrize("link", ["train/dog", "train/dog/1.png", "val", "test", "cover.png", "x.png"])
def test_a_link_to_nowhere_is_not_rejected(tmp_path: Path, link: str) -> None:
    """Otherwise a class or a split would be missing."""
    save(tmp_path / "train" / "cat" / "1.png")
    (tmp_path / link).parent.mkdir(exist_ok=True)
    (tmp_path / link).symlink_to("nowhere")
    with pytest.raises(UserError, match=rf"{link}: cannot be read \(No such file or directory\)$"):
        found(folder(tmp_path))


def test_pipes_are_rejected(tmp_path: Path) -> None:
    save(tmp_path / "1.png")
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    assert [sample.file for sample in open_source(tmp_path)] == ["1.png"]
