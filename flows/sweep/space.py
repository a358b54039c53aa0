"""What a sweep varies: the values of each field, checked, and the parameters of each trial."""

import copy
import itertools
import json
import math
import sys
import warnings
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from pydantic import BeforeValidator, ValidationError

from diffusion.errors import UserError, describe, shortened
from diffusion.sections import Section
from flows import dvc_yaml, fields, workspace
from flows.changes import lay_over, with_field
from flows.made_with import leaves
from flows.params import Params, validate
from flows.stages import STAGES
from flows.sweep.options import MOST_TRIALS, Options

Values = dict[str, Any]
"""Values of the fields that a sweep varies, by dotted name."""


def _number(value: Any) -> int | float:
    """Refuse what is not a finite number, in one message instead of one for each type of the union."""
    limit = sys.float_info.max
    if isinstance(value, bool) or not isinstance(value, int | float) or not -limit <= value <= limit:
        raise ValueError(f"must be a number (got {shortened(value)})")
    return value


def _is_range(each: "Range") -> None:
    if each.low > each.high:
        raise ValueError(f"low ({each.low}) is above high ({each.high})")
    if each.log and each.low <= 0:
        raise ValueError("low must be above 0 with log")
    if each.step is not None and (each.step <= 0 or each.log):
        raise ValueError("step must be above 0, and cannot be combined with log")


Number = Annotated[int | float, BeforeValidator(_number)]


class Range(Section):
    """An interval of numbers, ends included."""

    rules = (_is_range,)

    low: Number
    """Its lower end."""
    high: Number
    """Its upper end."""
    log: bool = False
    """Draw uniformly in the logarithm."""
    step: Number | None = None
    """Draw `low` plus multiples of this."""


@dataclass(frozen=True)
class Space:
    """The parameters of a sweep's trials."""

    base: Any
    """Those that trials share, as `workspace.document` gives them."""
    fields: Mapping[str, list[Any] | Range]
    """What varies, by dotted name."""

    def document(self, values: Values) -> Any:
        """The parameters of the trial with these values; raises UserError naming them if they are invalid."""
        document = lay_over(copy.deepcopy(self.base), _nested("over", values))
        shown = ", ".join(f"{name}: {json.dumps(value)}" for name, value in values.items())
        validate(document, f"over, trial with {shown}")
        return document

    def grid(self) -> Iterator[Values]:
        """Every combination of the values, the last field changing fastest; of a range, its ends."""
        choices = [[each.low, each.high] if isinstance(each, Range) else each for each in self.fields.values()]
        for combination in itertools.product(*choices):
            yield dict(zip(self.fields, combination, strict=True))

    def distributions(self) -> dict[str, BaseDistribution]:
        """The same for Optuna. Listed values are JSON text, since it takes no lists or mappings."""
        found: dict[str, BaseDistribution] = {}
        for name, each in self.fields.items():
            try:
                with warnings.catch_warnings(action="ignore", category=UserWarning):  # that it lowers `high` to a step
                    found[name] = _distribution(name, each)
            except ValueError as error:
                raise UserError(f"over: {name}: {error}") from None
        return found

    def to_optuna(self, values: Values) -> dict[str, Any]:
        """Values of a grid's trial as Optuna holds them."""
        return {name: json.dumps(value) for name, value in values.items()}

    def from_optuna(self, values: Mapping[str, Any]) -> Values:
        """Values as in params.yaml."""
        return {
            name: values[name] if isinstance(each, Range) else json.loads(values[name])
            for name, each in self.fields.items()
        }

    @property
    def changes_data(self) -> bool:
        """Whether trials may be measured on different validation pairs."""
        made = [part for stage in ("shard", "pairs") for part in dvc_yaml.parameters(stage)]
        return any(_within(name, part) or _within(part, name) for name in self.fields for part in made)


def read(options: Options) -> Space:
    """The space of a sweep; raises UserError in one line unless all trials of a grid, or the ends, are valid."""
    base = workspace.document(options.preset, _nested("fixed", options.fixed))
    space = Space(base, {name: _field(name, given) for name, given in options.over.items()})
    fixed = {leaf for leaf, _ in leaves(_nested("fixed", options.fixed))}
    for name, each in space.fields.items():
        for value in [0] if isinstance(each, Range) else each:
            if twice := next((leaf for leaf, _ in leaves(_nested("over", {name: value})) if leaf in fixed), None):
                raise UserError(f"fixed: {twice}: is in over as well; give it once")
    if options.prune and space.changes_data:
        raise UserError(
            "prune: trials may be measured on different validation pairs, whose errors cannot be compared; leave it out"
        )
    combinations = math.prod(len(each) for each in space.fields.values() if isinstance(each, list))
    if options.trials is None:
        if combinations > MOST_TRIALS:
            raise UserError(
                f"over: {combinations:,} combinations, more than {MOST_TRIALS}; list fewer values, or give trials, the "
                "number of combinations to try"
            )
        for values in space.grid():
            space.document(values)
    else:  # each value once, with the first ones of the other fields
        first = next(space.grid())
        for name, each in space.fields.items():
            for value in [each.low, each.high] if isinstance(each, Range) else each:
                space.document(first | {name: value})
    space.distributions()
    return space


def _field(name: str, given: Any) -> list[Any] | Range:
    determining = {part for stage in STAGES for part in dvc_yaml.parameters(stage)} - {"device"}
    section = name.partition(".")[0]
    if section in Params.model_fields and not any(_within(name, part) or _within(part, name) for part in determining):
        raise UserError(f"over: {name}: no training depends on it")
    if isinstance(given, list):
        if not given:
            raise UserError(f"over: {name}: the list is empty; give the values to try")
        texts = [json.dumps(value) for value in given]
        if twice := next((text for text in texts if texts.count(text) > 1), None):
            raise UserError(f"over: {name}: {twice} is listed twice")
        return given
    if isinstance(given, dict):
        try:
            return Range.model_validate(given)
        except ValidationError as error:
            raise UserError(f"over: {describe(error, lambda place: '.'.join((name, *map(str, place))))}") from None
    raise UserError(f"over: {name}: must be a list of values, or a range with low and high (got {shortened(given)})")


def _distribution(name: str, each: list[Any] | Range) -> BaseDistribution:
    """Raises ValueError if the range is none of this field."""
    if isinstance(each, list):
        return CategoricalDistribution([json.dumps(value) for value in each])
    takes = next((field.takes for field in fields.parameters() if field.name == name), "")
    if takes.startswith("integer"):
        if each.step is not None and each.step != int(each.step):
            raise ValueError("step must be a whole number")
        return IntDistribution(int(each.low), int(each.high), log=each.log, step=int(each.step or 1))
    if "number" in takes:
        return FloatDistribution(float(each.low), float(each.high), log=each.log, step=each.step)
    raise ValueError(f"takes {takes or 'fields'}, so list the values to try instead of a range")


def _nested(origin: str, values: Mapping[str, Any]) -> dict[str, Any]:
    """Values by dotted name as `lay_over` takes them."""
    nested: dict[str, Any] = {}
    for name, value in values.items():
        try:
            nested = with_field(nested, name.split("."), value)
        except ValueError:
            raise UserError(f"{origin}: {name}: another entry sets it as well") from None
    return nested


def _within(name: str, part: str) -> bool:
    """Whether a field is, or is in, a section or field: train.steps in train."""
    return f"{name}.".startswith(f"{part}.")
