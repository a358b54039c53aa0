"""Each set of results has a separate run, whose parameters, figures, files and version belong together."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import mlflow
import pytest
from mlflow import MlflowClient

from diffusion.errors import UserError
from diffusion.storage.files import write_json, write_sums
from flows import made_with, tracking, yaml_files
from flows import params as parameters
from flows.paths import Paths
from flows.tracking.recording import Recorded
from tests.flows.tracking.trees import (
    LOSS,
    PARAMS,
    changed,
    client_of,
    content,
    everything,
    follow,
    image_steps,
    runs_of,
    write_all,
    write_evaluation,
    write_export,
    write_training,
)

PARTS = (("evaluation", "evaluate"), ("export", "export"))
OTHER = changed(sample={"steps": 10, "variance": "fixed-small"}, export={"steps": 7})


def recorded(paths: Paths, params: parameters.Params, run_id: str | None = None) -> Recorded:
    found = tracking.record(params, paths, run_id)
    assert found is not None
    return found


def text(client: MlflowClient, run_id: str, file: str) -> str:
    return Path(client.download_artifacts(run_id, file)).read_text()


def yaml_of(client: MlflowClient, run_id: str) -> Any:
    return yaml_files.read_yaml(Path(client.download_artifacts(run_id, "params.yaml")))


def evaluated_and_exported(paths: Paths, digest: str, params: parameters.Params, mse: float) -> Recorded:
    """The two stages that a change to `sample` and `export` runs again, each recording what it made."""
    write_evaluation(paths, digest, mse, params=params)
    recorded(paths, params)
    write_export(paths, digest, factor=len(b"weights"), params=params)
    return recorded(paths, params)


def test_results_of_reused_weights_get_a_separate_run(paths: Paths) -> None:
    with tracking.live(PARAMS, paths, None, "f1") as live:
        follow(live, paths, range(101))
    digest = write_training(paths)
    recorded(paths, PARAMS, live.run_id)
    first = evaluated_and_exported(paths, digest, PARAMS, 0.3)
    client = client_of(paths)
    before = everything(client)

    write_json(
        paths.root / "run.json", {"name": "calm-owl", "flow_run_id": "17", "git_revision": "", "git_dirty": False}
    )
    second = evaluated_and_exported(paths, digest, OTHER, 0.25)
    after = everything(client)
    assert first.run_id == first.trained_in == second.trained_in == live.run_id
    assert len(after["runs"]) == 2
    kept, had = (store["runs"][first.run_id] for store in (after, before))
    assert (kept.pop("versions")[0][3], had.pop("versions")[0][2:]) == (
        client.get_model_version("ddpm", "1").tags,
        (["challenger", "champion"], client.get_model_version("ddpm", "1").tags),
    )  # but for the aliases, which are the second one's now
    assert kept == had
    assert before["models"].items() <= after["models"].items()
    assert before["bytes"].items() <= after["bytes"].items()  # nothing written over

    found = content(client, second.run_id)
    flat = {key: found["params"][key] for key in ("sample.steps", "sample.variance", "export.steps", "train.steps")}
    assert flat == {"sample.steps": "10", "sample.variance": "fixed-small", "export.steps": "7", "train.steps": "1000"}
    assert set(found["params"]) == set(before["runs"][first.run_id]["params"])
    assert yaml_of(client, second.run_id) == OTHER.model_dump(mode="json")
    assert found["curves"]["evaluate/mse"] == [(0, 0.25)]
    assert "10 steps" in text(client, second.run_id, "evaluation/report.html")
    assert found["tags"]["mlflow.runName"] == "calm-owl"
    assert found["status"] == "FINISHED"
    # The training's final figures, and its weights as an input.
    assert found["curves"]["curves/loss"] == [(LOSS[-1]["step"], LOSS[-1]["loss"])]
    assert found["curves"]["curves/heldout_mse"] == [(100, 0.3)]
    assert found["params"]["trained.steps"] == "100"
    assert image_steps(found["files"]) == []
    inputs = client.get_run(second.run_id).inputs.model_inputs
    weights = client.get_logged_model(inputs[0].model_id)
    assert (len(inputs), weights.source_run_id, weights.name) == (1, first.run_id, "weights")
    assert weights.tags["mlflow.ddpm.weights_sha256"] == digest
    directory = Path(mlflow.artifacts.download_artifacts(f"models:/{weights.model_id}"))
    assert hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest() == digest
    # The registered versions point to the runs that exported them.
    for version, run in (("1", first), ("2", second)):
        registered = client.get_model_version("ddpm", version)
        assert registered.run_id == run.run_id
        assert client.get_logged_model(registered.source.removeprefix("models:/")).source_run_id == run.run_id
        assert run.model_version == version


def test_the_same_results_again_change_nothing(paths: Paths) -> None:
    digest = write_all(paths)
    first = recorded(paths, PARAMS)
    evaluated_and_exported(paths, digest, OTHER, 0.25)
    before = everything(client_of(paths))
    write_json(
        paths.root / "run.json", {"name": "calm-owl", "flow_run_id": "17", "git_revision": "", "git_dirty": False}
    )
    again = evaluated_and_exported(paths, digest, PARAMS, 0.3)
    assert again[:4] == first[:4]  # but for the aliases, which the second version has now
    assert everything(client_of(paths)) == before


def test_pictures_alone_make_a_run_but_no_second_version(paths: Paths) -> None:
    """sample.steps changes neither scores nor ONNX: the file is registered once, by the run that exported it."""
    digest = write_all(paths)
    first = recorded(paths, PARAMS)
    steps = changed(sample={"steps": 10})
    write_evaluation(paths, digest, params=steps)
    second = recorded(paths, steps)
    assert second.run_id != first.run_id
    assert (first.model_version, second.model_version) == ("1", "1")
    client = client_of(paths)
    version = client.get_model_version("ddpm", "1")
    assert version.run_id == first.run_id
    inputs = {model.model_id for model in client.get_run(second.run_id).inputs.model_inputs}
    assert version.source.removeprefix("models:/") in inputs
    assert "onnx/denoiser.onnx" in content(client, second.run_id)["files"]


def test_the_same_parameters_with_other_figures_are_other_results(paths: Paths) -> None:
    """By a library that rounds otherwise, say."""
    digest = write_all(paths)
    first = recorded(paths, PARAMS)
    second = evaluated_and_exported(paths, digest, PARAMS, 0.2999)
    assert second.run_id != first.run_id
    client = client_of(paths)
    assert [content(client, run.run_id)["curves"]["evaluate/mse"] for run in (first, second)] == [
        [(0, 0.3)],
        [(0, 0.2999)],
    ]


def test_parameters_that_changed_while_a_training_was_interrupted_stay_in_its_run(paths: Paths) -> None:
    live = tracking.live(PARAMS, paths, None, "f1")
    follow(live, paths, range(51))
    with pytest.raises(KeyboardInterrupt), live:
        raise KeyboardInterrupt
    with tracking.live(OTHER, paths, live.run_id, "f1") as again:
        follow(again, paths, range(51, 101))
    write_training(paths, params=OTHER)
    found = recorded(paths, OTHER, again.run_id)
    assert found.run_id == live.run_id
    (run,) = runs_of(client_of(paths))
    assert run.data.params["sample.steps"] == "10"
    assert run.data.metrics["curves/loss"] == LOSS[-1]["loss"]


def test_trainings_of_different_parameters_that_give_the_same_weights_keep_their_curves(paths: Paths) -> None:
    write_training(paths)
    first = recorded(paths, PARAMS)
    compiled = changed(train={"recompute": True})
    with tracking.live(compiled, paths, None, "f2") as live:
        follow(live, paths, range(101))
    write_training(paths, params=compiled)
    second = recorded(paths, compiled, live.run_id)
    assert second.run_id == second.trained_in == live.run_id != first.run_id
    curve = [(row["step"], row["loss"]) for row in LOSS]
    for run in (first, second):
        assert content(client_of(paths), run.run_id)["curves"]["curves/loss"] == curve


def test_edited_parameters_are_never_taken_for_those_of_the_results(
    paths: Paths, capfd: pytest.CaptureFixture[str]
) -> None:
    write_all(paths)
    first = recorded(paths, PARAMS)
    before = everything(client_of(paths))
    longer = changed(train={"steps": 2000})
    with pytest.raises(UserError, match=r"^train ran with train\.steps: 1000, params\.yaml says 2000; `dvc repro` "):
        tracking.track(longer, paths, as_json=False)
    assert tracking.record(longer, paths) is None
    assert "MLflow: not recorded: train ran with train.steps: 1000" in capfd.readouterr().err
    assert everything(client_of(paths)) == before
    tracking.track(OTHER, paths, as_json=True)
    printed = capfd.readouterr()
    assert [line.split(" (")[0] for line in printed.err.splitlines()] == [
        "MLflow: left out: the evaluation",
        "MLflow: left out: the export",
    ]
    run_id = json.loads(printed.out)["run_id"]
    assert run_id != first.run_id
    found = content(client_of(paths), run_id)
    assert not [key for key in found["curves"] if key.startswith(("evaluate/", "export/"))]
    assert found["versions"] == []


def test_files_of_other_weights_or_data_are_left_out(paths: Paths, capfd: pytest.CaptureFixture[str]) -> None:
    write_all(paths)
    write_training(paths, b"others")
    tracking.track(PARAMS, paths, as_json=False)
    reasons = [f"the {part} (models/ddpm/model.safetensors is not the file that {stage} read)" for part, stage in PARTS]
    assert capfd.readouterr().err.splitlines() == [
        f"MLflow: left out: {reason}; `dvc repro` brings it up to date" for reason in reasons
    ]
    write_all(paths)
    write_json(paths.pairs / "manifest.json", {"splits": {"train": {"images": 1453}}})
    write_sums(paths.pairs)
    with pytest.raises(UserError, match=r"^data/pairs/manifest\.json is not the file that train read; `dvc repro`"):
        tracking.track(PARAMS, paths, as_json=False)


@pytest.mark.parametrize("file", ["reports/train.json", "reports/evaluation/val_errors.csv", "models/onnx/extra.onnx"])
def test_results_of_which_a_file_is_damaged_or_gone_are_not_recorded(
    paths: Paths, file: str, capfd: pytest.CaptureFixture[str]
) -> None:
    write_all(paths)
    path = paths.root / file
    if path.suffix == ".onnx":
        path.write_bytes(paths.sampler.read_bytes())  # as of a precision in export.variants
        made_with.write(paths, "export", PARAMS)
        path.unlink()
        why = f"{path}: missing; `dvc repro export` writes it"
    else:
        path.write_text(path.read_text().replace("3", "1"))
        why = f"{path}: damaged (it does not match its digest in "
    assert tracking.record(PARAMS, paths) is None
    assert capfd.readouterr().err.startswith(f"MLflow: not recorded: {why}")
    with pytest.raises(UserError, match=f"^{re.escape(why)}"):
        tracking.track(PARAMS, paths, as_json=False)
    assert client_of(paths).get_experiment_by_name("ddpm") is None


def test_a_lock_is_kept_once_it_describes_the_results(paths: Paths) -> None:
    digest = write_all(paths)
    lock = paths.root / "dvc.lock"
    lock.write_text("schema: '2.0'\nstages: {}\n")  # as it is while the stages run
    found = recorded(paths, PARAMS)
    client = client_of(paths)
    assert "dvc.lock" not in content(client, found.run_id)["files"]
    files = ("reports/train.json", "reports/evaluate.json", "reports/export.json")
    outs = [{"path": file, "md5": hashlib.md5((paths.root / file).read_bytes()).hexdigest()} for file in files]
    lock.write_text(json.dumps({"schema": "2.0", "stages": {"all": {"outs": outs}}}))
    assert recorded(paths, PARAMS) == found
    assert text(client, found.run_id, "dvc.lock") == lock.read_text()
    assert digest in client.get_run(found.run_id).data.tags.values()


def test_a_long_parameter_is_marked_and_kept_whole_in_the_file(paths: Paths) -> None:
    beta = [0.0001 + index * 1e-5 / 3 for index in range(400)]
    given = changed(process={"schedule": {"kind": "given", "beta": beta}, "num_timesteps": 400}, sample={"steps": 50})
    write_all(paths, params=given)
    found = recorded(paths, given)
    client = client_of(paths)
    digest = hashlib.sha256(json.dumps(beta).encode()).hexdigest()
    logged = client.get_run(found.run_id).data.params["process.schedule.beta"]
    assert logged == f"400 values, sha256 {digest}, full value in params.yaml"
    assert yaml_of(client, found.run_id)["process"]["schedule"] == {"kind": "given", "beta": beta}
