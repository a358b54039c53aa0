"""Folders of image files, and the interpretation of their subfolders as splits or classes."""

import hashlib
import os
import re
from collections.abc import Iterator
from functools import cached_property, partial
from pathlib import Path
from typing import Self

from diffusion.errors import UserError
from diffusion.sources.images import CAMERA_RAW, NO_IMAGE, RAW, is_image, raise_read_errors, read_image
from diffusion.sources.shards import Sample
from diffusion.storage.files import reading
from diffusion.storage.tar import Split

SPLIT_NAMES: dict[str, Split] = {
    "train": "train", "training": "train",
    "val": "val", "valid": "val", "validation": "val", "dev": "val",
    "test": "test", "testing": "test",
}  # fmt: skip
"""Folder names of splits, case-insensitive."""
LIKE_A_SPLIT = re.compile(
    rf"(.*([-_ .]|(?-i:(?<=[a-z])(?=[A-Z]))))?({'|'.join(SPLIT_NAMES)})"
    r"([-_ .]?(set|split|data|images?|imgs?|hr|lr|\d|(?-i:[AB])))*",
    re.IGNORECASE,
)
"""Names that probably mean a split (seg_test, trainA, CelebTrain, train2017), for which confirmation is required."""
SYSTEM = frozenset(
    {"@eaDir", "__MACOSX", "#recycle", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
    | {"Thumbs.db", "desktop.ini"}
)
"""Files and folders created by file managers and storage devices."""
MAX_NAMES = 5
"""Maximum number of names listed in a message."""


class Folder:
    """Image files in any format that Pillow can read.

    A folder that contains only one other folder is replaced by it. Folders named like splits are the source's own
    splits if one of them is train and there are no other folders with images beside them. Other top-level folders, or
    those at the top of each split, are classes, including their subfolders. Folders without images, hidden folders and
    system folders are skipped. Symbolic links are followed.
    """

    @classmethod
    def at(cls, path: Path, split_names_as_classes: bool) -> Self | None:
        """The source at `path`; None if it is not a folder with images."""
        holds_images = path.is_dir() and any(is_image(file) for file in files_below(path))
        return cls(path, split_names_as_classes) if holds_images else None

    def __init__(self, folder: Path, split_names_as_classes: bool = False) -> None:
        """Raises UserError if a class, or a folder inside one, is named like a split.

        `split_names_as_classes` confirms that these are not splits.
        """
        self.folder = folder
        (root,), (top,) = _unwrap([folder])
        splits = {name: SPLIT_NAMES.get(name.lower()) for name in top}
        if "train" not in splits.values() or None in splits.values():
            splits = {}
        self.own_splits: dict[Split, str] = {
            split: " and ".join(f"{_text(name)}/" for name in top if splits[name] == split)
            for split in SPLIT_NAMES.values()
            if split in splits.values()
        }
        self._roots: list[tuple[Split | None, Path]] = [(None, root)]
        self._outside = list[Path]()
        if splits:
            # Held-out splits first: see Source.
            top.sort(key=lambda name: ("test", "val", "train").index(splits[name] or "train"))
            roots, classes = _unwrap([root / name for name in top])
            self._roots = [(splits[name], inside) for name, inside in zip(top, roots, strict=True)]
            top = sorted({name for names in classes for name in names})
            self._outside = sorted(path for path in root.iterdir() if _visible(path) and _is_file(path))
        self._labels = top
        self.classes = tuple(map(_text, self._labels))
        if not split_names_as_classes:
            self._check_names()

    def _check_names(self) -> None:
        read_as, names = "a class", [name for name in self.classes if LIKE_A_SPLIT.fullmatch(name)]
        if not names:
            read_as, inside = "part of a class", next(self._like_splits_inside(), None)
            names = [_text(inside.relative_to(self.folder).as_posix())] if inside else []
        if names:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            raise UserError(
                f"{self.folder}: named like a split, but read as {read_as}: {', '.join(names[:MAX_NAMES])}{more}; "
                "if it is not a split, set shard.split_names_as_classes: true (ddpm import: --split-names-as-classes); "
                "if it is, arrange the folders as train, val and test at the top with the classes inside, with train "
                "among them and no other images or folders beside them"
            )

    def _like_splits_inside(self) -> Iterator[Path]:
        """Folders with images inside classes that are named like splits, once for each image."""
        for _, root in self._roots:
            for path in files_below(root):
                parents = path.relative_to(root).parts[:-1]
                for depth, name in enumerate(parents):
                    if depth and LIKE_A_SPLIT.fullmatch(name) and is_image(path):
                        yield root.joinpath(*parents[: depth + 1])

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self._files())

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        labels = {name: label for label, name in enumerate(self._labels)}
        for path, split, top in self._files():
            inside = path.relative_to(self.folder)
            outside = self.own_splits and not split
            left_out = "outside the folders of the splits" if outside else rejection_reason(path)
            name, decode = _text(inside.as_posix()), partial(read_image, path)
            yield Sample(_key(inside), name, labels.get(top), split, decode, left_out)

    def _files(self) -> Iterator[tuple[Path, Split | None, str]]:
        """Each file with its split and the name of its top-level folder."""
        known = set(self._labels)
        for split, root in self._roots:
            for path in files_below(root):
                top, *rest = path.relative_to(root).parts
                if not rest or top in known:
                    yield path, split, top if rest else ""
        for path in self._outside:
            if is_image(path):
                yield path, None, ""


def rejection_reason(path: Path) -> str | None:
    """Why a file can be rejected without decoding it, or None; raises SystemFault like `is_image`."""
    if RAW.fullmatch(path.suffix):
        return CAMERA_RAW
    if is_image(path):
        return None
    with reading(path), path.open("rb") as file:
        raise_read_errors(file)
    return NO_IMAGE


def files_below(folder: Path, above: frozenset[tuple[int, int]] = frozenset()) -> Iterator[Path]:
    """Files below a folder, sorted, without hidden and system files.

    Symbolic links are followed, except to a folder that contains them; a broken link counts as a file.
    """
    try:
        status = folder.stat()
        paths = sorted(folder.iterdir())
    except OSError as error:
        raise UserError(f"{folder}: cannot be read ({error.strerror})") from None
    here = (status.st_dev, status.st_ino)
    if here in above:
        return
    for path in paths:
        if not _visible(path):
            continue
        if path.is_dir():
            yield from files_below(path, above | {here})
        elif _is_file(path):
            yield path


def linked_folders(folder: Path) -> list[Path]:
    """Symbolic links to folders below a folder, sorted."""
    found = []
    for place, names, _ in os.walk(folder):
        names[:] = [name for name in names if _visible(Path(name))]
        found += [path for name in names if (path := Path(place, name)).is_symlink()]
    return sorted(found)


def _is_file(path: Path) -> bool:
    """Whether a path is a file, or a broken link, which must be reported; not a pipe or a device."""
    return path.is_file() or (path.is_symlink() and not path.exists())


def _visible(path: Path) -> bool:
    return not path.name.startswith(".") and path.name not in SYSTEM


def _folders_with_images(folder: Path) -> list[str]:
    """Names of the folders that contain an image at any depth."""
    return sorted(
        path.name
        for path in folder.iterdir()
        if _visible(path) and path.is_dir() and any(is_image(file) for file in files_below(path))
    )


def _unwrap(folders: list[Path]) -> tuple[list[Path], list[list[str]]]:
    """Descend while each folder only contains one folder of the same name; returns the folders and their subfolders."""
    inside = [_folders_with_images(folder) for folder in folders]
    name = inside[0][0] if inside[0] else ""
    if any(names != [name] for names in inside) or name.lower() in SPLIT_NAMES:
        return folders, inside
    if any(is_image(path) for folder in folders for path in folder.iterdir() if _visible(path) and _is_file(path)):
        return folders, inside
    inner, deeper = _unwrap([folder / name for folder in folders])
    return (inner, deeper) if any(deeper) else (folders, inside)


def _key(path: Path) -> str:
    """A readable key that depends only on the file's path; the digest distinguishes a-b/c, a/b-c and a/b/c."""
    readable = re.sub(r"[^A-Za-z0-9_]+", "-", str(path.with_suffix(""))).strip("-")
    return f"{readable[:60]}-{hashlib.sha256(os.fsencode(path)).hexdigest()[:12]}"


def _text(name: str) -> str:
    """A file's name as valid text: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")
