"""Folders and archives of image files: subfolders as splits or classes, labels in a table."""

import os
import re
from collections.abc import Iterable, Iterator
from functools import cached_property
from pathlib import Path
from typing import Self

from diffusion.errors import UserError, counted
from diffusion.sources import labels
from diffusion.sources.images import (
    OTHER_FILE,
    File,
    Picture,
    is_image,
    raise_read_errors,
    unsupported,
)
from diffusion.sources.labels import Parts
from diffusion.sources.reading import DEFAULTS, Reading
from diffusion.sources.shards import Sample, sample_key
from diffusion.sources.splits import ORDER, SPLIT_NAMES
from diffusion.sources.trees import Decoder, Tree, open_tree
from diffusion.storage.files import reading
from diffusion.storage.tar import Split

LIKE_A_SPLIT = re.compile(
    rf"(.*([-_ .]|(?-i:(?<=[a-z])(?=[A-Z]))))?({'|'.join(SPLIT_NAMES)})"
    r"([-_ .]?(set|split|data|images?|imgs?|hr|lr|\d|(?-i:[AB])))*",
    re.IGNORECASE,
)
"""Names that probably mean a split (seg_test, trainA, CelebTrain, train2017), for which confirmation is required."""
MAX_NAMES = 5
"""Maximum number of names listed in a message."""
OUTSIDE_SPLITS = "outside the folders of the splits"
OUTSIDE_ARCHIVE = "its name is empty, or leads out of the archive"
MISSING = "in the table of labels, but there is no such file"


class Folder:
    """Image files in any format that Pillow can read, below a folder or in an archive.

    A folder that contains only one other folder is replaced by it. Folders named like splits are the source's own
    splits if one of them is train and there are no other folders with images beside them. If a table of labels is
    there (see labels.py), at the top or at the top of each split, it states the classes; otherwise other top-level
    folders, or those at the top of each split, are classes, including their subfolders. Folders without images, hidden
    folders and system folders are skipped.
    """

    @classmethod
    def at(cls, path: Path, reading: Reading) -> Self | None:
        """The source at `path`; None if it is not a folder or archive with images."""
        tree = open_tree(path)
        if tree is None:
            return None
        folder = cls(tree, reading)
        return folder if folder.holds_images else None

    def __init__(self, tree: Tree, how: Reading = DEFAULTS) -> None:
        """Raises UserError if a class, or a folder inside one, is named like a split, or a table of labels is wrong.

        `how.split_names_as_classes` confirms that these are not splits.
        """
        self._how = how
        self.tree = tree
        every = [tuple(name.split("/")) for name in tree.names()]
        self._unsafe = [parts for parts in every if ".." in parts]
        self._files = [parts for parts in every if ".." not in parts]
        self._images = dict.fromkeys(parts for parts in self._files if is_image(self._file(parts)))
        self.holds_images = bool(self._images)
        (root,), (top,) = self._unwrap([()])
        splits = {name: SPLIT_NAMES.get(name.lower()) for name in top}
        if "train" not in splits.values() or None in splits.values():
            splits = {}
        self.own_splits: dict[Split, str] = {
            split: " and ".join(f"{_text(name)}/" for name in top if splits[name] == split)
            for split in SPLIT_NAMES.values()
            if split in splits.values()
        }
        self._roots: list[tuple[Split | None, Parts]] = [(None, root)]
        self._outside = list[Parts]()
        if splits:
            # Held-out splits first: see Source.
            top.sort(key=lambda name: ORDER.index(splits[name] or "train"))
            roots, classes = self._unwrap([(*root, name) for name in top])
            self._roots = [(splits[name], inside) for name, inside in zip(top, roots, strict=True)]
            top = sorted({name for names in classes for name in names})
            self._outside = [parts for parts in self._images if parts[:-1] == root]
        passed = [inside[:depth] for _, inside in [(None, root), *self._roots] for depth in range(len(inside) + 1)]
        self._table = labels.read(tree, self._files, list(dict.fromkeys(passed)))
        self._folders = top
        self.classes = tuple(map(_text, top)) if self._table is None else self._table.classes
        if not how.split_names_as_classes:
            self._check_names()
        if self._table:
            self._check_table(self._table)

    def _check_table(self, table: labels.Table) -> None:
        """Raise UserError if images in folders are not in the table: the folders may be their classes."""
        for _, root in self._roots:
            for parts in _below(root, self._images):
                if len(parts) > len(root) + 1 and parts not in table.labels:
                    raise UserError(
                        f"{self.tree.path}: {table.name} labels {counted(len(table.labels), 'image')}, but not "
                        f"{_text('/'.join(parts))}, whose folder could be its class; complete the table, or delete it"
                    )

    def _file(self, parts: Parts) -> File:
        return self.tree.file("/".join(parts))

    def _check_names(self) -> None:
        read_as, names = "a class", [name for name in map(_text, self._folders) if LIKE_A_SPLIT.fullmatch(name)]
        if not names:
            read_as, inside = "part of a class", next(self._like_splits_inside(), None)
            names = [_text("/".join(inside))] if inside else []
        if names:
            more = f" and {len(names) - MAX_NAMES} more" if len(names) > MAX_NAMES else ""
            raise UserError(
                f"{self.tree.path}: named like a split, but read as {read_as}: {', '.join(names[:MAX_NAMES])}{more}; "
                "if it is not a split, set shard.split_names_as_classes: true (ddpm import: --split-names-as-classes); "
                "if it is, arrange the folders as train, val and test at the top with the classes inside, with train "
                "among them and no other images or folders beside them"
            )

    def _like_splits_inside(self) -> Iterator[Parts]:
        """Folders with images inside classes that are named like splits, once for each image."""
        for _, root in self._roots:
            for parts in _below(root, self._images):
                for depth in range(len(root) + 1, len(parts) - 1):
                    if LIKE_A_SPLIT.fullmatch(parts[depth]):
                        yield parts[: depth + 1]

    @cached_property
    def _count(self) -> int:
        return sum(1 for _ in self._entries())

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        folders = {name: label for label, name in enumerate(self._folders)}
        for parts, split, top, rejected in self._entries():
            name, table = "/".join(parts), self._table
            label = folders.get(top) if table is None else table.labels.get(parts)
            if rejected:
                yield Sample(sample_key(name), _text(name), label, split, _nothing, rejected)
                continue
            file = self._file(parts)
            reason = unsupported(file.suffix) if parts in self._images else rejection_reason(file)
            if reason:
                yield Sample(sample_key(name), _text(name), label, split, _nothing, reason)
                continue
            decode = Decoder(file, self._how)
            yield Sample(sample_key(name), _text(name), label, split, decode, size=decode.size)

    def _entries(self) -> Iterator[tuple[Parts, Split | None, str, str | None]]:
        """Each file with its split, the name of its top-level folder, and why it is rejected because of its place."""
        known, tables = set(self._folders), set(self._table.files if self._table else ())
        for split, root in self._roots:
            for parts in _below(root, self._files):
                top = parts[len(root)] if len(parts) > len(root) + 1 else ""
                if (not top or top in known) and parts not in tables:
                    yield parts, split, top, None
        for parts in self._outside:
            yield parts, None, "", OUTSIDE_SPLITS
        for parts in self._unsafe:
            yield parts, None, "", OUTSIDE_ARCHIVE
        for parts in self._table.missing if self._table else ():
            yield parts, None, "", MISSING

    def _unwrap(self, folders: list[Parts]) -> tuple[list[Parts], list[list[str]]]:
        """Descend while each folder only contains one folder of the same name; returns the folders and subfolders."""
        below = [list(_below(folder, self._images)) for folder in folders]
        inside = [
            sorted({parts[len(folder)] for parts in found if len(parts) > len(folder) + 1})
            for folder, found in zip(folders, below, strict=True)
        ]
        name = inside[0][0] if inside[0] else ""
        if any(names != [name] for names in inside) or name.lower() in SPLIT_NAMES:
            return folders, inside
        if any(len(parts) == len(folder) + 1 for folder, found in zip(folders, below, strict=True) for parts in found):
            return folders, inside
        inner, deeper = self._unwrap([(*folder, name) for folder in folders])
        return (inner, deeper) if any(deeper) else (folders, inside)


def _below(folder: Parts, files: Iterable[Parts]) -> Iterator[Parts]:
    """The files below a folder."""
    return (parts for parts in files if parts[: len(folder)] == folder)


def _nothing() -> Picture:
    raise AssertionError("a rejected sample is not decoded")


def rejection_reason(file: File) -> str | None:
    """Why a file can be rejected without decoding it, or None; raises SystemFault like `is_image`."""
    if reason := unsupported(file.suffix):
        return reason
    if is_image(file):
        return None
    if isinstance(file, Path):
        with reading(file), file.open("rb") as content:
            raise_read_errors(content)
    return OTHER_FILE


def _text(name: str) -> str:
    """A file's name as valid text: bytes that are not UTF-8 are written as \\xNN."""
    return os.fsencode(name).decode(errors="backslashreplace")
