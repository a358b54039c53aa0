"""The exported model as a version of the registered model, and its aliases."""

from __future__ import annotations

import json
import tempfile
import warnings
from typing import TYPE_CHECKING, Any

from diffusion.files import sha256
from diffusion.params import Params
from diffusion.paths import Paths
from diffusion.tracking.starting import flat
from diffusion.tracking.store import PAIRS, WEIGHTS, TrackedRun, say

if TYPE_CHECKING:
    import onnx
    from mlflow import MlflowClient
    from mlflow.entities import LoggedModel
    from mlflow.entities.model_registry import ModelVersion

ONNX = "ddpm.onnx_sha256"


def register(
    run: TrackedRun, params: Params, paths: Paths, weights: str, speed: dict[str, dict[str, float]]
) -> ModelVersion | None:
    """The registered version of the exported model, made if there is none; None without an export of these weights.

    speed: what the export measured, for each of its precisions; it is in no file.
    """
    import onnx
    from mlflow.exceptions import MlflowException

    if not paths.sampler.exists() or not paths.export_report.exists():
        return None
    graph = onnx.load(paths.sampler)
    if WEIGHTS not in {prop.key for prop in graph.metadata_props if prop.value == weights}:
        return None  # an older one: it lies there until a new one is written
    name, digest = params.tracking.model_name, sha256(paths.sampler)
    # The report does not tell of every change to the sampler, nor the sampler of its variants.
    run.once("export", sha256(paths.export_report) + digest, lambda: _log_export(run, params, paths, speed))
    for version in run.client.search_model_versions(f"run_id = '{run.id}'"):
        if version.name == name and version.tags.get(ONNX) == digest:
            return version
    try:
        run.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    model = _log_model(run, graph)
    return run.client.create_model_version(
        name, model.model_uri, run_id=run.id, model_id=model.model_id, tags={ONNX: digest}
    )


def _log_export(run: TrackedRun, params: Params, paths: Paths, speed: dict[str, dict[str, float]]) -> None:
    run.parameters(flat(params, "export", "tracking"))
    for part, report in json.loads(paths.export_report.read_text()).items():
        run.scalars(f"export/{part}", report)
    for precision, times in speed.items():
        run.scalars(f"export/speed/{precision}", times)
    for file in sorted(paths.onnx.iterdir()):
        if file != paths.sampler:  # which is the registered model
            run.client.log_artifact(run.id, str(file), "onnx")


def _log_model(run: TrackedRun, model: onnx.ModelProto) -> LoggedModel:
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

    inputs, outputs = [spec(v) for v in model.graph.input], [spec(v) for v in model.graph.output]
    facts = {prop.key: prop.value for prop in model.metadata_props}
    client = run.client
    logged = client.create_logged_model(run.experiment_id, name="sampler", source_run_id=run.id)
    # What mlflow.onnx.log_model would do, but for running the model: ONNX Runtime prints errors where CUDA is missing.
    with tempfile.TemporaryDirectory() as temporary, warnings.catch_warnings():
        warnings.filterwarnings("ignore", module="mlflow")  # importing mlflow.pyfunc warns of its own type hints
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


def promote(
    client: MlflowClient, params: Params, version: ModelVersion, weights: str, evaluation: dict[str, Any] | None
) -> list[str]:
    """Tag a version with its scores, give it the aliases it deserves, and return those it has.

    The newest version is `challenger`. A version becomes `champion` when its MSE passes the gate and is below the
    present champion's on the same held-out pairs.
    """
    name, number = params.tracking.model_name, str(version.version)
    scores = {WEIGHTS: weights}
    if evaluation:
        scores |= {PAIRS: evaluation["pairs_sha256"], "mse": str(evaluation["mse"]), "r2": str(evaluation["r2"])}
    for key, value in scores.items():
        if version.tags.get(key) != value:
            client.set_model_version_tag(name, number, key, value)
    aliases = {alias: str(at) for alias, at in client.get_registered_model(name).aliases.items()}

    def point(alias: str) -> None:
        if aliases.get(alias) != number:
            client.set_registered_model_alias(name, alias, number)
            aliases[alias] = number

    newest = client.search_model_versions(f"name = '{name}'", max_results=1, order_by=["version_number DESC"])
    if str(newest[0].version) == number:
        point("challenger")
    if evaluation and evaluation["mse"] <= params.tracking.max_mse:
        champion = aliases.get("champion")
        rival = client.get_model_version(name, champion).tags if champion else scores | {"mse": "inf"}
        if rival.get(PAIRS) != scores[PAIRS]:
            say(f"champion stays {name} version {champion}: it was scored on other held-out pairs")
        elif evaluation["mse"] < float(rival["mse"]):
            point("champion")
    return sorted(alias for alias, at in aliases.items() if at == number)
