"""The parameters of a sweep."""

import json
from pathlib import Path
from typing import Any

import optuna
import pytest

from flows import sweep_ddpm
from flows.sweep import options, space, study

pytestmark = pytest.mark.slow

RATE = {"train.learning_rate": [0.001]}


@pytest.mark.parametrize(
    ("given", "prunes"),
    [({}, False), ({"trials": 9}, True), ({"prune": True}, True), ({"trials": 9, "prune": False}, False)],
)
def test_by_default_only_what_optuna_chooses_is_pruned(given: dict[str, Any], prunes: bool) -> None:
    assert options.read({"over": RATE} | given).prunes is prunes


@pytest.mark.parametrize(("direction", "sign"), [("minimize", 1), ("maximize", -1)])
def test_a_higher_error_is_pruned_whatever_the_objective(direction: str, sign: int) -> None:
    kept = optuna.create_study(direction=direction, pruner=optuna.pruners.MedianPruner(n_startup_trials=1))
    pruned = []
    for error in (0.5, 0.9, 0.1):
        trial = study.Trial(kept.ask(), "", {}, sign)
        trial.report(10, error)
        pruned.append(trial.should_prune())
        kept.tell(trial.number, 1.0)
    assert pruned == [False, True, False]


@pytest.mark.parametrize(
    ("field", "changes"),
    [("seed", True), ("process.schedule", True), ("process.parameterization", False), ("train", False)],
)
@pytest.mark.usefixtures("repository")
def test_errors_on_other_validation_pairs_prune_nothing(field: str, changes: bool) -> None:
    values = {"seed": 1, "process.schedule": "linear", "process.parameterization": "eps", "train": {"steps": 5}}
    given = options.read({"over": {field: [values[field]]}, "trials": 1})
    varied = space.read(given)
    assert varied.changes_data is changes
    with study.opened("lr", given, varied) as trials:
        assert trials.prunes is not changes


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "parameters of the sweep: over: give the fields to vary, such as"),
        ({"over": {"train.lr": [1]}}, "over, trial with train.lr: 1: train.lr: no such parameter"),
        (
            {"over": {"train.steps": [5, "6"]}},
            'over, trial with train.steps: "6": train.steps: input should be a valid',
        ),
        (
            {"over": {"train.steps": 5}},
            "over: train.steps: must be a list of values, or a range with low and high (got 5)",
        ),
        ({"over": {"train.steps": []}}, "over: train.steps: the list is empty"),
        ({"over": {"train.steps": [5, 5]}}, "over: train.steps: 5 is listed twice"),
        ({"over": {"train.steps": [5], "train": [{"steps": 6}]}}, "over: train: another entry sets it as well"),
        ({"over": {"tracking.experiment": ["a"]}}, "over: tracking.experiment: no training depends on it"),
        ({"over": {"distill.steps": [1]}}, "over: distill.steps: no training depends on it"),
        (
            {"over": {"train.steps": {"low": 1, "high": 9}}},
            "parameters of the sweep: over: train.steps is a range, so trials",
        ),
        (
            {"over": {"train.steps": {"low": 9, "high": 1}}, "trials": 2},
            "over: train.steps: low (9) is above high (1)",
        ),
        (
            {"over": {"train.learning_rate": {"low": float("nan"), "high": 1}}, "trials": 2},
            "over: train.learning_rate.low: must be a number (got nan)",
        ),
        ({"over": {"train.steps": {"low": True, "high": 9}}, "trials": 2}, "over: train.steps.low: must be a number"),
        (
            {"over": {"train.steps": {"low": 1, "high": 9, "step": 0.5}}, "trials": 2},
            "over: train.steps: step must be a whole number",
        ),
        (
            {"over": {"train.steps": {"low": 1, "high": 9, "step": 0}}, "trials": 2},
            "over: train.steps: step must be above 0",
        ),
        (
            {"over": {"train.learning_rate": {"low": 0, "high": 1, "log": True}}, "trials": 2},
            "over: train.learning_rate: low must be above 0 with log",
        ),
        (
            {"over": {"train.learning_rate": {"low": 0.1, "high": 1, "log": True, "step": 0.1}}, "trials": 2},
            "over: train.learning_rate: step must be above 0, and cannot be combined with log",
        ),
        (
            {"over": RATE, "fixed": {"train": {"learning_rate": 0.1}}},
            "fixed: train.learning_rate: is in over as well; give it once",
        ),
        ({"over": {"train.steps": {"low": 1}}, "trials": 2}, "over: train.steps.high: missing"),
        (
            {"over": {"train.steps": {"low": 0, "high": 9}}, "trials": 2},
            "over, trial with train.steps: 0: train: steps and epochs are both 0",
        ),
        (
            {"over": {"process.schedule": {"low": 0, "high": 9}}, "trials": 2},
            "over, trial with process.schedule: 0: process.schedule: ",
        ),
        (
            {"over": {"seed": list(range(501))}},
            "over: 501 combinations, more than 500; list fewer values, or give trials",
        ),
        ({"over": RATE, "trials": 501}, "parameters of the sweep: trials: input should be less than or equal to 500"),
        ({"over": {"seed": [0, 1]}, "prune": True}, "prune: trials may be measured on different validation pairs, "),
        ({"over": RATE, "at_once": 0}, "parameters of the sweep: at_once: "),
        ({"over": RATE, "objective": "mse"}, "parameters of the sweep: objective: input should be 'val_mse', "),
        (
            {"over": RATE, "objective": "bits_per_dim"},
            "parameters of the sweep: objective: input should be 'val_mse', ",
        ),
        ({"over": RATE, "name": "../lr"}, "parameters of the sweep: name: "),
        ({"over": RATE, "fixed": {"train.stepz": 1}}, "parameters of the run: train.stepz: no such parameter"),
        ({"over": RATE, "preset": "none"}, "preset 'none': not found"),
        ({"over": RATE, "trails": 3}, "parameters of the sweep: trails: no such parameter"),
    ],
)
@pytest.mark.usefixtures("repository")
def test_wrong_parameters_are_refused_in_one_line_before_anything_runs(
    given: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = [each for name, value in given.items() for each in ("-p", f"{name}={json.dumps(value)}")]
    assert sweep_ddpm.main(arguments) == 1
    error = capsys.readouterr().err
    assert error.startswith(f"sweep-ddpm: error: {message}")
    assert error.count("\n") == 1
    assert not Path(".ddpm").exists()
