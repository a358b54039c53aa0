"""Tables of labels beside images: `metadata.csv` and `metadata.jsonl` as of Hugging Face's imagefolder, `labels.csv`,
and `dataset.json` as of NVlabs' StyleGAN and EDM.

A CSV table has a header; a JSON Lines table has an object per line. Both state a file, relative to the table, and its
label. `dataset.json` has `{"labels": [["00000/img00000000.png", 6], ...]}`.
"""

import csv
import io
import json
import math
import posixpath
import unicodedata
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any, NamedTuple

from diffusion.errors import UserError, shortened
from diffusion.sources.colours import Unreadable
from diffusion.sources.trees import BROKEN, Tree

FILE_COLUMNS = ("file_name", "filename", "file", "image")
LABEL_COLUMNS = ("label", "class", "category")
"""Names of the columns, in lower case."""
MAX_DIGITS = 20
"""A class whose name has as many digits is not read as a number."""
Parts = tuple[str, ...]
"""The parts of a file's path, relative to the root of the tree."""
Row = tuple[str, str, Any]
"""Where it is in the table (`line 3`), the file, and its label or None."""


class Table(NamedTuple):
    """The labels of images."""

    name: str
    """The table, or the tables of several splits."""
    classes: tuple[str, ...]
    """Distinct labels; integers in numerical order."""
    labels: Mapping[Parts, int]
    """Index of each labelled file's class."""
    files: tuple[Parts, ...]
    """The tables' own files."""
    missing: tuple[Parts, ...]
    """Files in the table that are not there."""


def read(tree: Tree, files: Collection[Parts], places: Iterable[Parts]) -> Table | None:
    """The labels in the tables at `places` of a tree; None if no table there labels any of its files.

    Raises UserError naming the table and the line if a table is wrong, names only files that are not there, or gives a
    file several labels.
    """
    known = {_composed(parts): parts for parts in files} | {parts: parts for parts in files}
    texts, tables, missing, named = dict[Parts, str](), list[Parts](), dict[Parts, None](), False
    for place in places:
        here = [(*place, name) for name in READERS if (*place, name) in known]
        found = [(path, rows) for path in here if (rows := _rows(tree, path)) is not None]
        if len(found) > 1:
            raise UserError(f"{_in(tree, found[0][0])}: {found[1][0][-1]} states labels, too; keep one of them")
        for path, rows in found:
            tables.append(path)
            for line, name, label in rows:
                wanted = _parts(place, name)
                if wanted == place:
                    raise UserError(f"{_in(tree, path)}, {line}: {name!r} is not a file")
                parts = known.get(wanted) or known.get(_composed(wanted))
                named = named or parts is not None
                text = _label(label, f"{_in(tree, path)}, {line}")
                if parts is None:
                    missing[wanted] = None
                elif text and texts.setdefault(parts, text) != text:
                    raise UserError(f"{_in(tree, path)}, {line}: {name} has the labels {texts[parts]} and {text}")
    if missing and not named:
        raise UserError(
            f"{_in(tree, tables[0])}: names only files that are not there, such as {'/'.join(next(iter(missing)))}; "
            "correct the names, or remove the table"
        )
    if not texts:
        return None
    classes = tuple(sorted(set(texts.values()), key=in_order))
    numbers = {name: number for number, name in enumerate(classes)}
    labels = {parts: numbers[text] for parts, text in texts.items()}
    return Table(" and ".join("/".join(path) for path in tables), classes, labels, tuple(tables), tuple(missing))


def _in(tree: Tree, path: Parts) -> str:
    return str(tree.path / "/".join(path))


def _composed(parts: Parts) -> Parts:
    """A path in Unicode's composed form, since macOS decomposes the names of files."""
    return tuple(unicodedata.normalize("NFC", part) for part in parts)


def _parts(place: Parts, name: str) -> Parts:
    """A file that a table names, relative to the root of the tree."""
    return tuple(
        part
        for part in posixpath.normpath("/".join((*place, name.replace("\\", "/")))).split("/")
        if part not in ("", ".")
    )


def in_order(name: str) -> tuple[int, str]:
    """Sorts names of classes; integers in numerical order."""
    return (int(name), name) if name.isascii() and name.isdecimal() and len(name) < MAX_DIGITS else (-1, name)


def class_name(label: Any) -> str | None:
    """The name of a class; empty for none; None if it is neither text nor an integer."""
    if label is None or (isinstance(label, float) and math.isnan(label)):
        return ""
    if isinstance(label, float) and label.is_integer():  # as pandas writes integers where some are missing
        label = int(label)
    if isinstance(label, bool) or not isinstance(label, int | str):
        return None
    return str(label).encode(errors="backslashreplace").decode()


def _label(label: Any, where: str) -> str:
    """The name of a class; empty for none."""
    if (name := class_name(label)) is None:
        raise UserError(f"{where}: a label must be text or an integer (got {shortened(label)})")
    return name


def _rows(tree: Tree, path: Parts) -> list[Row] | None:
    """The rows of a table; None if it has no labels."""
    try:
        with tree.file("/".join(path)).open("rb") as file:
            text = file.read().decode("utf-8-sig")
        return READERS[path[-1]](text)
    except UnicodeDecodeError as error:
        raise UserError(f"{_in(tree, path)}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    except _WrongTable as error:
        raise UserError(f"{_in(tree, path)}, {error}") from None
    except (Unreadable, *BROKEN) as error:
        raise UserError(f"{_in(tree, path)}: cannot be read ({error})") from None


class _WrongTable(Exception):
    """What is wrong with a table, and in which line."""


def _csv(text: str) -> list[Row] | None:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        return _from_records((reader.line_num, row) for row in reader)
    except csv.Error as error:
        raise _WrongTable(f"line {reader.line_num + 1}: {error}") from None


def _jsonl(text: str) -> list[Row] | None:
    def records() -> Iterator[tuple[int, Any]]:
        for number, line in enumerate(text.split("\n"), 1):
            if line.strip():
                try:
                    yield number, json.loads(line)
                except (ValueError, RecursionError):
                    raise _WrongTable(f"line {number}: not valid JSON") from None

    return _from_records(records())


def _from_records(records: Iterable[tuple[int, Any]]) -> list[Row] | None:
    """Rows from numbered mappings of columns; None if there is no column of files, or none of labels."""
    rows, labelled = list[Row](), False
    for number, record in records:
        if not isinstance(record, dict) or None in record:
            raise _WrongTable(f"line {number}: expected an object, or as many values as the header has columns")
        columns = {name.lower(): name for name in record}
        file = next((columns[name] for name in FILE_COLUMNS if name in columns), None)
        if file is None and not rows:
            return None
        if file is None or not isinstance(record[file], str) or not record[file]:
            raise _WrongTable(f"line {number}: no {file or FILE_COLUMNS[0]} (found: {shortened(record)})")
        label = next((columns[name] for name in LABEL_COLUMNS if name in columns), None)
        labelled = labelled or label is not None
        rows.append((f"line {number}", record[file], record[label] if label else None))
    return rows if labelled else None


def _dataset_json(text: str) -> list[Row] | None:
    try:
        document = json.loads(text)
    except (ValueError, RecursionError):
        raise _WrongTable("not valid JSON") from None
    labels = document.get("labels") if isinstance(document, dict) else None
    if not isinstance(labels, list) or not labels or not isinstance(labels[0], list):
        return None  # of another program
    rows = list[Row]()
    for number, pair in enumerate(labels):
        if not isinstance(pair, list) or len(pair) != 2 or not isinstance(pair[0], str):
            raise _WrongTable(f"labels[{number}]: must be a file and its label (got {shortened(pair)})")
        rows.append((f"labels[{number}]", pair[0], pair[1]))
    return rows


READERS: dict[str, Callable[[str], list[Row] | None]] = {
    "metadata.csv": _csv,
    "metadata.jsonl": _jsonl,
    "labels.csv": _csv,
    "dataset.json": _dataset_json,
}
"""How each table is read, by its name."""
