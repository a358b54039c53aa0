"""Which registered version is `champion`, and why; `challenger` is the newest.

A version replaces the champion if its error on the validation pairs is lower. Let d_i be the difference between the two
versions' MSE of the predicted noise on the pairs of validation image i (x_t and eps are stored: both versions saw the
same ones), dbar its mean over the n images, and

    se = sqrt(sum_i (d_i - dbar)^2 / (n (n - 1))),

The version becomes champion if dbar + 1.96 se < 0, that is, if the 95 % interval of the difference lies below zero. The
interval covers the noise of measuring on n images, not the variation between trainings with different seeds. Every
champion, the first included, must have an MSE of at most `tracking.max_mse`. Versions that were scored on different
pairs cannot be compared: the champion then stays until `ddpm promote`.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import UserError, counted
from diffusion.progress import say
from diffusion.storage.files import SUMS, read_checked
from flows.params import Params
from flows.paths import Paths
from flows.tracking import description, names, store
from flows.tracking.results import ERRORS, Results, errors_of

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

Errors = NDArray[np.float64]
"""MSE on each validation image, (n,)."""
CHAMPION, CHALLENGER = "champion", "challenger"
VAL_PAIRS = f"{names.HIDDEN}val_pairs_sha256"
JUDGED = f"{names.HIDDEN}judged"
"""Tag: the value of `tracking.max_mse` at which a version was last judged."""
SCORES = ("val_mse", "val_mse_se", "mse", "r2")
"""Tags of a version: its figures on val, and those on test."""


class Verdict(NamedTuple):
    """Whether a version becomes champion, and a sentence that says why."""

    promoted: bool
    reason: str


def judge(client: MlflowClient, found: Results, version: ModelVersion) -> list[str]:
    """Tag a version with its scores, give it the aliases that it has earned, and return all its aliases.

    A version is judged once for each value of `tracking.max_mse`, against the champion at that time.
    """
    name, number = found.params.tracking.model_name, str(version.version)
    newest = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
    if str(newest[0].version) == number and _aliases(client, name).get(CHALLENGER) != number:
        client.set_registered_model_alias(name, CHALLENGER, number)
    gate, champion = str(found.params.tracking.max_mse), _aliases(client, name).get(CHAMPION)
    if found.evaluation is None:
        if not version.description:
            _describe(client, version, "Not promoted: it was not evaluated.")
    elif (tags := names.current(version.tags)).get(JUDGED) != gate:
        if VAL_PAIRS not in tags:
            report = found.evaluation.report
            scores = {VAL_PAIRS: report["val_pairs_sha256"]} | {key: str(report[key]) for key in SCORES}
            for key, value in scores.items():
                client.set_model_version_tag(name, number, key, value)
        if champion != number:
            verdict = _verdict(client, found, version, champion)
            _describe(
                client, version, f"{'Promoted to champion' if verdict.promoted else 'Not promoted'}: {verdict.reason}"
            )
            if verdict.promoted:
                client.set_registered_model_alias(name, CHAMPION, number)
        client.set_model_version_tag(name, number, JUDGED, gate)
    return sorted(alias for alias, at in _aliases(client, name).items() if at == number)


def _verdict(client: MlflowClient, found: Results, version: ModelVersion, champion: str | None) -> Verdict:
    assert found.evaluation is not None
    name, number = found.params.tracking.model_name, version.version
    report, new = found.evaluation.report, found.evaluation.val_errors
    mse, gate, pairs = report["val_mse"], found.params.tracking.max_mse, report["val_pairs_sha256"]
    if mse > gate:
        return Verdict(False, f"val MSE {mse:.4f} exceeds tracking.max_mse, {gate:g}")
    if champion is None:
        return Verdict(True, f"the first version whose val MSE, {mse:.4f}, is at most tracking.max_mse, {gate:g}")
    rival = client.get_model_version(name, champion)
    scored = names.current(rival.tags).get(VAL_PAIRS)
    by_hand = f"`ddpm promote {number} --reason TEXT` makes version {number} the champion"
    if scored != pairs:
        on = f"val pairs {scored[:12]}" if scored else "no val pairs"
        line = f"version {champion} was scored on {on}, version {number} on {pairs[:12]}: not comparable; {by_hand}"
        say(f"MLflow: champion of {name} stays version {champion}: {line}")
        return Verdict(False, line)
    errors = _errors_of(client, rival)
    if isinstance(errors, str):
        line = f"the per-image errors of version {champion} {errors} ({rival.run_id}); {by_hand}"
        say(f"MLflow: champion of {name} stays version {champion}: {line}")
        return Verdict(False, line)
    mean, margin = compare(new, errors)
    told = (
        f"val MSE {mse:.4f}, version {champion}'s is {errors.mean():.4f}; the difference, {mean:+.4g} ± {margin:.2g} "
        f"(95 %, {counted(len(new), 'image')})"
    )
    if mean + margin < 0:
        return Verdict(True, f"{told}, is below zero")
    return Verdict(False, f"{told}, is not below zero by more than the measurement noise")


def compare(new: Errors, old: Errors) -> tuple[float, float]:
    """Mean of the paired differences between errors (n,), and half the width of its 95 % interval."""
    difference = new - old
    n = len(difference)
    return float(difference.mean()), float(1.96 * difference.std(ddof=1) / np.sqrt(n)) if n > 1 else float("inf")


def promote(params: Params, paths: Paths, number: str, reason: str) -> None:
    """Make a version the champion by hand; raises UserError if there is no such version, no reason or no MLflow."""
    if not reason.strip():
        raise UserError("--reason: must not be empty; it is added to the version's description")
    uri, name = store.tracking_uri(paths), params.tracking.model_name
    with store.user_errors(uri), store.lock(paths):
        client = store.client_at(uri)
        versions = {str(v.version): v for v in client.search_model_versions(f"name = '{name}'")}
        if number not in versions:
            there = f"available: {', '.join(sorted(versions, key=int))}" if versions else "no version is registered"
            raise UserError(f"version {number}: no such version of {name} in MLflow at {uri}; {there}")
        before = _aliases(client, name).get(CHAMPION)
        instead = f" in place of version {before}" if before not in (None, number) else ""
        _describe(client, versions[number], f"Promoted to champion by hand{instead}: {reason.strip()}")
        client.set_registered_model_alias(name, CHAMPION, number)
        description.rewrite_verdict(client, client.get_model_version(name, number))
    print(f"{name} version {number} is now champion" + (f" (previously version {before})" if before else ""))


def _aliases(client: MlflowClient, name: str) -> dict[str, str]:
    return {alias: str(at) for alias, at in client.get_registered_model(name).aliases.items()}


def _describe(client: MlflowClient, version: ModelVersion, sentence: str) -> None:
    """Add a paragraph to a version's description, unless it ends with it."""
    before = version.description or ""
    if not before.endswith(sentence):
        client.update_model_version(version.name, str(version.version), "\n\n".join(filter(None, [before, sentence])))


def _errors_of(client: MlflowClient, version: ModelVersion) -> Errors | str:
    """The MSE on each validation image (n,) of a version, from the run that exported it, or why it cannot be used."""
    from mlflow.exceptions import MlflowException

    try:
        files = [file.path for file in client.list_artifacts(version.run_id or "", "evaluation")]
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":
            raise
        files = []  # the run was deleted for good
    needed = [f"evaluation/{name}" for name in (ERRORS, SUMS)]
    if not set(needed) <= set(files):
        return f"are not in its run with a {SUMS}"
    with tempfile.TemporaryDirectory() as directory:
        errors, _ = (Path(client.download_artifacts(version.run_id or "", file, directory)) for file in needed)
        try:
            return errors_of(read_checked(errors))
        except UserError:
            return f"do not match {SUMS} in its run"
