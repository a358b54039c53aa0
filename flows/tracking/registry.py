"""The exported model as a version of the registered model."""

from __future__ import annotations

import tempfile
import warnings
from functools import partial
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

from diffusion.storage.files import sha256
from flows.tracking import description
from flows.tracking.names import HIDDEN, former
from flows.tracking.results import Results
from flows.tracking.store import WEIGHTS, Store, TrackedRun

if TYPE_CHECKING:
    import onnx
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

ONNX, CARD = f"{HIDDEN}onnx_sha256", f"{HIDDEN}card_sha256"


def register(mlflow_store: Store, run: TrackedRun, found: Results, speed: dict[str, dict[str, float]]) -> ModelVersion:
    """The registered version of the exported model, created if missing.

    There is one version for each sampler.onnx. It points to the run that exported it; another run with the same file
    (after a change to `sample.steps` alone, for example) has the logged model as an input instead.

    `speed` holds the timings that export measured for each precision; they are not in any file.
    """
    name, digest = found.model_name, sha256(found.paths.sampler)
    run.once("export", lambda: _log_export(run, found, speed))
    version = _version(mlflow_store, run, found, name, digest)
    _log_card(run, found, _own(mlflow_store, run, digest))
    return version


def _own(mlflow_store: Store, run: TrackedRun, digest: str) -> list[LoggedModel]:
    """The logged model of a sampler.onnx that a run exported; none if another run did."""
    return [model for model in mlflow_store.models_by_tag(ONNX, digest) if model.source_run_id == run.id]


def _version(mlflow_store: Store, run: TrackedRun, found: Results, name: str, digest: str) -> ModelVersion:
    from mlflow.exceptions import MlflowException

    conditions = [f"name = '{name}' and tags.`{tag}` = '{digest}'" for tag in (ONNX, former(ONNX))]
    for version in chain.from_iterable(run.client.search_model_versions(same, max_results=1) for same in conditions):
        if version.run_id != run.id:
            for model in mlflow_store.models_by_tag(ONNX, digest)[:1]:
                run.once("model", partial(run.uses, model.model_id))
        return version
    try:
        run.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    own = _own(mlflow_store, run, digest)
    model = own[0] if own else _log_model(run, found.paths.sampler, digest)  # own: left by a call that was interrupted
    tags = {ONNX: digest, WEIGHTS: found.weights}
    return run.client.create_model_version(
        name,
        model.model_uri,
        run_id=run.id,
        model_id=model.model_id,
        tags=tags,
        description=description.card_link(run.experiment_id, run.id) if found.paths.card.exists() else None,
    )


def _log_card(run: TrackedRun, found: Results, models: list[LoggedModel]) -> None:
    """Log the model card beside the ONNX files and beside this run's model; it replaces one with another text."""
    card = found.paths.card
    if not card.exists() or run.tags.get(CARD) == (digest := sha256(card)):
        return
    run.client.log_artifact(run.id, str(card), "onnx")
    for model in models:
        run.client.log_model_artifact(model.model_id, str(card))
    run.tag({CARD: digest})


def _log_export(run: TrackedRun, found: Results, speed: dict[str, dict[str, float]]) -> None:
    for part, report in (found.export or {}).items():
        run.scalars(f"export/{part}", report)
    for precision, times in speed.items():
        run.scalars(f"export/speed/{precision}", times)
    for file in sorted(found.paths.onnx.iterdir()):
        if file not in (found.paths.sampler, found.paths.card):  # the registered model, and its card
            run.client.log_artifact(run.id, str(file), "onnx")


def _log_model(run: TrackedRun, sampler: Path, digest: str) -> LoggedModel:
    import mlflow.onnx
    import numpy as np
    import onnx
    import onnxruntime
    from mlflow.entities import LoggedModelOutput
    from mlflow.models import Model, ModelSignature
    from mlflow.types import Schema, TensorSpec

    from diffusion.export import golden

    def spec(value: onnx.ValueInfoProto) -> TensorSpec:
        kind = value.type.tensor_type
        shape = [dim.dim_value or -1 for dim in kind.shape.dim]  # -1: of any size
        return TensorSpec(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape, value.name)

    model = onnx.load(sampler)
    inputs, outputs = [spec(v) for v in model.graph.input], [spec(v) for v in model.graph.output]
    facts = {prop.key: prop.value for prop in model.metadata_props}
    client = run.client
    logged = client.create_logged_model(run.experiment_id, name="sampler", source_run_id=run.id, tags={ONNX: digest})
    # As mlflow.onnx.log_model does, without running the model: ONNX Runtime prints errors where CUDA is missing.
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="mlflow")  # importing mlflow.pyfunc warns about its own type hints
        mlflow.onnx.save_model(
            model,
            f"{temporary}/model",
            mlflow_model=Model(logged.artifact_location, run.id, model_id=logged.model_id),
            signature=ModelSignature(Schema([*inputs]), Schema([*outputs])),
            input_example=golden.inputs([v.name for v in model.graph.input], facts, golden.SEED, 1),
            pip_requirements=[
                f"mlflow=={mlflow.__version__}",
                f"onnx=={onnx.__version__}",
                f"onnxruntime=={onnxruntime.__version__}",
            ],
            save_as_external_data=False,
        )
        client.log_model_artifacts(logged.model_id, f"{temporary}/model")
    client.log_outputs(run.id, [LoggedModelOutput(logged.model_id, step=0)])
    return client.finalize_logged_model(logged.model_id, "READY")
