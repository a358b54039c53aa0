"""The flow's parameters, as Prefect's form shows them: for each section of params.yaml, any part of its fields."""

import copy
from enum import StrEnum
from functools import reduce
from operator import or_
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, create_model
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from diffusion.sections import Section
from flows import params, presets
from flows.paths import Paths

Preset = StrEnum("Preset", {name: name for name in presets.names(Paths().presets)})  # type: ignore[misc]
"""Names of the presets in the working tree."""


class Part(BaseModel):
    """Some of a section's fields, for the form; `workspace.document` checks the values, with all others."""

    model_config = ConfigDict(extra="forbid", frozen=True)


NOTHING = Part()
"""The default of every section: unlike None, it lets the form show the section's fields at once."""


def part_of(section: type[Section]) -> type[Part]:
    """A model with the fields of `section`: the same types, limits and descriptions, but none of them required."""

    def optional(field: FieldInfo) -> Any:
        field = copy.copy(field)
        field.default = None
        # Without `"default": null` in the JSON schema, forms and messages speak of the field's own type alone.
        field.json_schema_extra = _without_default
        return field.annotation, field

    fields = {name: optional(field) for name, field in section.model_fields.items()}
    return create_model(section.__name__.removesuffix("Options"), __base__=Part, __doc__=section.__doc__, **fields)


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)
    if "const" in schema:  # which a form would not let be filled in
        schema["enum"] = [schema.pop("const")]


class PartOf:
    """`Annotated[Part, PartOf("train")]` is the type of a part of section `train`."""

    def __init__(self, section: str) -> None:
        choice = params.CHOICES.get((section,))
        sections = choice.options.values() if choice else [params.SECTIONS[section]]
        self.model: Any = reduce(or_, map(part_of, sections))

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(self.model)


def given(parameters: dict[str, Any]) -> dict[str, Any]:
    """What was given of the flow's parameters, to lay over params.yaml; what is null is as there."""
    plain = {name: given(value) if isinstance(value, dict) else value for name, value in parameters.items()}
    return {name: value for name, value in plain.items() if value is not None and value != NOTHING}
