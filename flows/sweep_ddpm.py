"""The flow `sweep-ddpm`: trains with several values of some parameters, and compares the results.

`python -m flows.sweep_ddpm` runs the same without a Prefect server.
"""

import sys
from collections.abc import Sequence
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State

from flows.parameters import Preset
from flows.sweep import flow as sweep
from flows.sweep.options import Objective


# As in train_ddpm.py, the flow checks its parameters itself.
@flow(name="sweep-ddpm", validate_parameters=False)
def sweep_ddpm(
    over: dict[str, Any] | None = None,
    trials: int | None = None,
    at_once: int = 1,
    objective: Objective = "val_mse",
    prune: bool | None = None,
    preset: Preset | None = None,
    fixed: dict[str, Any] | None = None,
    name: str | None = None,
) -> State[Any]:
    """Train with several values of some parameters, and compare the models by their error on validation images.

    Each trial is a run as train-ddpm makes. The same sweep started again goes on where it was stopped.

    Args:
        over: Fields of params.yaml to vary, by dotted name. Each has a list of values,
            {"train.learning_rate": [0.001, 0.002, 0.004]}, or a range of numbers,
            {"train.learning_rate": {"low": 1e-4, "high": 1e-2, "log": true}}.
        trials: How many combinations to try, chosen by Optuna (TPE) from the results so far; needed for ranges. Left
            out, every combination of the values is tried.
        at_once: How many trials run at once.
        objective: Figure by which the trials are compared.
        prune: Whether to stop trials whose held-out error while training is above the median of the completed ones at
            the same step. Left out, this is done if trials is given.
        preset: Preset to use, as in train-ddpm.
        fixed: Fields of params.yaml that all trials change, by dotted name, such as {"train.steps": 500}.
        name: Name of the sweep; its trials are called NAME-0, NAME-1 and so on. Left out, it depends on everything
            above except trials, at_once and prune.
    """
    return sweep.run(locals())


def main(argv: Sequence[str] | None = None) -> int:
    """Run the trials as the flow does, without Prefect's server."""
    return sweep.local(argv)


if __name__ == "__main__":
    sys.exit(main())
