"""Read and write YAML files, preserving comments."""

import re
import sys
from collections.abc import Collection, Mapping
from datetime import date
from io import BytesIO
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML
from ruamel.yaml.comments import CommentedMap, CommentedSeq
from ruamel.yaml.constructor import RoundTripConstructor, SafeConstructor
from ruamel.yaml.error import YAMLError
from ruamel.yaml.events import CollectionEndEvent, CollectionStartEvent, Event, NodeEvent, ScalarEvent
from ruamel.yaml.nodes import ScalarNode
from ruamel.yaml.tokens import CommentToken

from diffusion.errors import SystemFault, UserError, shortened
from diffusion.storage.files import write_atomic

_BOOL = re.compile(r"true|True|TRUE|false|False|FALSE")
_INT = re.compile(r"[-+]?(0|[1-9][0-9]*)")
_FLOAT = re.compile(r"[-+]?([0-9]+\.?[0-9]*|\.[0-9]+)([eE][-+]?[0-9]+)?|[-+]?\.(inf|Inf|INF)|\.(nan|NaN|NAN)")


class _Constructor(RoundTripConstructor):
    """Recognizes only plain decimal numbers, true and false.

    Other spellings (1_0, 010, 0x10, 1:30, yes) depend on the version of YAML or on the program: they remain text, which
    numeric fields reject.
    """

    def construct_bool(self, node: ScalarNode) -> Any:
        # The round-trip constructor returns an int for a value with an anchor.
        return SafeConstructor.construct_yaml_bool(self, node) if _BOOL.fullmatch(node.value) else node.value

    def construct_integer(self, node: ScalarNode) -> Any:
        return self.construct_yaml_int(node) if _INT.fullmatch(node.value) else node.value

    def construct_number(self, node: ScalarNode) -> Any:
        return self.construct_yaml_float(node) if _FLOAT.fullmatch(node.value) else node.value


_Constructor.add_constructor("tag:yaml.org,2002:bool", _Constructor.construct_bool)
_Constructor.add_constructor("tag:yaml.org,2002:int", _Constructor.construct_integer)
_Constructor.add_constructor("tag:yaml.org,2002:float", _Constructor.construct_number)
_Constructor.add_constructor("tag:yaml.org,2002:value", lambda _, node: node.value)  # =


def overlay(base: Any, changes: Any) -> Any:
    """Merge `changes` into `base`: mappings key by key, in place; other values are replaced."""
    if base is changes:
        return base
    if isinstance(base, CommentedSeq) and isinstance(changes, list):  # keeps [1, 2] on one line
        _refill(base, changes)
        return base
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    for key, value in changes.items():
        base[key] = overlay(base.get(key), value)
    return base


def _refill(items: CommentedSeq, values: list[Any]) -> None:
    """Replace the items of a list, keeping the comment or empty line after its last item."""
    comment = items.ca.items.get(len(items) - 1)
    behind = comment[0].value.partition("\n")[2] if comment and comment[0] else ""
    if not items or not values:  # ruamel does not keep the flow style of []
        items.fa.set_flow_style()
    items.clear()
    items.extend(values)
    if behind:
        token = CommentToken(f"\n{behind}", comment[0].start_mark, None)
        if values:
            items.ca.items[len(values) - 1] = [token, None, None, None]
        else:
            items.ca.comment = [token, None]


def keep_alone(mapping: Any, fields: Mapping[str, Any], known: Collection[str]) -> None:
    """Remove the `known` fields that are not in `fields` from a mapping, in place, and add the missing `fields`.

    The comment or empty line after the last field is kept at the end.
    """
    comments = mapping.ca.items if isinstance(mapping, CommentedMap) else {}
    last = list(mapping)[-1]
    own, _, behind = comments[last][2].value.partition("\n") if last in comments and comments[last][2] else ("", "", "")
    if behind:
        mark = comments[last][2].start_mark
        comments[last] = [None, None, CommentToken(f"{own}\n", mark, None), None]
    for name in [name for name in mapping if name in known and name not in fields]:
        del mapping[name]
        comments.pop(name, None)
    mapping.update({name: value for name, value in fields.items() if name not in mapping})
    if behind:
        last = list(mapping)[-1]
        own = comments[last][2].value if last in comments else "\n"
        comments[last] = [None, None, CommentToken(own + behind, mark, None), None]


def scalar(text: str) -> Any:
    """Parse text like a value in a YAML file; what would not be read back as written there remains text.

    This includes dates and values with a comment, an anchor, an alias or a tag.
    """
    text = text.strip(" \t")
    try:
        events = [event for event in _yaml().parse(text) if isinstance(event, NodeEvent | CollectionEndEvent)]
        whole = events and events[-1].end_mark.index == len(text) and not any(map(_is_marked, events))
        value = _yaml().load(text) if whole else text or None
        return text if isinstance(value, date) else value
    except (YAMLError, ValueError, RecursionError):
        return text


def _is_marked(event: Event) -> bool:
    """Whether a value is an alias, or has an anchor or a tag."""
    return isinstance(event, NodeEvent) and bool(event.anchor or getattr(event, "tag", None))


def integer(text: str) -> int:
    """Parse an integer from the command line with the rules of params.yaml."""
    value = scalar(text)
    if not isinstance(value, int) or isinstance(value, bool):
        raise ValueError
    return value


def number(text: str) -> float:
    """Parse a number from the command line with the rules of params.yaml."""
    value = scalar(text)
    return float(value) if isinstance(value, float) else float(integer(text))


def fill(document: Any, defaults: Any) -> None:
    """Add missing keys of `defaults` to `document`, recursively and in place."""
    for key, value in defaults.items():
        if key not in document:
            document[key] = value
        elif isinstance(value, dict) and isinstance(document[key], dict):
            fill(document[key], value)


def read_yaml(path: Path) -> Any:
    """Read a YAML file as round-trip data, so that its comments are preserved when it is written again.

    Raises:
        SystemFault: the file cannot be read.
        UserError: it is not valid YAML, or not a mapping.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except OSError as error:
        raise SystemFault(path, error) from None
    except UnicodeDecodeError as error:
        raise UserError(f"{path}: not UTF-8 text (byte {error.start}); save it as UTF-8") from None
    return parse(text, path)


def parse(text: str, path: Path) -> Any:
    """Parse the text of a YAML file, or of a part of the file `path`, like `read_yaml`; raises UserError."""
    try:
        document = _yaml().load(text)
        events = _yaml().parse(text) if "!" in text else []  # parsed again only where there may be tags
        tags = [event.tag for event in events if isinstance(event, ScalarEvent | CollectionStartEvent)]
    except (YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML{_where(error)}; correct it") from None
    except RecursionError:
        raise UserError(f"{path}: nested too deeply; expected sections with fields that are values or lists") from None
    if problem := _shared(document, set()):
        raise UserError(f"{path}: {problem}: write the values out")
    if tag := next(filter(None, tags), None):
        raise UserError(f"{path}: tags ({tag}) are not supported: write the value without")
    if not isinstance(document, dict):
        found = "a list" if isinstance(document, list) else shortened(document)
        raise UserError(f"{path}: expected sections with fields, found {found}; `ddpm params` lists them")
    return document


def _where(error: Exception) -> str:
    """Line and problem of an error of the YAML parser."""
    mark, problem = getattr(error, "problem_mark", None), getattr(error, "problem", None) or str(error)
    line = f", line {mark.line + 1}" if mark else ""
    return f"{line}: {' '.join(problem.split())}"


def _shared(value: Any, seen: set[int]) -> str:
    """Describe parts of a document shared by several places, where one change would affect all; empty if none."""
    if isinstance(value, CommentedMap) and value.merge:
        return "merge keys (<<) are not supported"
    if not isinstance(value, dict | list):
        return ""
    if id(value) in seen:
        return "aliases (*name) of sections and lists are not supported"
    seen.add(id(value))
    parts = value.values() if isinstance(value, dict) else value
    return next((problem for part in parts if (problem := _shared(part, seen))), "")


def write_yaml(path: Path, document: Any) -> None:
    """Write a document from `read_yaml`. Symbolic links, the line endings and the mode of the file are preserved.

    Raises UserError if YAML cannot represent a value.
    """
    target, written = path.resolve(), content(document)
    if _yaml().load(written) != document:
        raise UserError(f"{path}: not written, since it would be read back differently; avoid control characters")
    mode = target.stat().st_mode if target.exists() else None
    if mode is not None and b"\r\n" in target.read_bytes():
        written = written.replace(b"\n", b"\r\n")
    write_atomic(target, written)
    if mode is not None:
        target.chmod(mode)


def content(document: Any) -> bytes:
    """Serialize a document from `read_yaml`."""
    buffer = BytesIO()
    _yaml().dump(document, buffer)
    return buffer.getvalue()


def _yaml() -> YAML:
    yaml = YAML(typ="rt", pure=True)
    yaml.Constructor = _Constructor
    yaml.width = sys.maxsize  # a line break inside a value may change it
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml
