"""Base classes of parameter sections: strict types, choices by name, and all errors reported at once."""

from collections.abc import Callable, Collection, Iterable, Mapping
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    GetJsonSchemaHandler,
    ModelWrapValidatorHandler,
    SerializationInfo,
    SerializerFunctionWrapHandler,
    ValidationError,
    ValidationInfo,
    WithJsonSchema,
    model_serializer,
    model_validator,
)
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, ErrorDetails, InitErrorDetails, PydanticCustomError, core_schema

NO_CHOICE, OF_ANOTHER_KIND = OURS = ("choice_type", "of_another_kind")
"""Custom error types."""

COMPLETE = {"complete": True}
"""Validation context in which missing fields are errors instead of taking their defaults."""
_FIELDS_ALONE = {"fields alone": True}
"""Validation context that skips the rules."""


class Section(BaseModel):
    """A frozen section of parameters with strict types, no unknown keys, and a default and docstring per field.

    Values are not coerced, except int to float and list to tuple, so that a value means the same in a file, on the
    command line and in a form.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    rules: ClassVar[tuple[Callable[[Any], None], ...]] = ()
    """Checks across fields, which raise ValueError; a rule only runs if all fields that it reads are valid."""

    @model_validator(mode="wrap")
    @classmethod
    def _all_faults(cls, given: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Report invalid fields and violated rules together; pydantic only runs model validators on valid fields."""
        if info.context == _FIELDS_ALONE:
            return handler(given)
        faults: list[InitErrorDetails] = []
        if info.context == COMPLETE and isinstance(given, Mapping):
            missing = [name for name in cls.model_fields if name not in given]
            faults = [InitErrorDetails(type="missing", loc=(name,), input=given) for name in missing]
        section: Any = None
        try:
            section = handler(given)
        except ValidationError as error:
            faults += map(_again, error.errors(include_url=False))
        if faults:
            # A violated rule of a nested section does not make its fields invalid.
            wrong = [fault["loc"] for fault in faults if fault["type"] != "value_error"]
            with suppress(ValidationError):
                section = _ValidFields(cls.model_validate(_without(given, wrong), context=_FIELDS_ALONE), wrong)
        for rule in cls.rules if section is not None else ():
            try:
                with suppress(_InvalidField):
                    rule(section)
            except ValueError as error:
                faults.append(InitErrorDetails(type="value_error", input=given, ctx={"error": error}))
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return section


class _InvalidField(Exception):
    """A rule reads a field that is missing or invalid."""


class _ValidFields:
    """View of a section's valid fields."""

    def __init__(self, section: Section, wrong: Collection[tuple[int | str, ...]]) -> None:
        self._section, self._wrong = section, wrong

    def __getattr__(self, name: str) -> Any:
        value, within = getattr(self._section, name), _within(name, self._wrong)
        if not within:
            return value
        if isinstance(value, Section) and not _whole(within):
            return _ValidFields(value, within)
        raise _InvalidField


def _within(name: str, places: Iterable[tuple[int | str, ...]]) -> list[tuple[int | str, ...]]:
    """The error locations inside a field, relative to it."""
    return [place[1:] for place in places if place[:1] == (name,)]


def _whole(places: Collection[tuple[int | str, ...]]) -> bool:
    """Whether a field is invalid as a whole; a choice is, if its kind is."""
    return () in places or ("kind",) in places


def _without(given: Any, wrong: Collection[tuple[int | str, ...]]) -> Any:
    """The input without its invalid parts, which then take their defaults."""
    if not isinstance(given, Mapping):
        return given
    kept = {}
    for name, value in given.items():
        within = _within(name, wrong)
        if not within or (isinstance(value, Mapping) and not _whole(within)):
            kept[name] = _without(value, within)
    return kept


def _again(fault: ErrorDetails) -> InitErrorDetails:
    """Convert an error of one validation for re-raising in another."""
    known = PydanticCustomError(fault["type"], fault["msg"]) if fault["type"] in OURS else fault["type"]
    return InitErrorDetails(type=known, loc=fault["loc"], input=fault["input"], ctx=fault.get("ctx", {}))


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


LIST = BeforeValidator(_as_tuple)
"""Marks a tuple that may be given as a list."""


LARGEST = 2**53
"""Larger integers are not represented exactly by all JSON readers."""
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


def _fraction_or_auto(value: Any) -> Any:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if value != "auto" and not (number and 0 <= value < 1):
        expected = "'auto' or a number from 0 to below 1"
        raise PydanticCustomError("literal_error", "Input should be {expected}", {"expected": expected})
    return value


_OR_AUTO = {"anyOf": [{"type": "string", "enum": ["auto"]}, {"type": "number", "minimum": 0, "exclusiveMaximum": 1}]}
AutoFraction = Annotated[float | Literal["auto"], BeforeValidator(_fraction_or_auto), WithJsonSchema(_OR_AUTO)]
Channels = Annotated[int, Field(ge=8, le=LARGEST, multiple_of=8)]


def _named_by_its_kind(schema: dict[str, Any]) -> None:
    """Replace `const` by `enum` in a JSON schema, since forms cannot fill in a `const`."""
    kind = schema["properties"]["kind"]
    if "const" in kind:
        schema["title"] = kind["const"]
        kind["enum"] = [kind.pop("const")]


class Choice(Section):
    """A choice by name (`kind`), with the fields of that kind.

    A kind without further fields is serialized as its name.
    """

    model_config = ConfigDict(json_schema_extra=_named_by_its_kind)

    kind: str
    """Name of the choice."""

    @model_serializer(mode="wrap")
    def _name_alone(self, handler: SerializerFunctionWrapHandler) -> Any:
        return handler(self) if len(type(self).model_fields) > 1 else self.kind


class OneOf:
    """Annotation for a choice among the names of a registry.

    If no name has options, the value is a string. Otherwise it is a `Choice`, where `options` maps each name that has
    fields to its subclass, and can be given as a name (for the defaults), a mapping, or an instance. Annotate such a
    field as Any, so that type checkers accept a name.
    """

    def __init__(self, registry: Iterable[str], options: Mapping[str, type[Choice]] | None = None) -> None:
        self.names, self.options = tuple(registry), options or {}

    def kind(self, name: str) -> type[Choice]:
        """The `Choice` subclass of a name."""
        return self.options.get(name, Choice)

    def defaults(self, name: str) -> dict[str, Any]:
        """The default fields of a name, including `kind`, as JSON-compatible data."""
        return self.options[name](kind=name).model_dump(mode="json") if name in self.options else {"kind": name}

    @property
    def fields(self) -> set[str]:
        """Names of the fields of all choices."""
        return {field for kind in self.options.values() for field in kind.model_fields}

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        if not self.options:
            return core_schema.literal_schema(list(self.names))
        return core_schema.with_info_plain_validator_function(
            self._validate,
            serialization=core_schema.plain_serializer_function_ser_schema(_dump, info_arg=True),
        )

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        if not self.options:
            return handler(schema)
        kinds = [handler(kind.__pydantic_core_schema__) for kind in self.options.values()]
        plain = [name for name in self.names if name not in self.options]
        return {"anyOf": [{"type": "string", "enum": plain}, *kinds] if plain else kinds}

    def _validate(self, given: Any, info: ValidationInfo) -> Choice:
        value = {"kind": given} if isinstance(given, str) else given
        if isinstance(value, Choice):
            value = {name: getattr(value, name) for name in type(value).model_fields}
        if not isinstance(value, Mapping):
            raise PydanticCustomError(NO_CHOICE, "Input should be a name, or a kind with its fields")
        kind, at = value.get("kind"), () if isinstance(given, str) else ("kind",)
        if "kind" not in value:
            raise _fault("missing", at, given)
        if kind not in self.names:
            *most, last = map(repr, self.names)
            raise _fault("literal_error", at, kind, expected=f"{', '.join(most)} or {last}")
        try:
            return self.kind(kind).model_validate(value, context=info.context)
        except ValidationError as error:
            faults = [_again(fault) for fault in error.errors(include_url=False)]
            for fault in faults:
                if fault["type"] == "extra_forbidden":
                    fault["type"] = PydanticCustomError(OF_ANOTHER_KIND, f"no such parameter of {kind}")
            raise ValidationError.from_exception_data(error.title, faults) from None


class SomeOf:
    """Annotation for a mapping with some of a section's fields, by name; annotate such a field as Any.

    Each is validated as in the section, and the others remain absent, which is no error here.
    """

    def __init__(self, section: type[Section], title: str, without: Collection[str] = ()) -> None:
        self.section, self.title = section, title
        self.names = tuple(name for name in section.model_fields if name not in without)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.no_info_plain_validator_function(self._validate)

    def __get_pydantic_json_schema__(self, schema: CoreSchema, handler: GetJsonSchemaHandler) -> JsonSchemaValue:
        whole = handler.resolve_ref_schema(handler(self.section.__pydantic_core_schema__))
        fields = {name: {**whole["properties"][name]} for name in self.names}
        for field in fields.values():
            field.pop("default", None)
        return {"type": "object", "title": self.title, "properties": fields, "additionalProperties": False}

    def _validate(self, given: Any) -> dict[str, Any]:
        if not isinstance(given, Mapping):
            raise _fault("model_type", (), given, class_name=self.title)
        if unknown := [name for name in given if name not in self.names]:
            faults = [InitErrorDetails(type="extra_forbidden", loc=(name,), input=given[name]) for name in unknown]
            raise ValidationError.from_exception_data(self.title, faults)
        valid = self.section.model_validate(dict(given)).model_dump(mode="json")
        return {name: valid[name] for name in given}


def _fault(name: str, at: tuple[str, ...], given: Any, **context: str) -> ValidationError:
    return ValidationError.from_exception_data("", [InitErrorDetails(type=name, loc=at, input=given, ctx=context)])


def _dump(choice: Choice, info: SerializationInfo) -> Any:
    return choice.model_dump(mode=info.mode)


def exactly(*allowed: bool | int | str) -> BeforeValidator:
    """Annotation for literal values that are also compared by type; pydantic accepts true and 1.0 for the literal 1."""

    def kind(value: Any) -> tuple[bool, ...]:
        return tuple(isinstance(value, each) for each in (bool, int, str))

    def one_of_them(value: Any) -> Any:
        if not any(value == each and kind(value) == kind(each) for each in allowed):
            names = [str(each).lower() if isinstance(each, bool) else repr(each) for each in allowed]
            raise PydanticCustomError(
                "literal_error", "Input should be {expected}", {"expected": f"{', '.join(names[:-1])} or {names[-1]}"}
            )
        return value

    return BeforeValidator(one_of_them)
