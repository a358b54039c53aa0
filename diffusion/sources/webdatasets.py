"""Shards in WebDataset format as a source: tar files in which the members of a sample share a key."""

import json
import zlib
from collections.abc import Iterable, Iterator
from functools import lru_cache
from pathlib import Path, PurePosixPath
from typing import NamedTuple, Self

from diffusion.errors import UserError
from diffusion.sources.colours import Unreadable
from diffusion.sources.images import NO_IMAGE, is_image, unsupported
from diffusion.sources.labels import class_name, in_order
from diffusion.sources.reading import DEFAULTS, Reading
from diffusion.sources.shards import Sample, sample_key
from diffusion.sources.splits import by_file_name
from diffusion.sources.trees import BROKEN, TAR_ENDINGS, Decoder, Tar, ending, files_below

LABEL_KEYS = ("class", "label", "cls")
"""Keys in a sample's .json member that may hold its class, the preferred ones first."""


class Group(NamedTuple):
    """A sample of a shard."""

    key: str
    image: str
    """The first image, if possible one that Pillow reads; if there is none, the first member."""
    others: tuple[str, ...] = ()
    """Its other images, which are not used."""
    label: str = ""
    """The name of its class; empty for none."""
    rejected: str | None = None

    @property
    def remarks(self) -> tuple[str, ...]:
        return (f"the first image of its sample is used, not {', '.join(self.others)}",) if self.others else ()


class WebDataset:
    """One shard, or a folder of shards. The first image of a sample is used, with a warning if there are more.

    Its class is the text of `.cls`, or `class`, `label` or `cls` in `.json`. The shards' names may state splits. A
    sample whose label cannot be read is rejected.
    """

    @classmethod
    def at(cls, path: Path, reading: Reading) -> Self | None:
        """The source at `path`: a folder with tar files but without images, or a tar file with labelled samples."""
        if path.is_dir():
            files = list(files_below(path))
            tars = [file for file in files if ending(file) in TAR_ENDINGS]
            if not tars or any(is_image(file) for file in files):
                return None
            source = cls(path, tars, reading)
            if not source.classes and source.folders:
                raise UserError(
                    f"{path}: its tar files contain folders, but no labels (.cls or .json); choose one of them, which "
                    "is read like a folder, or unpack them"
                )
            return source
        if ending(path) not in TAR_ENDINGS:
            return None
        source = cls(path, [path], reading)
        return source if source.classes else None

    def __init__(self, path: Path, files: list[Path], how: Reading = DEFAULTS) -> None:
        """Raises UserError if a shard cannot be read, or only some names state a split."""
        self._how = how
        self._root = path if path.is_dir() else path.parent
        self._shards, self.own_splits = by_file_name(self._root, files)
        self._tar = lru_cache(maxsize=1)(Tar)  # one is open at a time
        self._groups, self._count, self.folders, found = list[bytes](), 0, False, set[str]()
        for _, file in self._shards:
            groups = list(_groups(self._tar(file)))
            self._groups.append(_packed(groups))
            self._count += len(groups)
            self.folders |= any("/" in group.key for group in groups)
            found |= {group.label for group in groups if group.label}
        self.classes = tuple(sorted(found, key=in_order))

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        numbers = {name: label for label, name in enumerate(self.classes)}
        for (split, path), packed in zip(self._shards, self._groups, strict=True):
            tar = self._tar(path)
            place = f"{path.relative_to(self._root).as_posix()}/" if len(self._shards) > 1 else ""
            for group in _unpacked(packed):
                decode = Decoder(tar.file(group.image), self._how, group.remarks)
                label, name = numbers.get(group.label), f"{path.name}: {group.image}"
                yield Sample(sample_key(f"{place}{group.key}"), name, label, split, decode, group.rejected, decode.size)


def _packed(groups: Iterable[Group]) -> bytes:
    """The samples of a shard in a tenth of the memory: their names are similar."""
    return zlib.compress(json.dumps(list(groups)).encode())


def _unpacked(packed: bytes) -> Iterator[Group]:
    for key, image, others, label, rejected in json.loads(zlib.decompress(packed)):
        yield Group(key, image, tuple(others), label, rejected)


def _groups(tar: Tar) -> Iterator[Group]:
    """The samples of a shard: members that share their path up to the first dot of the name.

    Only the division of names is webdataset's. Its iterators drop links and names without a dot, separate members that
    are not adjacent, take a damaged header for the end of the shard, and read members of any size into memory; here,
    each of these is used or reported.
    """
    from webdataset.tariterators import base_plus_ext  # it imports torch, which worker processes do without

    found: dict[str, list[str]] = {}
    for name in tar.in_order():
        found.setdefault(base_plus_ext(name)[0] or name, []).append(name)
    for key, members in found.items():
        images = [name for name in members if is_image(tar.file(name))]
        if not images:
            yield Group(key, members[0], rejected=NO_IMAGE)
            continue
        image = min(images, key=lambda name: unsupported(PurePosixPath(name).suffix) is not None)  # the first
        try:
            others = tuple(name for name in images if name != image)
            yield Group(key, image, others, _label(tar, members))
        except (Unreadable, *BROKEN) as error:
            yield Group(key, image, rejected=f"its label cannot be read ({error})")


def _label(tar: Tar, members: list[str]) -> str:
    """The class of a sample, empty for none; raises ValueError or Unreadable if it cannot be read."""
    simplest_last = sorted(members, key=lambda name: name.count("."), reverse=True)  # KEY.json after KEY.meta.json
    by_ending = {PurePosixPath(name).suffix.lower(): name for name in simplest_last}
    if ".cls" in by_ending:
        return _text(tar, by_ending[".cls"]).strip()
    if ".json" not in by_ending:
        return ""
    try:
        facts = json.loads(_text(tar, by_ending[".json"]))
    except RecursionError:
        raise ValueError("nested too deeply") from None
    found = [facts[key] for key in LABEL_KEYS if facts.get(key) is not None] if isinstance(facts, dict) else []
    return class_name(found[0]) or "" if found else ""


def _text(tar: Tar, name: str) -> str:
    with tar.file(name).open("rb") as file:
        return file.read().decode()
