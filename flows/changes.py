"""Changes to parameters: single fields, another kind of a choice, migration of old files."""

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffusion.sections import OneOf
from diffusion.upgrade import from_earlier
from flows.made_with import leaves
from flows.params import CHOICES, Params
from flows.yaml_files import fill, keep_alone, overlay, write_yaml


def lay_over(document: Any, changes: Mapping[str, Any]) -> Any:
    """Apply `changes` to the parameters `document`, in place.

    If they select another kind of a choice, fields of the old kind are removed and missing ones get their defaults.
    """
    changes = copy.deepcopy(dict(changes))
    for place, choice in CHOICES.items():
        section, name = _at(changes, place[:-1]), place[-1]
        if not isinstance(section, dict) or name not in section:
            continue
        before, named = _at(document, place), section[name]
        if isinstance(named, dict) and "kind" not in named and isinstance(before, str):
            named = {"kind": before} | named
        kind = _kind(named)
        if kind in choice.names:
            fields = _fields(choice, kind, before) | (named if isinstance(named, dict) else {})
            named = fields if len(fields) > 1 else kind
            if isinstance(before, dict) and isinstance(named, dict):
                keep_alone(before, named, choice.fields)
        section[name] = named
    return overlay(document, changes)


def _fields(choice: OneOf, kind: str, before: Any) -> dict[str, Any]:
    """The fields of a kind, with their previous values where these are valid, else with their defaults."""
    fields = choice.defaults(kind)
    if _kind(before) == kind and isinstance(before, dict):
        for name in fields.keys() & before.keys():
            try:  # another tool may have changed only the kind, so values may not fit it
                choice.kind(kind).model_validate(fields | {name: before[name]})
            except ValidationError:
                if choice.fields & before.keys() - fields.keys():
                    continue
            fields[name] = before[name]
    return fields


def _kind(value: Any) -> Any:
    return value.get("kind") if isinstance(value, dict) else value


def _at(document: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        document = document.get(name) if isinstance(document, dict) else None
    return document


def with_field(changes: Any, place: Sequence[str], value: Any) -> Any:
    """Add a field to changes, such as ("train", "steps"); a choice given by name gains fields.

    Raises:
        ValueError: the field already has a value.
    """
    if not place:
        if changes is not None:
            raise ValueError
        return value
    inside = changes if isinstance(changes, dict) else {} if changes is None else {"kind": changes}
    return inside | {place[0]: with_field(inside.get(place[0]), place[1:], value)}


def update(document: Any) -> None:
    """Convert parameters to the current format, in place, including files of earlier versions.

    Missing fields get their defaults; fields that the chosen kind does not have are removed.
    """
    from_earlier(document)
    kinds: Any = {}
    for place, choice in CHOICES.items():
        if (kind := _kind(_at(document, place))) in choice.names:
            kinds = with_field(kinds, (*place, "kind"), kind)
    lay_over(document, kinds)
    fill(document, lay_over(Params().model_dump(mode="json"), kinds))


def write_changes(path: Path, before: Any, document: Any) -> None:
    """Write parameters, and print what has changed."""
    if document == before:
        print(f"{path}: nothing to change")
        return
    write_yaml(path, document)
    old, new = dict(leaves(before)), dict(leaves(document))
    for name, value in new.items():
        if name not in old or old[name] != value:
            print(f"{name}: {json.dumps(value, ensure_ascii=False)}")
    for name in [name for name in old if name not in new]:
        print(f"{name}: removed")
    if old == new:
        print(f"{path}: the same parameters, rewritten in the form of this version")
