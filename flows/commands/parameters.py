"""`ddpm params`, `ddpm set` and `ddpm preset`: what the parameters mean, and changes of params.yaml."""

import argparse
import json
from collections.abc import Collection, Iterator
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
    before = dict(leaves(document))
    changes.update(document)
    validate(document, str(paths.params))
    yaml_files.write_yaml(paths.params, document)
    after = dict(leaves(document))
    changed = {name: value for name, value in after.items() if name not in before or before[name] != value}
    for name, value in changed.items():
        print(f"{name}: {json.dumps(value)}")
    for name in before.keys() - after.keys():
        print(f"{name}: gone")
    print(f"{paths.params} {'is up to date now' if before != after else 'was up to date'}")


def assign(arguments: argparse.Namespace, paths: Paths) -> None:
    """Change fields of params.yaml: all that are given, or none."""
    given: Any = {}
    for text in arguments.changes:
        name, equals, value = text.partition("=")
        if not equals:
            raise UserError(f"{text!r}: must be NAME=VALUE, such as train.steps=500")
        try:
            given = changes.with_field(given, name.split("."), yaml_files.scalar(value))
        except ValueError:
            raise UserError(f"{name}: given twice; give it once, a choice before its fields") from None
    told = " ".join(arguments.changes)
    document = changes.lay_over(read(paths.params), given)
    validate(document, f"{paths.params} with {told}")
    yaml_files.write_yaml(paths.params, document)
    print(f"{paths.params} now has {told}")


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
