"""Changes of parameters, as plain data: fields laid over a document, choices of another kind, earlier versions."""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

from diffusion.sections import OneOf
from diffusion.upgrade import from_format_1
from flows.params import CHOICES, Params
from flows.yaml_files import fill, overlay


def lay_over(document: Any, changes: Mapping[str, Any]) -> Any:
    """Lay `changes` over the parameters `document`, in place.

    Where they name the kind of a choice, the fields of another kind go, and those of this kind that are given nowhere
    take their defaults.
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
        section[name] = _chosen(choice, kind, before, named) if kind in choice.names else named
    return overlay(document, changes)


def _chosen(choice: OneOf, kind: str, before: Any, named: Any) -> Any:
    """A choice with all fields of its kind; what `before` has of another kind is deleted from it."""
    full = choice.defaults(kind)
    if isinstance(before, dict):
        foreign = choice.fields & before.keys() - full.keys()
        if _kind(before) == kind and not foreign:  # else another tool has changed the kind alone
            full |= {name: before[name] for name in full if name in before}
        for name in foreign:
            del before[name]
    full |= named if isinstance(named, dict) else {}
    return full if len(full) > 1 else kind


def _kind(value: Any) -> Any:
    return value.get("kind") if isinstance(value, dict) else value


def _at(document: Any, place: tuple[str, ...]) -> Any:
    for name in place:
        document = document.get(name) if isinstance(document, dict) else None
    return document


def with_field(changes: Any, place: Sequence[str], value: Any) -> Any:
    """Changes, and another field: `train.steps` is at ("train", "steps"); a choice that is given by name has fields."""
    if not place:
        return value
    inside = changes if isinstance(changes, dict) else {} if changes is None else {"kind": changes}
    return inside | {place[0]: with_field(inside.get(place[0]), place[1:], value)}


def update(document: Any) -> None:
    """Bring parameters, of an earlier version too, into the form of this one, in place: what is missing gets its
    default, and fields of another kind than the one chosen go."""
    from_format_1(document)
    kinds: dict[str, Any] = {}
    for place, choice in CHOICES.items():
        if (kind := _kind(_at(document, place))) in choice.names:
            value: Any = {"kind": kind}
            for name in reversed(place):
                value = {name: value}
            overlay(kinds, value)
    lay_over(document, kinds)
    fill(document, lay_over(Params().model_dump(mode="json"), kinds))
