"""The parameters of a sweep."""

from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from diffusion.errors import UserError, describe
from diffusion.sections import Positive, Section
from flows.gate import FIGURES

OBJECTIVES = tuple(name for name, figure in FIGURES.items() if "pairs_sha256" not in figure.same)
"""Figures of reports/evaluate.json by which trials are chosen: those that are not measured on test images."""
Objective = Literal[OBJECTIVES]  # type: ignore[valid-type]
MOST_TRIALS = 500


def _covers_something(options: "Options") -> None:
    if not options.over:
        raise ValueError('over: give the fields to vary, such as {"train.learning_rate": [0.001, 0.002, 0.004]}')


def _is_counted(options: "Options") -> None:
    if options.trials is None and (ranges := [name for name, each in options.over.items() if isinstance(each, dict)]):
        raise ValueError(f"over: {ranges[0]} is a range, so trials must be given: how many to try")


class Options(Section):
    """What a sweep tries, and how."""

    rules = (_covers_something, _is_counted)

    over: dict[str, Any] = Field(default={})
    """Fields of params.yaml to vary, by dotted name: a list of values, or a range {low, high, log, step}."""
    trials: Annotated[Positive, Field(le=MOST_TRIALS)] | None = None
    """How many trials Optuna's TPE chooses; None: every combination of the values (a grid)."""
    at_once: Positive = 1
    """How many trials run at once."""
    objective: Objective = "val_mse"
    """Figure by which trials are compared."""
    prune: bool | None = None
    """Whether to stop trials whose held-out error while training is above the median; None: only with `trials`."""
    preset: str | None = None
    """Preset to use, as in train-ddpm."""
    fixed: dict[str, Any] = Field(default={})
    """Fields of params.yaml that all trials change, by dotted name."""
    name: Annotated[str, Field(pattern=r"^\w[\w.-]*$", max_length=60)] | None = None
    """Name of the sweep; None: one that depends on what it tries, so that the same sweep again goes on."""

    @property
    def prunes(self) -> bool:
        """Whether trials are pruned."""
        return self.trials is not None if self.prune is None else self.prune


def read(given: dict[str, Any]) -> Options:
    """Options from plain data; raises UserError with one line that names each wrong field."""
    try:
        return Options.model_validate({name: value for name, value in given.items() if value is not None})
    except ValidationError as error:
        raise UserError(f"parameters of the sweep: {describe(error)}") from None
