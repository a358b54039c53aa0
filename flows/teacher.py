"""The finished run whose model a flow run distils: choosing it, and the parameters of the distillation."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from flows import dvc_lock, workspace
from flows.environment import PUSH, setting
from flows.paths import Paths

SECTIONS = ("distill", "sample", "evaluate", "export", "tracking")
"""What a distillation may change, besides `device`; all other parameters determined the teacher and its data."""


def find(run: str | None) -> Path:
    """The workspace of the run whose model is distilled: by name or unique prefix, by default the newest completed one.

    Workers that share no folder (DDPM_PUSH) fetch a run that is not here, given its whole name.

    Raises:
        UserError: there is no such run, it is not completed or itself a distillation, or it lacks results.
    """
    if run is None:
        newest = workspace.newest("completed", distilled=False)
        if newest is None:
            raise UserError(
                "run: no run of train-ddpm has completed here yet; `prefect deployment run train-ddpm` starts one"
                + (", and -p run=NAME takes one of another worker" if setting(PUSH, False, bool) else "")
            )
        directory = newest
    elif run and isinstance(run, str):
        try:
            directory = workspace.find(run)
        except UserError:
            if not setting(PUSH, False, bool):
                raise
            from flows.fetching import fetch  # imports torch, which `ddpm runs` does not need

            directory = fetch(run)
    else:
        raise UserError(f"run: must be the name of a run, as text (got {run!r})")
    check(directory)
    return directory


def check(directory: Path) -> None:
    """Raise UserError unless a run's model can be distilled."""
    record, name = workspace.Run.read(directory), directory.name
    if record.teacher:
        raise UserError(f"run {name!r}: is a distillation; distil its teacher again, run {record.teacher!r}")
    if (state := workspace.state_of(directory, record)) != "completed":
        raise UserError(f"run {name!r}: {state}; only the model of a completed run can be distilled (see `ddpm runs`)")
    missing = [str(path) for path in dvc_lock.outputs_of(directory) if not (directory / path).exists()]
    if missing or not Paths(directory).teacher.exists():
        raise UserError(
            f"run {name!r}: {missing[0] if missing else 'models/ddpm'} is missing from its workspace; run train-ddpm "
            "again with the same parameters, which takes it from DVC's cache, and distil that run"
        )


def document(directory: Path, changes: Mapping[str, Any]) -> Any:
    """The parameters of a distillation: those of its teacher, section distill from params.yaml, then `changes`.

    Raises:
        UserError: the model cannot be distilled, the result is invalid, or a change concerns the teacher.
    """
    from diffusion.distillation.options import DISTILLABLE
    from flows.changes import lay_over, update  # imports torch, which `ddpm runs` does not need
    from flows.params import Params, read, read_any_format, validate

    allowed = ("device", *SECTIONS)
    if fixed := [name for name in changes if name not in allowed]:
        what = "is that of the run" if fixed[0] in Params.model_fields else "no such parameter"
        raise UserError(f"{fixed[0]}: {what}; a distillation takes run, {', '.join(allowed)}")
    own = read_any_format(Paths(directory).params)
    update(own)
    ours = read(Paths().params)
    if "distill" in ours:
        own["distill"] = ours["distill"]
    merged = lay_over(own, changes)
    predicts = validate(merged, "parameters of the run").process.parameterization
    if predicts not in DISTILLABLE:
        raise UserError(
            f"run {directory.name!r}: its model predicts {predicts} (process.parameterization), which says little "
            f"about the image where sampling starts; distil one trained to predict {' or '.join(DISTILLABLE)}"
        )
    return merged
