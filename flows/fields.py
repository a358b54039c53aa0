"""What each parameter takes: its type, choices and limits as text, for `ddpm params` and Prefect's form."""

import json
from collections.abc import Iterator, Mapping
from functools import cache
from typing import Any, NamedTuple

from diffusion.sections import LARGEST, OneOf, Section
from flows.params import SECTIONS, Params

_TYPES = {"integer": "integer", "number": "number", "string": "text"}


class Parameter(NamedTuple):
    """One field of params.yaml."""

    place: tuple[str, ...]
    """Where it is: ("train", "steps"), or ("sample", "sampler", "eta") for a field of a choice."""
    kind: str
    """The kind of the choice that has this field; empty if the field is always there."""
    takes: str
    """Its type, choices and limits."""
    default: Any
    description: str

    @property
    def name(self) -> str:
        """As in `ddpm set`: train.steps."""
        return ".".join(self.place)


@cache  # the form asks for them once per section
def parameters() -> tuple[Parameter, ...]:
    """All parameters, in the order of params.yaml; after a choice, the fields of its kinds."""
    return tuple(_parameters())


def _parameters() -> Iterator[Parameter]:
    defaults = Params().model_dump(mode="json")
    for name, field in Params.model_fields.items():
        if name in SECTIONS and not _choice(Params, name):
            yield from _of_section((name,), SECTIONS[name], defaults[name])
        else:
            choice = _choice(Params, name)
            place = (name, "kind") if choice else (name,)
            default = defaults[name]["kind"] if choice else defaults[name]
            kinds = choice.options.items() if choice else ()
            description = " ".join(f"{kind}: {options.__doc__}" for kind, options in kinds) or field.description or ""
            yield Parameter(place, "", takes(Params, name), default, plain(description))
            if choice:
                yield from _of_kinds((name,), choice)


def _of_section(place: tuple[str, ...], section: type[Section], defaults: Mapping[str, Any]) -> Iterator[Parameter]:
    for name, field in section.model_fields.items():
        here, default = (*place, name), defaults[name]
        if choice := _choice(section, name):
            default = default["kind"] if isinstance(default, dict) else default
        yield Parameter(here, "", takes(section, name), default, plain(field.description or ""))
        if choice:
            yield from _of_kinds(here, choice)


def _of_kinds(place: tuple[str, ...], choice: OneOf) -> Iterator[Parameter]:
    for kind, options in choice.options.items():
        defaults = choice.defaults(kind)
        for name, field in options.model_fields.items():
            if name != "kind":
                yield Parameter(
                    (*place, name), kind, takes(options, name), defaults[name], plain(field.description or "")
                )


def takes(section: type[Section], name: str) -> str:
    """What a field of a section takes: `integer, at least 1`, or its choices `linear | cosine`."""
    mark = next((mark for mark in section.model_fields[name].metadata if isinstance(mark, OneOf)), None)
    if mark is not None:
        return " | ".join(mark.names)
    return _takes(_properties(section)[name])


@cache
def _properties(section: type[Section]) -> Mapping[str, Any]:
    """The JSON schemas of a section's fields."""
    properties: Mapping[str, Any] = section.model_json_schema()["properties"]
    return properties


def plain(text: str) -> str:
    """A docstring in one line."""
    return " ".join(text.split())


def _choice(section: type[Section], name: str) -> OneOf | None:
    """The marker of a field whose kinds can have fields."""
    marks = [mark for mark in section.model_fields[name].metadata if isinstance(mark, OneOf)]
    return marks[0] if marks and marks[0].options else None


def _takes(schema: Mapping[str, Any]) -> str:
    if "anyOf" in schema:
        return " | ".join(map(_takes, schema["anyOf"]))
    if "const" in schema or "enum" in schema or "examples" in schema:
        return " | ".join(map(str, schema.get("enum") or schema.get("examples") or [schema["const"]]))
    if schema["type"] == "boolean":
        return "true | false"
    if schema["type"] == "object":  # the kind of a choice with fields
        return schema["title"]
    if schema["type"] == "array":
        items, plural = schema["items"], "s, each"
        named = "enum" in items or "anyOf" in items or items.get("type") == "object"
        return f"list of {_takes(items)}" if named else f"list of {_limited(items, plural)}"
    return _limited(schema, ",")


def _limited(schema: Mapping[str, Any], before_limits: str) -> str:
    limits = " and ".join(_limits(schema))
    return _TYPES[schema["type"]] + (f"{before_limits} {limits}" if limits else "")


def _limits(schema: Mapping[str, Any]) -> Iterator[str]:
    for key, words in (("minimum", "at least"), ("exclusiveMinimum", "above")):
        if key in schema:
            yield f"{words} {schema[key]:g}"
    if schema.get("maximum", LARGEST) < LARGEST:
        yield f"at most {schema['maximum']:g}"
    if "exclusiveMaximum" in schema:
        yield f"below {schema['exclusiveMaximum']:g}"
    if "multipleOf" in schema:
        yield f"a multiple of {schema['multipleOf']}"


def present(document: Any, parameter: Parameter) -> Any:
    """A parameter's value in a document like params.yaml; None if it has none there (a field of another kind, say)."""
    *most, last = parameter.place
    for name in most:
        document = document.get(name) if isinstance(document, Mapping) else None
    if isinstance(document, Mapping):
        value = document.get(last) if parameter.kind in ("", document.get("kind")) else None
        return value.get("kind") if isinstance(value, Mapping) else value
    return None


def as_typed(value: Any) -> str:
    """A value as `ddpm set` takes it."""
    return value if isinstance(value, str) else json.dumps(value, default=str, ensure_ascii=False)
