"""Shards in WebDataset format as a source: tar files in which the members of a sample share a key."""

import json
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, NamedTuple, Self

from diffusion.errors import UserError, shortened
from diffusion.sources.images import NO_IMAGE, is_image, read_image
from diffusion.sources.labels import in_order
from diffusion.sources.shards import Sample
from diffusion.sources.splits import by_file_name
from diffusion.sources.trees import Tar, ending, files_below
from diffusion.storage.tar import Split

LABEL_KEYS = ("class", "label", "cls")
"""Keys in a sample's .json member that may hold its class, the preferred ones first."""


class Group(NamedTuple):
    """The members of a sample by extension, in the order of the shard."""

    key: str
    members: dict[str, str]


class WebDataset:
    """One shard, or a folder of shards. A sample's first member that is an image counts.

    Its class is the text of `.cls`, or `class`, `label` or `cls` in `.json`. The shards' names may state splits.
    """

    @classmethod
    def at(cls, path: Path, split_names_as_classes: bool) -> Self | None:  # noqa: ARG003
        """The source at `path`; None if it is not a folder of tar files alone, or a tar file with labels."""
        if path.is_dir():
            files = list(files_below(path))
            tars = [file for file in files if ending(file).startswith((".tar", ".tgz"))]
            return cls(path, tars) if tars and not any(is_image(file) for file in files) else None
        if not ending(path).startswith((".tar", ".tgz")):
            return None
        source = cls(path, [path])
        return source if source.labelled else None

    def __init__(self, path: Path, files: list[Path]) -> None:
        """Raises UserError if a shard cannot be read."""
        self._root = path if path.is_dir() else path.parent
        found, self.own_splits = by_file_name(files)
        self._shards = [(split, Tar(file)) for split, file in found]
        self._groups = [list(_groups(tar)) for _, tar in self._shards]
        self.labelled = any({"cls", "json"} & group.members.keys() for groups in self._groups for group in groups)
        labels = {
            text
            for number, groups in enumerate(self._groups)
            for group in groups
            if (text := self._label(number, group))
        }
        self.classes = tuple(sorted(labels, key=in_order))

    def _label(self, number: int, group: Group) -> str:
        """The class of a sample; empty for none."""
        if "cls" in group.members:
            return self._text(number, group.members["cls"]).strip()
        if "json" not in group.members:
            return ""
        where = f"{self._shards[number][1].path}: {group.members['json']}"
        try:
            facts = json.loads(self._text(number, group.members["json"]))
        except (ValueError, RecursionError):
            raise UserError(f"{where}: not valid JSON") from None
        found = [facts[key] for key in LABEL_KEYS if facts.get(key) is not None] if isinstance(facts, dict) else []
        if not found:
            return ""
        if isinstance(found[0], bool) or not isinstance(found[0], int | str):
            raise UserError(f"{where}: a label must be text or an integer (got {shortened(found[0])})")
        return str(found[0])

    def _text(self, number: int, name: str) -> str:
        tar = self._shards[number][1]
        with tar.file(name).open("rb") as file:
            try:
                return file.read().decode()
            except UnicodeDecodeError:
                raise UserError(f"{tar.path}: {name}: not UTF-8 text") from None

    def __len__(self) -> int:
        return sum(map(len, self._groups))

    def __iter__(self) -> Iterator[Sample]:
        numbers = {name: label for label, name in enumerate(self.classes)}
        for number, (split, tar) in enumerate(self._shards):
            for group in self._groups[number]:
                yield self._sample(tar, group, numbers.get(self._label(number, group)), split)

    def _sample(self, tar: Tar, group: Group, label: int | None, split: Split | None) -> Sample:
        shard = tar.path.relative_to(self._root).as_posix().removesuffix(ending(tar.path))
        key = re.sub(r"[^A-Za-z0-9_]+", "-", f"{shard}-{group.key}").strip("-")
        for name in group.members.values():
            if is_image(file := tar.file(name)):
                return Sample(key, f"{tar.path.name}: {name}", label, split, partial(read_image, file))
        name = next(iter(group.members.values()))
        return Sample(key, f"{tar.path.name}: {name}", label, split, partial(read_image, tar.file(name)), NO_IMAGE)


def _groups(tar: Tar) -> Iterator[Group]:
    """The samples of a shard: members that share their path up to the first dot of the name."""
    found: dict[str, dict[str, Any]] = {}
    for name in tar.in_order():
        path = PurePosixPath(name)
        stem, _, extension = path.name.partition(".")
        found.setdefault(str(path.parent / stem), {})[extension.lower()] = name
    for key, members in found.items():
        yield Group(key, members)
