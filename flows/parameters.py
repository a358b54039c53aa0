"""The flow's parameters: for each section of params.yaml, a model of which any part may be given."""

import copy
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, GetCoreSchemaHandler, create_model, model_validator
from pydantic.fields import FieldInfo
from pydantic_core import CoreSchema

from diffusion import params, presets
from diffusion.paths import Paths

Preset = StrEnum("Preset", {name: name for name in presets.names(Paths().presets)})  # type: ignore[misc]
"""Names of the presets in the working tree."""


class Part(BaseModel):
    """Some of a section's fields; those left out, or null, are as in params.yaml."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _without_nulls(cls, given: Any) -> Any:
        if isinstance(given, Part):
            return given.model_dump(exclude_unset=True)
        return {name: value for name, value in given.items() if value is not None} if isinstance(given, dict) else given


NOTHING = Part()
"""The default of every section: unlike None, it lets the form show the section's fields at once."""


def part_of(section: type[params.Section]) -> type[Part]:
    """A model with the fields of `section`: the same types, limits and descriptions, but none of them required."""

    def optional(field: FieldInfo) -> Any:
        field = copy.copy(field)
        field.default = None
        # Without `"default": null` in the JSON schema, forms and messages speak of the field's own type alone.
        field.json_schema_extra = _without_default
        return field.annotation, field

    fields = {name: optional(field) for name, field in section.model_fields.items()}
    return create_model(section.__name__, __base__=Part, __doc__=section.__doc__, **fields)


def _without_default(schema: dict[str, Any]) -> None:
    schema.pop("default", None)


class PartOf:
    """`Annotated[Part, PartOf("train")]` is the type of a part of section `train`."""

    def __init__(self, section: str) -> None:
        self.model = part_of(params.SECTIONS[section])

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return handler.generate_schema(self.model)


def given(parameters: dict[str, Any]) -> dict[str, Any]:
    """What was given of the flow's parameters, as plain data to lay over params.yaml."""
    plain = {
        name: value.model_dump(exclude_unset=True, mode="json") if isinstance(value, Part) else value
        for name, value in parameters.items()
    }
    return {name: value for name, value in plain.items() if value not in (None, {})}
