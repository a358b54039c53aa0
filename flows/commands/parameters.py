"""`ddpm params`, `ddpm set` and `ddpm preset`: what the parameters mean, and changes of params.yaml."""

import argparse
import copy
import json
from collections.abc import Collection, Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo

from diffusion.errors import UserError
from diffusion.sections import OneOf
from flows import changes, presets, yaml_files
from flows.made_with import leaves
from flows.params import CHOICES, SECTIONS, Params, read, validate
from flows.paths import Paths


def show(arguments: argparse.Namespace, paths: Paths) -> None:
    """Say what every parameter means, or bring params.yaml up to date."""
    if not arguments.update:
        print("\n".join(described()))
        return
    document = yaml_files.read_yaml(paths.params)
    before = copy.deepcopy(document)
    changes.update(document)
    validate(document, str(paths.params))
    _write(paths.params, before, document)


def assign(arguments: argparse.Namespace, paths: Paths) -> None:
    """Change fields of params.yaml: all that are given, or none."""
    given: Any = {}
    for text in arguments.changes:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r}: must be NAME=VALUE, such as train.steps=500")
        parsed = yaml_files.scalar(value)
        try:
            given = changes.with_field(given, name.split("."), parsed)
        except ValueError:
            raise UserError(f"{name}: given twice; give it once, a choice before its fields") from None
    before = read(paths.params)
    document = changes.lay_over(copy.deepcopy(before), given)
    validate(document, f"{paths.params} with {' '.join(arguments.changes)}")
    _write(paths.params, before, document)


def _write(path: Path, before: Any, document: Any) -> None:
    """Write parameters, and say what has changed."""
    if document == before:
        print(f"{path}: nothing to change")
        return
    yaml_files.write_yaml(path, document)
    old, new = dict(leaves(before)), dict(leaves(document))
    for name, value in new.items():
        if name not in old or old[name] != value:
            print(f"{name}: {json.dumps(value)}")
    for name in [name for name in old if name not in new]:
        print(f"{name}: removed")
    if old == new:
        print(f"{path}: the same parameters, rewritten in the form of this version")


def apply_preset(arguments: argparse.Namespace, paths: Paths) -> None:
    """Write a preset into params.yaml."""
    document = presets.laid_over(read(paths.params), paths.presets, arguments.name)
    validate(document, f"{paths.params} with the preset {arguments.name}")
    yaml_files.write_yaml(paths.params, document)
    print(f"{paths.params} now holds the preset {arguments.name}")


def described() -> Iterator[str]:
    """What each parameter means, a line each."""
    for name, field in Params.model_fields.items():
        section = SECTIONS.get(name)
        if section is None:
            yield _line(name, field)
            continue
        yield f"{name}: {section.__doc__}"
        choice = CHOICES.get((name,))
        if choice:
            yield f"  kind: {', '.join(choice.names)}"
        yield from _fields(section.model_fields, "  ")
        if choice:
            yield from _kinds(choice, "  ", section.model_fields)
            continue
        for key in section.model_fields:
            if choice := CHOICES.get((name, key)):
                yield from _kinds(choice, f"  {key}.", ())


def _kinds(choice: OneOf, prefix: str, shared: Collection[str]) -> Iterator[str]:
    """The fields of each kind but for those that all have."""
    for kind, options in choice.options.items():
        yield f"{prefix}{kind}: {options.__doc__}"
        yield from _fields({key: field for key, field in options.model_fields.items() if key not in shared}, "    ")


def _fields(fields: dict[str, FieldInfo], indent: str) -> Iterator[str]:
    return (_line(indent + name, field) for name, field in fields.items() if name != "kind")


def _line(name: str, field: FieldInfo) -> str:
    return f"{name}: {' '.join((field.description or '').split())}"
