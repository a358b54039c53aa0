"""The flow's parameters, as Prefect's form shows them: for each section of params.yaml, any part of its fields."""

import copy
from collections.abc import Callable
from enum import StrEnum
from functools import reduce
from operator import or_
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, create_model
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from diffusion.errors import UserError
from diffusion.sections import Section
from flows import fields, params, presets
from flows.fields import Parameter
from flows.paths import Paths
from flows.yaml_files import read_yaml

Preset = StrEnum("Preset", {name: name for name in presets.names(Paths().presets)})  # type: ignore[misc]
"""Names of the presets in the working tree."""


class Part(BaseModel):
    """An optional subset of a section's fields, for the form; `workspace.document` validates the values."""

    model_config = ConfigDict(extra="forbid", frozen=True)


NOTHING = Part()
"""The default of every section: unlike None, it lets the form show the section's fields at once."""


def part_of(section: type[Section], place: str, document: Any) -> type[Part]:
    """A model with the fields of `section`: the same types and limits, but none of them required.

    Descriptions also state what a field accepts and its value in `document`, the parameters at deployment time.
    """
    kinds = ("", section.model_fields["kind"].default if "kind" in section.model_fields else "")
    of_section = [each for each in fields.parameters() if each.place[0] == place]

    def optional(name: str, field: FieldInfo) -> Any:
        field = copy.copy(field)
        field.default = None
        field.json_schema_extra = _unset
        if name != "kind":
            (parameter,) = (each for each in of_section if each.place == (place, name) and each.kind in kinds)
            inner = [each for each in of_section if each.place[:-1] == (place, name)]
            texts = [_description(parameter, document), *(_of_kind(each, document) for each in inner)]
            field.description = " ".join(texts)
        return field.annotation, field

    optional_fields = {name: optional(name, field) for name, field in section.model_fields.items()}
    title = section.__name__.removesuffix("Options")
    return create_model(title, __base__=Part, __doc__=section.__doc__, **optional_fields)


def described(flow: Callable[..., Any]) -> Callable[..., Any]:
    """Fill the names of parameters and sections in a flow's docstring, from which the form takes their descriptions."""
    document = _deployed()
    texts = {each.name: _description(each, document) for each in fields.parameters() if len(each.place) == 1}
    texts |= {name: fields.plain(section.__doc__ or "") for name, section in params.SECTIONS.items()}
    flow.__doc__ = (flow.__doc__ or "").format_map(texts)
    return flow


def _description(parameter: Parameter, document: Any) -> str:
    return f"{parameter.description} Accepts: {parameter.takes}.{_present(parameter, document)}"


def _of_kind(parameter: Parameter, document: Any) -> str:
    accepts = f"With {parameter.kind}, {parameter.place[-1]}: {parameter.takes}."
    return accepts + _present(parameter, document)


def _present(parameter: Parameter, document: Any) -> str:
    value = fields.present(document, parameter)
    return "" if value is None else f" In params.yaml at the last `make up`: {fields.as_typed(value)}."


def _deployed() -> Any:
    """params.yaml, for the descriptions; a file that cannot be read is reported when the flow runs."""
    try:
        return read_yaml(Paths().params)
    except UserError:
        return {}


def _unset(schema: dict[str, Any]) -> None:
    """Adapt a field's JSON schema, so that the form leaves it empty, and sends it only if the user fills it in."""
    schema.pop("default", None)
    if "const" in schema:  # which a form would not let be filled in
        schema["enum"] = [schema.pop("const")]
    kinds = schema.get("anyOf", [schema])
    if any(kind.get("type") == "boolean" for kind in kinds):  # for which the form has a switch, and sends false
        schema["enum"] = [True, False, *(kind["const"] for kind in kinds if kind.get("type") != "boolean")]
        schema.pop("type", None)
        schema.pop("anyOf", None)


class PartOf:
    """`Annotated[Part, PartOf("train")]` is the type of a part of section `train`."""

    def __init__(self, section: str) -> None:
        choice = params.CHOICES.get((section,))
        sections = choice.options.values() if choice else [params.SECTIONS[section]]
        document = _deployed()
        self.model: Any = reduce(or_, (part_of(each, section, document) for each in sections))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(self.model)


def given(parameters: dict[str, Any]) -> dict[str, Any]:
    """What was given of the flow's parameters, to lay over params.yaml; what is null is as there."""
    plain = {name: given(value) if isinstance(value, dict) else value for name, value in parameters.items()}
    return {name: value for name, value in plain.items() if value is not None and value != NOTHING}
