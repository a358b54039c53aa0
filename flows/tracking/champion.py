"""Which registered version is `champion`, and why; `challenger` is the newest.

A version that meets all rules of `tracking.gate` becomes champion; see `flows.gate`. The first one needs to meet the
limits alone. The decision is a table in the run that exported the version (`gate.json`), and a sentence in the
version's description. A champion whose figures cannot be compared stays until `ddpm promote`.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.errors import Damaged, UserError
from diffusion.progress import say
from diffusion.storage.files import SUMS, read_checked, sha256
from flows.gate import NOT_COMPARABLE, Decision, Row, Scores, decide
from flows.params import Params
from flows.paths import Paths
from flows.tracking import description, names, store
from flows.tracking.results import BY_IMAGE, Results, registered_name, values_by_image

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion

CHAMPION, CHALLENGER = "champion", "challenger"
SCORED = f"{names.HIDDEN}val_pairs_sha256"
"""Tag: the validation pairs that a version was scored on; its scores are tags, too."""
JUDGED = f"{names.HIDDEN}judged"
"""Tag: the value of `tracking.gate` at which a version was last judged."""
SCORES = ("val_mse", "val_mse_se", "mse", "r2")
"""Tags of a version: its figures on val, and those on test."""
TABLE = "gate.json"
"""Artifact of the run that exported a version: the latest decision, one row for each rule."""


def judge(client: MlflowClient, found: Results, version: ModelVersion) -> list[str]:
    """Tag a version with its scores, give it the aliases that it has earned, and return all its aliases.

    A version is judged once for each value of `tracking.gate`, against the champion at that time.
    """
    name, number = found.model_name, str(version.version)
    newest = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
    if str(newest[0].version) == number and _aliases(client, name).get(CHALLENGER) != number:
        client.set_registered_model_alias(name, CHALLENGER, number)
    gate = json.dumps([rule.model_dump(mode="json") for rule in found.gate])
    champion = _aliases(client, name).get(CHAMPION)
    if found.evaluation is None:
        if not description.judgments(version):
            _describe(client, version, "Not promoted: it was not evaluated.")
    elif (tags := names.current(version.tags)).get(JUDGED) != gate:
        report = found.evaluation.report
        if SCORED not in tags:
            scores = {SCORED: report["val_pairs_sha256"]} | {key: str(report[key]) for key in SCORES if key in report}
            for key, value in scores.items():
                client.set_model_version_tag(name, number, key, value)
        if champion != number:
            new = Scores(f"version {number}", report, found.evaluation.by_image)
            old = _scores(client, client.get_model_version(name, champion)) if champion else None
            _carry_out(client, found, version, decide(found.gate, new, old), champion)
        client.set_model_version_tag(name, number, JUDGED, gate)
    return sorted(alias for alias, at in _aliases(client, name).items() if at == number)


def _carry_out(
    client: MlflowClient, found: Results, version: ModelVersion, decision: Decision, champion: str | None
) -> None:
    """Record a decision, and move the alias; tell the user if it is left to them."""
    name, number = version.name, str(version.version)
    verdict, reason = "Promoted to champion" if decision.promoted else "Not promoted", decision.reason
    failed = [row for row in decision.rows if not row.met]
    if champion and failed and all(row.verdict == NOT_COMPARABLE for row in failed):
        option = " --student" if found.paths.student else ""
        reason += f"; `ddpm promote {number} --reason TEXT{option}` makes version {number} the champion"
        say(f"MLflow: champion of {name} stays version {champion}: {reason}")
    _log_table(client, version, decision.rows)
    _describe(client, version, f"{verdict}: {reason}")
    if decision.promoted:
        client.set_registered_model_alias(name, CHAMPION, number)


def _log_table(client: MlflowClient, version: ModelVersion, rows: tuple[Row, ...]) -> None:
    """Log the rows as a table, in place of that of an earlier decision."""
    from mlflow.exceptions import MlflowException

    with suppress(MlflowException):  # the run was deleted
        store.log_table(client, version.run_id or "", Row._fields, rows, TABLE)


def table(client: MlflowClient, version: ModelVersion) -> list[dict[str, Any]]:
    """The latest decision on a version, with the fields of `Row`; empty if it was never compared."""
    with tempfile.TemporaryDirectory() as directory:
        file = _download(client, version, TABLE, directory)
        if file is None:
            return []
        found = json.loads(file.read_bytes())
        return [dict(zip(found["columns"], row, strict=True)) for row in found["data"]]


def _scores(client: MlflowClient, version: ModelVersion) -> Scores:
    """What the run that exported a version holds of its evaluation, every file checked against its digest."""
    name, run = f"version {version.version}", f"({version.run_id})"
    if not version.run_id:
        return Scores(name, {}, {}, "is not known, as it was registered without a run")
    files = ["evaluate.json", "scored.json", *(file for file, _ in BY_IMAGE.values())]
    with tempfile.TemporaryDirectory() as directory:
        sums = _download(client, version, f"evaluation/{SUMS}", directory)
        if sums is None:
            return Scores(name, {}, {}, f"is not in its run with a {SUMS} {run}")
        for file in files:
            _download(client, version, f"evaluation/{file}", directory)
        evaluation = sums.parent
        try:
            scored = json.loads(read_checked(evaluation / "scored.json"))
            report = _report(evaluation / "evaluate.json", scored)
            return Scores(name, report | scored, values_by_image(evaluation), f"is not in its run {run}")
        except UserError:
            return Scores(name, {}, {}, f"does not match {SUMS} in its run {run}")


def _report(file: Path, scored: Mapping[str, str]) -> dict[str, Any]:
    """evaluate.json, whose digest is in scored.json; empty in runs of earlier versions, which did not log it."""
    if not file.exists():
        return {}
    if sha256(file) != scored.get("report_sha256"):
        raise Damaged(file, "it does not match its digest in scored.json")
    return dict(json.loads(file.read_bytes()))


def _download(client: MlflowClient, version: ModelVersion, file: str, directory: str) -> Path | None:
    """An artifact of the run that exported a version, downloaded to a place in `directory` that depends on the store;
    None if the run does not have it."""
    from mlflow.exceptions import MlflowException

    run_id, folder = version.run_id or "", file.rpartition("/")[0] or None
    try:
        if file in [each.path for each in client.list_artifacts(run_id, folder)]:
            return Path(client.download_artifacts(run_id, file, directory))
    except MlflowException as error:
        if error.error_code != "RESOURCE_DOES_NOT_EXIST":  # the run was deleted for good
            raise
    return None


def promote(params: Params, paths: Paths, number: str, reason: str) -> None:
    """Make a version the champion by hand; raises UserError if there is no such version, no reason or no MLflow."""
    if not reason.strip():
        raise UserError("--reason: must not be empty; it is added to the version's description")
    uri, name = store.tracking_uri(paths), registered_name(params, paths)
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
