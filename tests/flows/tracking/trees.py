"""What the stages write, made up, and what MLflow then holds."""

import hashlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from mlflow import MlflowClient
from mlflow.entities import Run
from onnx import TensorProto, helper
from PIL import Image

from diffusion.storage.files import sha256, write_csv, write_json, write_sums
from flows import made_with, tracking, yaml_files
from flows import params as parameters
from flows.changes import lay_over
from flows.params import Params
from flows.paths import Paths

REPOSITORY = Path(__file__).parents[3]
LOSS = [{"step": step, "loss": 1 / step, "learning_rate": 1e-3, "grad_norm": 0.5} for step in range(20, 101, 20)]
HELDOUT = [{"step": 50, "mse": 0.4}, {"step": 100, "mse": 0.3}]


def changed(**sections: dict[str, Any]) -> Params:
    """The repository's parameters with some of them changed."""
    return parameters.validate(lay_over(yaml_files.read_yaml(REPOSITORY / "params.yaml"), sections), "test")


PARAMS = changed()


def write_tree(paths: Paths) -> None:
    """What is there before a training."""
    paths.pairs.mkdir(parents=True, exist_ok=True)
    write_json(paths.pairs / "manifest.json", {"splits": {"train": {"images": 1452}}})
    write_sums(paths.pairs)
    shutil.copyfile(REPOSITORY / "params.yaml", paths.params)
    paths.data_report.parent.mkdir(parents=True, exist_ok=True)
    paths.data_report.write_text("<h1>Data</h1>")
    (paths.root / "dvc.lock").write_text("schema: '2.0'\n")


def write_training(paths: Paths, weights: bytes = b"weights", params: Params = PARAMS) -> str:
    """What train writes; returns the digest of the weights."""
    for directory in (paths.model, paths.train_curves, paths.previews):
        directory.mkdir(parents=True, exist_ok=True)
    (paths.model / "model.safetensors").write_bytes(weights)
    write_json(paths.model / "config.json", {"shape": [1, 8, 8]})
    facts = {"steps": 100, "images": 12800, "augment": 0.12, "loss": LOSS[-1]["loss"], "heldout_mse": 0.3}
    write_json(paths.train_report, facts)
    write_csv(paths.train_curves / "loss.csv", LOSS)
    write_csv(paths.train_curves / "heldout.csv", HELDOUT)
    for row in HELDOUT:
        write_picture(paths.previews / f"step-{row['step']:08d}.png")
    for directory in (paths.model, paths.train_curves, paths.previews):
        write_sums(directory)
    made_with.write(paths, "train", params)
    return hashlib.sha256(weights).hexdigest()


def write_picture(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64), dtype=np.uint8)).save(path)


def write_evaluation(
    paths: Paths,
    weights: str,
    mse: float = 0.3,
    pairs: str = "a" * 64,
    params: Params = PARAMS,
    val_errors: Sequence[float] | None = None,
    bits: Sequence[float] = (),
    figures: Mapping[str, Any] | None = None,
) -> None:
    """What evaluate writes. `mse` is the error on test and, without `val_errors`, on each of the images of val; `bits`
    are the bits/dim of each image of test, which earlier versions did not write, and `figures` others in the report."""
    paths.evaluation.mkdir(parents=True, exist_ok=True)
    errors = [mse] * 4 if val_errors is None else val_errors
    scores = {"mse": mse, "mse_low": mse - 0.01, "mse_high": mse + 0.01, "r2": 1 - mse, "zero_mse": 1.0}
    scores |= {"val_mse": float(np.mean(errors)), "val_mse_se": 0.01} | dict(figures or {})
    if bits:
        scores |= {"bits_per_dim": float(np.mean(bits)), "bits_per_dim_values": 17}
        rows = [{"image": i, "bits_per_dim": bit} for i, bit in enumerate(bits)]
        write_csv(paths.evaluation / "bits_per_dim.csv", rows)
    else:
        (paths.evaluation / "bits_per_dim.csv").unlink(missing_ok=True)
    write_json(paths.evaluate_report, scores)
    write_csv(paths.evaluation / "val_errors.csv", [{"image": i, "mse": error} for i, error in enumerate(errors)])
    digests = {"weights_sha256": weights, "pairs_sha256": "d" * 64, "val_pairs_sha256": pairs}
    write_json(paths.evaluation / "scored.json", digests | {"report_sha256": sha256(paths.evaluate_report)})
    bands = [{"t_from": 100 * band, "t_to": 100 * band + 99, "mse": mse, "r2": 1 - mse} for band in range(10)]
    write_csv(paths.evaluation / "bands.csv", bands)
    write_csv(paths.evaluation / "mse_by_t.csv", [{"t": 5.5, "model": mse, "wiener": 0.6}])
    write_picture(paths.evaluation / "samples.png")
    write_picture(paths.evaluation / "mse_by_t.png")
    write_sums(paths.evaluation)
    paths.report.write_text(f"<h1>Report</h1>{mse} {params.sample.steps} steps")
    made_with.write(paths, "evaluate", params)


def write_export(paths: Paths, weights: str, factor: float = 0.5, params: Params = PARAMS) -> None:
    """ONNX files with a sampler's input and outputs, x_0 = factor noise, and a denoiser's that no test reads.

    As in a real export, the file differs with the scores that it carries and with the section `export`.
    """
    image = ["B", 1, 8, 8]
    graph = helper.make_graph(
        [helper.make_node("Mul", ["noise", "factor"], ["x_0"])],
        "sampler",
        [
            helper.make_tensor_value_info("noise", TensorProto.FLOAT, image),
            helper.make_tensor_value_info("steps", TensorProto.INT64, [1]),
        ],
        [helper.make_tensor_value_info("x_0", TensorProto.FLOAT, image)],
        [helper.make_tensor("factor", TensorProto.FLOAT, [], [factor])],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=10)
    sides = {"ddpm.channels": "1", "ddpm.height": "8", "ddpm.width": "8", "ddpm.steps": str(params.export.steps)}
    if paths.evaluate_report.exists():
        sides["ddpm.heldout"] = paths.evaluate_report.read_text()
    helper.set_model_props(model, {"ddpm.weights_sha256": weights} | sides)
    paths.onnx.mkdir(parents=True, exist_ok=True)
    onnx.save_model(model, paths.sampler)
    onnx.save_model(model, paths.denoiser)
    paths.card.write_text(f"# Model with the weights {weights}\n")
    report = {"denoiser": {"max_difference": 1e-6, "max_difference_by_band": [1e-6]}, "sampler": {"images": 64}}
    write_json(paths.export_report, report)
    made_with.write(paths, "export", params)


def write_all(
    paths: Paths,
    weights: bytes = b"weights",
    mse: float = 0.3,
    pairs: str = "a" * 64,
    params: Params = PARAMS,
    val_errors: Sequence[float] | None = None,
    bits: Sequence[float] = (),
    figures: Mapping[str, Any] | None = None,
) -> str:
    digest = write_training(paths, weights, params)
    write_evaluation(paths, digest, mse, pairs, params, val_errors, bits, figures)
    write_export(paths, digest, len(weights), params)
    return digest


def client_of(paths: Paths) -> MlflowClient:
    return MlflowClient(f"sqlite:///{paths.mlflow_database.resolve()}")


def everything(client: MlflowClient) -> dict[str, Any]:
    """All that a store holds, the bytes of every artifact included."""
    experiment = client.get_experiment_by_name("ddpm")
    assert experiment is not None
    models = client.search_logged_models([experiment.experiment_id])
    return {
        "runs": {run.info.run_id: run.to_dictionary() | content(client, run.info.run_id) for run in runs_of(client)},
        "models": {model.model_id: model.to_dictionary() for model in models},
        "versions": {v.version: dict(v) for v in client.search_model_versions("name = 'ddpm'")},
        "bytes": {
            file: file.read_bytes() for file in _local(experiment.artifact_location).rglob("*") if file.is_file()
        },
    }


def _local(uri: str) -> Path:
    return Path(uri.removeprefix("file://"))


def runs_of(client: MlflowClient) -> list[Run]:
    experiment = client.get_experiment_by_name("ddpm")
    assert experiment is not None
    return list(client.search_runs([experiment.experiment_id]))


def judgments(paths: Paths, name: str, number: str) -> str:
    """What follows the link to the model card in the description of a registered version."""
    card, _, found = client_of(paths).get_model_version(name, number).description.partition("\n\n")
    assert card.startswith("[Model card](")
    return str(found)


def content(client: MlflowClient, run_id: str) -> dict[str, Any]:
    """All that a store holds of a run, to be compared with what it holds later."""
    run = client.get_run(run_id)

    def files(path: str | None) -> Iterator[str]:
        for file in client.list_artifacts(run_id, path):
            if file.is_dir:
                yield from files(file.path)
            else:
                yield file.path

    return {
        "params": run.data.params,
        "tags": run.data.tags,
        "curves": {
            key: [(point.step, point.value) for point in client.get_metric_history(run_id, key)]
            for key in run.data.metrics
        },
        "files": sorted(files(None)),
        "datasets": sorted((d.dataset.name, d.dataset.digest, d.tags[0].value) for d in run.inputs.dataset_inputs),
        "versions": [
            (v.name, str(v.version), sorted(client.get_model_version(v.name, v.version).aliases), v.tags)
            for v in client.search_model_versions(f"run_id = '{run_id}'")
        ],
        "status": run.info.status,
    }


def image_steps(files: list[str]) -> list[int]:
    return sorted(
        int(name.split("+step+")[1].split("+")[0]) for name in files if name.endswith(".png") and "+step+" in name
    )


def follow(live: tracking.LiveRun, paths: Paths, steps: range) -> None:
    """What a training says while it goes through `steps`."""
    for row in LOSS:
        if row["step"] in steps:
            values = {key: value for key, value in row.items() if key != "step"}
            live.metrics({**values, "images_per_second": 1000.0}, int(row["step"]))
    for row in HELDOUT:
        if row["step"] in steps:
            picture = paths.state / "picture.png"
            write_picture(picture)
            live.metrics({"heldout_mse": row["mse"]}, int(row["step"]))
            live.image(picture, int(row["step"]))
            picture.unlink()
