"""Parquet files with images, as Hugging Face's `datasets` writes them."""

import io
import json
from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path, PurePosixPath
from typing import Any, Self

from diffusion.errors import UserError, shortened
from diffusion.sources.images import is_image, read_image
from diffusion.sources.labels import class_name, in_order
from diffusion.sources.reading import DEFAULTS, Reading
from diffusion.sources.shards import Sample, sample_key
from diffusion.sources.splits import by_file_name
from diffusion.sources.trees import TAR_ENDINGS, Member, ending, files_below
from diffusion.storage.tar import Split

IMAGE_COLUMNS, LABEL_COLUMNS = ("image", "img"), ("label", "labels", "fine_label", "class")
"""Names of the columns, the preferred ones first."""
ONLY_PATH = "its bytes are not in the file, only its path; save the data set with its images"
NO_IMAGE = "its row has no image"
BATCH = 64
"""Rows read at once."""


class Parquet:
    """Parquet files with a column of images: their encoded bytes, or a struct with the field `bytes`.

    The files' names may state splits. Labels are integers with class names in the schema (the feature ClassLabel),
    integers without, or text.
    """

    @classmethod
    def at(cls, path: Path, reading: Reading) -> Self | None:
        """The source at `path`, a file or a folder; None if there are no Parquet files, or images beside them."""
        if path.is_file():
            return cls(path, [path], reading) if ending(path) == ".parquet" else None
        every = list(files_below(path)) if path.is_dir() else []
        files = [file for file in every if ending(file) == ".parquet"]
        if files and (others := [file for file in every if ending(file) in (".zip", *TAR_ENDINGS)]):
            raise UserError(f"{path}: contains Parquet files and archives ({others[0].name}); keep one kind")
        return cls(path, files, reading) if files and not any(is_image(file) for file in every) else None

    def __init__(self, path: Path, files: list[Path], how: Reading = DEFAULTS) -> None:
        """Raises UserError if a file cannot be read, has other columns than the first, or a wrong label."""
        self._how = how
        self.path, self._root = path, path if path.is_dir() else path.parent
        self._files, self.own_splits = by_file_name(self._root, files)
        schema = _open(files[0]).schema_arrow
        self.image = _image_column(files[0], schema)
        self.label = next((name for name in LABEL_COLUMNS if name in schema.names), None)
        names = _class_names(schema, self.label)
        for file in files[1:]:
            other = _open(file).schema_arrow
            if missing := {self.image, self.label} - {None, *other.names}:
                raise UserError(f"{file}: has no column {missing.pop()}, unlike {files[0].name}")
            if self.label and (_class_names(other, self.label), other.field(self.label).type) != (
                names, schema.field(self.label).type,
            ):  # fmt: skip
                raise UserError(f"{file}: column {self.label} has other classes, or another type, than {files[0].name}")
        self.classes, self._numbers = self._read_classes(names)
        self._count = sum(_open(file).metadata.num_rows for file in files)

    def _read_classes(self, names: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, int]]:
        """Names of the classes, and each label's class."""
        if self.label is None:
            return (), {}
        if names:
            return names, {str(number): number for number in range(len(names))}
        found = {self._name(row[self.label]) for _, file in self._files for row in _rows(file, [self.label])} - {""}
        classes = tuple(sorted(found, key=in_order))
        return classes, {name: number for number, name in enumerate(classes)}

    def _name(self, label: Any) -> str:
        """A label as text; empty for none."""
        if (name := class_name(label)) is None:
            raise UserError(f"{self.path}: column {self.label}: must be integers or text (got {shortened(label)})")
        return "" if name == "-1" else name

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[Sample]:
        columns = [self.image, *([self.label] if self.label else [])]
        for split, file in self._files:
            for index, row in enumerate(_rows(file, columns)):
                yield self._sample(row, file, index, split)

    def _sample(self, row: Mapping[str, Any], file: Path, index: int, split: Split | None) -> Sample:
        name, label, image = f"{file.name}[{index}]", self._name(row.get(self.label or "")), row[self.image]
        if label and label not in self._numbers:
            raise UserError(f"{file}: row {index}: no class has the label {label}")
        content = image.get("bytes") if isinstance(image, Mapping) else image
        inside = image.get("path") if isinstance(image, Mapping) else None
        path = PurePosixPath(inside if isinstance(inside, str) and inside else str(index))
        member = Member(file, path, partial(io.BytesIO, content or b""))
        place = f"{file.relative_to(self._root).as_posix()}/" if len(self._files) > 1 else ""
        key = sample_key(f"{place}{index:07d}")
        decode = partial(read_image, member, self._how)
        rejected = None if content is not None else ONLY_PATH if inside else NO_IMAGE
        return Sample(key, name, self._numbers.get(label), split, decode, rejected, size=len(content or b""))


def _open(path: Path) -> Any:
    """A Parquet file; raises UserError if it cannot be read."""
    import pyarrow as pa
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(path)
        _ = file.schema_arrow.names  # damaged ones cannot be decoded
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: not a readable Parquet file ({_line(error)})") from None
    return file


def _rows(path: Path, columns: list[str]) -> Iterator[dict[str, Any]]:
    """Rows, of which a batch is in memory; raises UserError if the file is damaged."""
    import pyarrow as pa

    try:
        with _open(path) as file:
            for batch in file.iter_batches(BATCH, columns=columns):
                yield from batch.to_pylist()
    except (OSError, ValueError, pa.ArrowException) as error:
        raise UserError(f"{path}: damaged ({_line(error)})") from None


def _line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0]


def _holds_images(kind: Any) -> bool:
    from pyarrow import types

    if types.is_struct(kind):
        return any(field.name == "bytes" and _holds_images(field.type) for field in kind)
    return bool(types.is_binary(kind) or types.is_large_binary(kind))


def _image_column(path: Path, schema: Any) -> str:
    """The column with images; raises UserError if there is none, or several of other names."""
    found = [field.name for field in schema if _holds_images(field.type)]
    named = [name for name in IMAGE_COLUMNS if name in found]
    if not found:
        raise UserError(f"{path}: has no column with the bytes of images (found: {', '.join(schema.names)})")
    if not named and len(found) > 1:
        raise UserError(f"{path}: several columns may hold images: {', '.join(found)}; name one of them `image`")
    return str((named or found)[0])


def _class_names(schema: Any, label: str | None) -> tuple[str, ...]:
    """The names that `datasets` stores in the schema for a column of the feature ClassLabel; empty if it has none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features[label]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()
