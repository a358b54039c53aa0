"""What the sections of the parameters share: strict types, and all faults reported at once."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from typing import Annotated, Any, ClassVar, Self

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    GetCoreSchemaHandler,
    ModelWrapValidatorHandler,
    ValidationError,
    ValidationInfo,
    model_validator,
)
from pydantic_core import CoreSchema, InitErrorDetails, PydanticCustomError, core_schema

COMPLETE = {"complete": True}
"""As the context of a validation: whatever is not given is an error, instead of taking its default."""


class Section(BaseModel):
    """Frozen fields of strict types, no unknown keys, a docstring per field (shown in Prefect's form).

    Only an int is taken for an int, an int or a float for a float, a list or a tuple for a tuple, and so on: a value
    means the same in params.yaml, on the command line and in Prefect.
    """

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        strict=True,
        use_attribute_docstrings=True,
        allow_inf_nan=False,
    )

    rules: ClassVar[tuple[Callable[[Any], None], ...]] = ()
    """What checks that fields fit together; each rule is applied if the fields that it reads are right."""

    @model_validator(mode="wrap")
    @classmethod
    def _all_faults(cls, given: Any, handler: ModelWrapValidatorHandler[Self], info: ValidationInfo) -> Self:
        """Report wrong fields and broken rules together; pydantic's validators would wait until no field is wrong."""
        faults: list[InitErrorDetails] = []
        if info.context == COMPLETE and isinstance(given, Mapping):
            missing = [name for name in cls.model_fields if name not in given]
            faults = [InitErrorDetails(type="missing", loc=(name,), input=given) for name in missing]
        made: Any = None
        try:
            made = handler(given)
        except ValidationError as error:
            found = error.errors(include_url=False)
            faults += [
                InitErrorDetails(type=fault["type"], loc=fault["loc"], input=fault["input"], ctx=fault.get("ctx", {}))
                for fault in found
            ]
        if faults:
            # A broken rule says nothing against the single fields.
            made = _Right(given, [fault["loc"] for fault in faults if fault["type"] != "value_error"])
        for rule in cls.rules:
            try:
                with suppress(_Unknown):
                    rule(made)
            except ValueError as error:
                faults.append(InitErrorDetails(type="value_error", input=given, ctx={"error": error}))
        if faults:
            raise ValidationError.from_exception_data(cls.__name__, faults)
        return made


class _Unknown(Exception):
    """A rule reads a field that is missing or wrong."""


class _Right:
    """The fields of a section that are right by themselves."""

    def __init__(self, given: Any, wrong: list[tuple[int | str, ...]]) -> None:
        self._given, self._wrong = given, wrong

    def __getattr__(self, name: str) -> Any:
        if () in self._wrong or name not in self._given:
            raise _Unknown
        value = self._given[name]
        within = [loc[1:] for loc in self._wrong if loc[0] == name]
        if isinstance(value, Mapping):
            return _Right(value, within)
        if within:
            raise _Unknown
        return value


def _as_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


LIST = BeforeValidator(_as_tuple)
"""Marks a tuple that is written as a list."""


LARGEST = 2**53
"""Larger whole numbers are not the same in every program that reads JSON."""
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]


class OneOf:
    """Marks a text that is one of the names in a registry."""

    def __init__(self, registry: Iterable[str]) -> None:
        self.names = tuple(registry)

    def __get_pydantic_core_schema__(self, source: Any, handler: GetCoreSchemaHandler) -> CoreSchema:
        return core_schema.literal_schema(list(self.names))


def exactly(*allowed: bool | int | str) -> BeforeValidator:
    """Marks a choice of values that are compared by type too: pydantic takes true and 1.0 for the literal 1."""

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
