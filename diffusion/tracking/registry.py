"""The exported model as a version of the registered model, and its aliases."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusion.files import sha256
from diffusion.params import Params
from diffusion.paths import Paths
from diffusion.tracking.starting import flat
from diffusion.tracking.store import PAIRS, WEIGHTS, TrackedRun, say

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities.model_registry import ModelVersion
    from mlflow.models.model import ModelInfo

ONNX = "ddpm.onnx_sha256"


def register(run: TrackedRun, params: Params, paths: Paths, report: dict[str, Any]) -> ModelVersion:
    """The registered version of the exported model, made if there is none."""
    from mlflow.exceptions import MlflowException

    name, digest = params.tracking.model_name, sha256(paths.denoiser)
    for version in run.client.search_model_versions(f"run_id = '{run.id}'"):
        if version.name == name and version.tags.get(ONNX) == digest:
            return version
    run.parameters(flat(params, "export", "tracking"))
    run.scalars("export", report)
    try:
        run.client.create_registered_model(name)
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
    model = _log_model(run, paths.denoiser)
    return run.client.create_model_version(
        name, model.model_uri, run_id=run.id, model_id=model.model_id, tags={ONNX: digest}
    )


def _log_model(run: TrackedRun, path: Path) -> ModelInfo:
    import mlflow.onnx
    import numpy as np
    import onnx
    import onnxruntime
    from mlflow.models import ModelSignature
    from mlflow.types import Schema, TensorSpec

    def spec(value: onnx.ValueInfoProto) -> TensorSpec:
        kind = value.type.tensor_type
        shape = [dim.dim_value or -1 for dim in kind.shape.dim]  # -1: of any size
        return TensorSpec(np.dtype(onnx.helper.tensor_dtype_to_np_dtype(kind.elem_type)), shape, value.name)

    model = onnx.load(path)
    inputs, outputs = [spec(v) for v in model.graph.input], [spec(v) for v in model.graph.output]
    info: ModelInfo = mlflow.onnx.log_model(
        model,
        name=path.stem,
        run_id=run.id,
        signature=ModelSignature(Schema([*inputs]), Schema([*outputs])),
        input_example={spec.name: np.zeros([abs(size) for size in spec.shape], spec.type) for spec in inputs},
        pip_requirements=[
            f"mlflow=={mlflow.__version__}",
            f"onnx=={onnx.__version__}",
            f"onnxruntime=={onnxruntime.__version__}",
        ],
        save_as_external_data=False,
    )
    return info


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
