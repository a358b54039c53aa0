"""Recording the stages' files in MLflow."""

from __future__ import annotations

import hashlib
import json
from contextlib import suppress
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from ruamel.yaml import YAML

from diffusion.errors import UserError, without_secrets
from diffusion.progress import say
from flows import addresses, dvc_yaml
from flows import mlflow_pages as pages
from flows.pages import contents
from flows.params import Params
from flows.paths import Paths
from flows.tracking import champion, description, lineage, names, registry, results, store
from flows.tracking.results import Evaluation, Results
from flows.tracking.starting import FLOW_RUN, flow_run, start
from flows.tracking.store import FINGERPRINT, WEIGHTS, Store, TrackedRun

if TYPE_CHECKING:
    from mlflow.entities import LoggedModel, Run
    from mlflow.entities.model_registry import ModelVersion

SET = f"{names.HIDDEN}set_sha256"
"""Tag: digest of a run's parameters, data and weights."""
TRAINED_IN = f"{names.HIDDEN}trained_in_run"
"""Tag of a run that reused weights: the id of the run that trained them."""


class Recorded(NamedTuple):
    """Where a set of results is in MLflow."""

    run_id: str
    url: str
    """Address of the run's page."""
    trained_in: str
    """Id of the run that trained the weights: the same, or the one whose weights were reused."""
    model_version: str | None
    """The registered version of the exported model, if it was exported."""
    aliases: list[str]
    """The version's aliases."""
    gate: list[dict[str, Any]]
    """The latest decision on the version: for each rule of `tracking.gate`, the fields of `flows.gate.Row`."""


def record(
    params: Params, paths: Paths, run_id: str | None = None, speed: dict[str, dict[str, float]] | None = None
) -> Recorded | None:
    """Record in MLflow whatever part of the present results is missing there; None if that is not possible.

    `run_id` is the run that logged the training while it ran, if any; `speed` holds the timings that export measured.
    """
    if not paths.train_report.exists():
        return None  # an imported model, which was not trained here
    uri = store.tracking_uri(paths)
    try:
        return _record(uri, results.read(params, paths), run_id, speed or {})
    except UserError as error:
        say(f"MLflow: not recorded: {error}")
    except Exception as error:
        store.say_unusable(uri, error)
    return None


def track(params: Params, paths: Paths, as_json: bool) -> None:
    """`record`, and print where; raises UserError if there is nothing to record or MLflow cannot be reached."""
    found, uri = results.read(params, paths), store.tracking_uri(paths)
    for reason in found.stale:
        say(f"MLflow: left out: {reason}; `{dvc_yaml.repro(paths.student)}` brings it up to date")
    with store.user_errors(uri):
        recorded = _record(uri, found, None, {})
    if as_json:
        print(json.dumps(recorded._asdict()))
        return
    print(f"run      {recorded.run_id}\naddress  {recorded.url}")
    if recorded.trained_in != recorded.run_id:
        print(f"weights  trained in run {recorded.trained_in}")
    if recorded.model_version is not None:
        aliases = ", ".join(recorded.aliases) or "no alias"
        print(f"model    {found.model_name} version {recorded.model_version} ({aliases})")
    for row in recorded.gate:
        print(f"gate     {row['figure']} {row['rule']}: {row['verdict']}")


def _record(uri: str, found: Results, run_id: str | None, speed: dict[str, dict[str, float]]) -> Recorded:
    with store.lock(found.paths):
        mlflow_store = store.connect(uri, found.params, found.paths)
        run = None
        try:
            run = _run_of(mlflow_store, found, run_id)
            trained_in = _log(mlflow_store, run, found)
            version = registry.register(mlflow_store, run, found, speed) if found.export is not None else None
            aliases = champion.judge(run.client, found, version) if version else []
            _describe(mlflow_store, run, found, trained_in, version)
            if run.status != "FINISHED":
                run.end("FINISHED")
        except BaseException as error:  # partly recorded: the next call completes it
            with suppress(Exception):
                _mark_incomplete(mlflow_store, found, run, "FAILED" if isinstance(error, Exception) else "KILLED")
            raise
        gate = champion.table(run.client, version) if version else []
    number = str(version.version) if version else None
    return Recorded(run.id, _page(uri, run, found.paths), trained_in, number, aliases, gate)


def _describe(
    mlflow_store: Store, run: TrackedRun, found: Results, trained_in: str, version: ModelVersion | None
) -> None:
    source = mlflow_store.run_by_id(trained_in) if trained_in != run.id else None
    link = description.run_link(run.experiment_id, trained_in, f"run {source.info.run_name}") if source else ""
    judged = run.client.get_model_version(version.name, str(version.version)) if version else None
    started = lineage.started_from(mlflow_store, found.params, found.paths)
    text = description.results(found, link, description.verdict(judged) if judged else "", started)
    description.write(run.client, run.id, text)


def _mark_incomplete(mlflow_store: Store, found: Results, run: TrackedRun | None, status: str) -> None:
    """End the run of an interrupted recording, even if the interruption came while it was being created."""
    begun = [each.info for each in mlflow_store.runs_by_tag(SET, found.identity) if each.info.status == "RUNNING"]
    for run_id in [run.id] if run else [info.run_id for info in begun]:
        mlflow_store.client.set_terminated(run_id, status=status)


def _page(uri: str, run: TrackedRun, paths: Paths) -> str:
    """The address of a run's page; for a store without a server, the page that `make up` serves."""
    server = without_secrets(uri).rstrip("/") if uri.startswith("http") else addresses.mlflow(paths)
    return pages.run(server, run.experiment_id, run.id)


def _run_of(mlflow_store: Store, found: Results, run_id: str | None) -> TrackedRun:
    """The run of these results: one that holds some or all of them, the one that logged the training, or a new one.

    A run is claimed by tags before anything is logged: for parameters, data and weights (SET), and for the files of
    the evaluation and of the export. Results go into a run whose claims all agree with them, so that no run holds parts
    of two sets, and no set has two runs, however often and in however many parts it is recorded.
    """
    client, digests = mlflow_store.client, {_claim(part): digest for part, digest in found.digests().items()}
    claims = {SET: found.identity, WEIGHTS: found.weights} | digests
    followed = mlflow_store.run_by_id(run_id) or _left_unfinished(mlflow_store, found)
    if followed and WEIGHTS in names.current(followed.data.tags):
        followed = None  # it holds results already
    fitting = [
        run
        for run in mlflow_store.runs_by_tag(SET, found.identity)
        if all(names.current(run.data.tags).get(claim, digest) == digest for claim, digest in digests.items())
    ]
    if fitting:
        run = TrackedRun(client, fitting[0])
        if followed:  # the same training again, after a change to the code that had no effect, for example
            client.delete_run(followed.info.run_id)
    elif followed:
        run = TrackedRun(client, followed)
    else:
        run = start(mlflow_store, found.params, found.paths, found.identity, claims)
    run.tag({key: value for key, value in claims.items() if run.tags.get(key) != value})
    return run


def _left_unfinished(mlflow_store: Store, found: Results) -> Run | None:
    """The run that this flow run's training was followed in, if the server was gone when the training ended."""
    flow = flow_run(found.paths)
    begun = mlflow_store.runs_by_tag(FLOW_RUN, flow) if flow else []
    return next(
        (run for run in begun if run.info.status == "RUNNING" and FINGERPRINT in names.current(run.data.tags)), None
    )


def _claim(part: str) -> str:
    return f"{names.HIDDEN}{part}_sha256"


def _log(mlflow_store: Store, run: TrackedRun, found: Results) -> str:
    """Log everything but the exported model; returns the id of the run that trained the weights."""
    paths = found.paths
    models = mlflow_store.models_by_tag(WEIGHTS, found.weights, own=run.id)
    own = [model for model in models if model.source_run_id == run.id]
    trained = not models or bool(own) or FINGERPRINT in run.tags
    run.once("parameters", lambda: _log_parameters(run, found))
    run.once("train", lambda: _log_training(run, found, curves=trained))
    if trained:
        run.once("weights", lambda: _log_weights(run, found, own))
        lineage.log_start(mlflow_store, run, found.params, paths)
    else:
        run.once("weights", lambda: _reuse(run, models[0]))
    if (evaluation := found.evaluation) is not None:
        run.once("evaluate", lambda: _log_evaluation(run, found, evaluation))
    lock = (paths.root / dvc_yaml.file_of(paths.stage("train"))).with_suffix(".lock")
    if _describes(lock, paths):
        run.once("dvc.lock", lambda: run.client.log_artifact(run.id, str(lock)))
    return run.tags.get(TRAINED_IN, run.id)


def _log_parameters(run: TrackedRun, found: Results) -> None:
    """All parameters, params.yaml as it was read (the file may have been edited since), and the data report."""
    run.parameters(found.parameters)
    text = StringIO()
    YAML(typ="safe", pure=True).dump(found.params.model_dump(mode="json"), text)
    run.client.log_text(run.id, text.getvalue(), "params.yaml")
    run.dataset(_data(found), found.pairs, found.paths.pairs, "training")
    if found.paths.data_report.exists():
        run.client.log_artifact(run.id, str(found.paths.data_report), "data")


def _log_training(run: TrackedRun, found: Results, *, curves: bool) -> None:
    """The training's curves and previews, or only the final values; always its report and the model's config."""
    for curve, columns in (("heldout", {"mse": "heldout_mse"}), ("loss", {})):
        rows = found.curves[curve]
        last = {key: row["step"] for row in rows for key in row}
        for row in rows:
            step = row["step"]
            kept = {key: value for key, value in row.items() if key != "step" and (curves or step == last[key])}
            run.metrics(store.points({names.curve(columns.get(key, key)): v for key, v in kept.items()}, int(step)))
    run.scalars("train", found.training)
    if curves:
        for path in sorted(found.paths.previews.glob("step-*.png")):
            run.image(store.read_image(path), int(path.stem.removeprefix("step-")))
    run.client.log_artifact(run.id, str(found.paths.model / "config.json"))


def _log_weights(run: TrackedRun, found: Results, own: list[LoggedModel]) -> None:
    """The weights as a logged model, which is an input of the runs that reuse them."""
    from mlflow.entities import LoggedModelOutput

    client = run.client
    model, *_ = own or [
        client.create_logged_model(
            run.experiment_id, name="weights", source_run_id=run.id, tags={WEIGHTS: found.weights}, model_type="ddpm"
        )
    ]
    client.log_model_artifacts(model.model_id, str(found.paths.model))
    client.finalize_logged_model(model.model_id, "READY")
    client.log_outputs(run.id, [LoggedModelOutput(model.model_id, step=int(found.training["steps"]))])


def _reuse(run: TrackedRun, model: LoggedModel) -> None:
    run.uses(model.model_id)
    run.tag({TRAINED_IN: str(model.source_run_id)})


def _log_evaluation(run: TrackedRun, found: Results, evaluation: Evaluation) -> None:
    paths, data, report = found.paths, _data(found), evaluation.report
    run.scalars("evaluate", report)
    run.dataset(f"{data}-val", report["val_pairs_sha256"], paths.pairs, "validation")
    run.dataset(f"{data}-test", report["pairs_sha256"], paths.pairs, "test")
    run.client.log_artifacts(run.id, str(paths.evaluation), "evaluation")
    for file in (paths.report, paths.evaluate_report):
        run.client.log_artifact(run.id, str(file), "evaluation")
    if evaluation.bands:
        run.table(evaluation.bands, "evaluation/bands.json")
    for name in ("samplers", "few_steps"):
        if (file := paths.evaluation / f"{name}.csv").exists():
            run.table(contents.table(file), f"evaluation/{name}.json")


def _data(found: Results) -> str:
    return Path(found.params.shard.source).stem


def _describes(lock: Path, paths: Paths) -> bool:
    """Whether dvc.lock describes all these results: while stages run, DVC has not written it yet."""
    reports = (paths.train_report, paths.evaluate_report, paths.export_report)
    if not all(file.exists() for file in (lock, *reports)):
        return False
    document = YAML(typ="safe").load(lock) or {}
    entries = [out for stage in document.get("stages", {}).values() for out in stage.get("outs", [])]
    digests = {entry["path"]: entry.get("md5") for entry in entries}
    return all(
        digests.get(file.relative_to(paths.root).as_posix()) == hashlib.md5(file.read_bytes()).hexdigest()
        for file in reports
    )
