"""Recording results: everything once, in the right run and version."""

import json
import shutil
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlflow
import numpy as np
import pytest

from diffusion.errors import UserError
from diffusion.nn.unet import UNetOptions
from diffusion.storage.files import sha256, write_csv, write_json, write_sums
from flows import made_with, tracking
from flows import params as parameters
from flows.paths import Paths
from tests.flows.tracking.trees import (
    LOSS,
    PARAMS,
    changed,
    client_of,
    content,
    image_steps,
    runs_of,
    write_all,
    write_evaluation,
    write_export,
    write_training,
    write_tree,
)


def test_all_that_the_stages_wrote_is_in_one_run(paths: Paths) -> None:
    weights = write_all(paths)
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    client = client_of(paths)
    (run,) = runs_of(client)
    assert run.info.run_id == recorded.run_id
    found = content(client, recorded.run_id)
    assert found["params"]["train.steps"] == "1000"
    assert found["params"]["network.channel_multipliers"] == "[1, 2]"
    sections = parameters.SECTIONS | {"network": UNetOptions}
    del sections["distill"]  # it describes students alone
    fields = {f"{section}.{key}" for section, model in sections.items() for key in model.model_fields}
    facts = {
        "trained.steps": "100",
        "trained.images": "12800",
        "trained.augment": "0.12",
        "exported.sampler.images": "64",
    }
    assert facts.items() <= found["params"].items()
    of_choices = {"train.optimizer.learning_rate", "train.ema.width"}
    assert set(found["params"]) == fields | of_choices | {"seed", "device"} | facts.keys()
    assert found["params"]["train.optimizer"] == "muon"
    assert found["tags"]["mlflow.ddpm.weights_sha256"] == weights
    assert found["curves"]["curves/loss"] == [(row["step"], row["loss"]) for row in LOSS]
    assert found["curves"]["curves/heldout_mse"] == [(50, 0.4), (100, 0.3)]
    assert found["params"]["trained.steps"] == "100"
    assert found["curves"]["evaluate/mse"] == [(0, 0.3)]
    assert found["curves"]["export/denoiser/max_difference"] == [(0, 1e-6)]
    assert image_steps(found["files"]) == [50, 100]
    evaluation = ("bands.csv", "bands.json", "val_errors.csv", "samples.png", "mse_by_t.png")
    reports = {f"evaluation/{name}" for name in (*evaluation, "report.html", "evaluate.json")}
    expected = {"params.yaml", "config.json", "data/data.html", "gate.json"} | reports
    assert expected <= set(found["files"])
    manifest = sha256(paths.pairs / "manifest.json")[:36]
    assert found["datasets"] == [
        ("digits", manifest, "training"),
        ("digits-test", "d" * 36, "test"),
        ("digits-val", "a" * 36, "validation"),
    ]
    assert found["status"] == "FINISHED"
    ((name, version, aliases, tags),) = found["versions"]
    assert (name, version, aliases) == ("ddpm", "1", ["challenger", "champion"])
    assert (tags["val_mse"], tags["mse"], tags["r2"], tags["mlflow.ddpm.weights_sha256"]) == (
        "0.3",
        "0.3",
        "0.7",
        weights,
    )
    assert recorded.model_version == "1"
    assert recorded.aliases == ["challenger", "champion"]
    table = client.search_runs([run.info.experiment_id])[0].data.tags["mlflow.loggedArtifacts"]
    assert json.loads(table) == [{"path": name, "type": "table"} for name in ("evaluation/bands.json", "gate.json")]


def test_the_comparison_of_samplers_is_a_table(paths: Paths) -> None:
    write_all(paths)
    rows: list[Any] = [{"sampler": name, "steps": 5, "kid": 0.25} for name in ("heun", "ddim (eta 1)")]
    write_csv(paths.evaluation / "samplers.csv", rows)
    write_sums(paths.evaluation)
    recorded = tracking.record(PARAMS, paths)
    assert recorded
    files = content(client_of(paths), recorded.run_id)["files"]
    assert {"evaluation/samplers.csv", "evaluation/samplers.json"} <= set(files)
    table = mlflow.artifacts.load_dict(f"runs:/{recorded.run_id}/evaluation/samplers.json")
    assert table["columns"] == ["sampler", "steps", "kid"]
    assert table["data"] == [["heun", 5, 0.25], ["ddim (eta 1)", 5, 0.25]]


def test_variants_and_speeds_are_kept_with_the_run_that_exported_them(paths: Paths) -> None:
    digest = write_all(paths)
    shutil.copyfile(paths.sampler, paths.sampler_in("int8"))
    report = json.loads(paths.export_report.read_text())
    write_json(paths.export_report, report | {"int8": {"mse": 0.31, "loss": 0.03}, "bytes": {"sampler_int8": 7}})
    made_with.write(paths, "export", PARAMS)
    first = tracking.record(PARAMS, paths, speed={"fp32": {"ms_at_1": 2.5}, "int8": {"ms_at_1": 1.5}})
    assert first
    assert tracking.record(PARAMS, paths, speed={"fp32": {"ms_at_1": 9.5}}) == first
    found = content(client_of(paths), first.run_id)
    assert found["tags"]["mlflow.ddpm.weights_sha256"] == digest
    assert {"onnx/denoiser.onnx", "onnx/sampler_int8.onnx"} <= set(found["files"])
    assert "onnx/sampler.onnx" not in found["files"]  # it is the registered model
    assert {key: points[0][1] for key, points in found["curves"].items() if "int8" in key or "speed" in key} == {
        "export/int8/mse": 0.31,
        "export/int8/loss": 0.03,
        "export/bytes/sampler_int8": 7,
        "export/speed/fp32/ms_at_1": 2.5,
        "export/speed/int8/ms_at_1": 1.5,
    }
    assert len(found["versions"]) == 1


def test_the_registered_model_runs_from_the_registry(paths: Paths) -> None:
    write_all(paths, b"123")
    tracking.record(PARAMS, paths)
    model = mlflow.pyfunc.load_model("models:/ddpm@champion")
    noise = np.ones((5, 1, 8, 8), np.float32)
    assert np.array_equal(model.predict({"noise": noise, "steps": np.array([10])})["x_0"], 3 * noise)
    inputs = {spec.name: (spec.type, spec.shape) for spec in model.metadata.get_input_schema().inputs}
    assert inputs == {"noise": (np.dtype("float32"), (-1, 1, 8, 8)), "steps": (np.dtype("int64"), (1,))}
    directory = Path(mlflow.artifacts.download_artifacts("models:/ddpm@champion"))
    assert not [file for file in directory.rglob("*") if "pickle" in file.name or file.suffix == ".pkl"]


def test_recording_again_adds_nothing(paths: Paths) -> None:
    write_all(paths)
    first = tracking.record(PARAMS, paths)
    assert first is not None
    before = content(client_of(paths), first.run_id)
    assert tracking.record(PARAMS, paths) == first
    assert content(client_of(paths), first.run_id) == before
    assert len(runs_of(client_of(paths))) == 1


def test_names_with_odd_characters_are_found_again(paths: Paths) -> None:
    odd = 'a "`;%=--#(ü'
    params = changed(tracking={"model_name": odd, "experiment": f"'{odd}\\"})
    write_all(paths, params=params)
    first = tracking.record(params, paths)
    assert first is not None
    assert (first.model_version, first.aliases) == ("1", ["challenger", "champion"])
    assert tracking.record(params, paths) == first
    (version,) = client_of(paths).search_model_versions()
    assert version.name == odd


def test_stages_log_to_the_run_of_their_weights_from_their_own_processes(paths: Paths) -> None:
    digest = write_training(paths)
    after_train = tracking.record(PARAMS, paths)
    write_evaluation(paths, digest)
    after_evaluate = tracking.record(PARAMS, paths)
    write_export(paths, digest)
    after_export = tracking.record(PARAMS, paths)
    assert after_train
    assert after_evaluate
    assert after_export
    assert after_train.run_id == after_evaluate.run_id == after_export.run_id
    assert (after_train.model_version, after_export.model_version) == (None, "1")


def test_other_weights_get_another_run_and_no_part_of_older_results(paths: Paths) -> None:
    write_all(paths)
    first = tracking.record(PARAMS, paths)
    write_training(paths, b"other")  # evaluation and export of the first weights still lie there
    second = tracking.record(PARAMS, paths)
    assert first
    assert second
    assert first.run_id != second.run_id
    found = content(client_of(paths), second.run_id)
    assert second.model_version is None
    assert "evaluate/mse" not in found["curves"]
    assert found["versions"] == []


def test_the_code_is_named_by_the_workspace_or_by_git(paths: Paths) -> None:
    write_training(paths, b"in a workspace")
    run = {"name": "brave-otter", "flow_run_id": "17", "created": 0, "git_revision": "abc", "git_dirty": True}
    run["teacher"] = "wise-owl"
    write_json(paths.root / "run.json", run)
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    tags = client_of(paths).get_run(recorded.run_id).data.tags
    names = ("mlflow.runName", "mlflow.ddpm.flow_run_id", "mlflow.source.git.commit", "ddpm.git_dirty")
    assert [tags[name] for name in names] == ["brave-otter", "17", "abc", "true"]
    assert tags["mlflow.ddpm.teacher"] == "wise-owl"

    (paths.root / "run.json").unlink()
    write_training(paths, b"in a repository")
    (paths.root / ".gitignore").write_text("/models\n/reports\n/data\n/.ddpm\n")
    git = ["git", "-C", str(paths.root), "-c", "user.name=t", "-c", "user.email=t@localhost"]
    for command in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    (paths.root / "dvc.lock").write_text("changed by dvc repro\n")
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    tags = client_of(paths).get_run(recorded.run_id).data.tags
    head = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True).stdout.strip()
    assert (tags["mlflow.source.git.commit"], tags["ddpm.git_dirty"]) == (head, "false")


def test_each_tree_has_its_own_store_in_the_same_process(tmp_path: Path, mlflow_database: Path) -> None:
    trees = [Paths(tmp_path / name) for name in ("first", "second")]
    for paths in trees:
        paths.state.mkdir(parents=True)
        shutil.copyfile(mlflow_database, paths.mlflow_database)
        write_tree(paths)
        write_training(paths)
        assert tracking.record(PARAMS, paths) is not None
    assert [len(runs_of(client_of(paths))) for paths in trees] == [1, 1]


def test_track_prints_where_things_are(paths: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(UserError, match=r"model\.safetensors: missing"):
        tracking.track(PARAMS, paths, as_json=False)
    write_all(paths)
    tracking.track(PARAMS, paths, as_json=True)
    (line,) = capsys.readouterr().out.splitlines()
    found: Mapping[str, Any] = json.loads(line)
    assert found["model_version"] == "1"
    assert found["aliases"] == ["challenger", "champion"]
    tracking.track(PARAMS, paths, as_json=False)
    assert capsys.readouterr().out.splitlines() == [
        f"run      {found['run_id']}",
        f"address  {found['url']}",
        "model    ddpm version 1 (challenger, champion)",
        "gate     val MSE at most 0.5: met",
        "gate     val MSE significantly lower: no champion yet",
    ]
    assert [row["verdict"] for row in found["gate"]] == ["met", "no champion yet"]


def test_the_model_card_is_beside_the_files_and_follows_its_text(paths: Paths) -> None:
    weights = write_all(paths)
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    client = client_of(paths)
    link, verdict = client.get_model_version("ddpm", "1").description.split("\n\n")
    page = f"/#/experiments/1/runs/{recorded.run_id}/artifacts/onnx/README.md?workflowType=machine_learning"
    assert link == f"[Model card]({page})"
    assert verdict.startswith("Promoted to champion")
    assert "Model card" not in client.get_run(recorded.run_id).data.tags["mlflow.note.content"]

    def cards() -> list[str]:
        places = (f"runs:/{recorded.run_id}/onnx/README.md", "models:/ddpm/1/README.md")
        return [mlflow.artifacts.load_text(place) for place in places]

    assert cards() == [f"# Model with the weights {weights}\n"] * 2
    paths.card.write_text("# Other words on the same model\n")
    made_with.write(paths, "export", PARAMS)
    assert tracking.record(PARAMS, paths) == recorded  # no second run or version
    assert cards() == ["# Other words on the same model\n"] * 2


def test_a_version_without_an_evaluation_says_so_beside_the_link_to_its_card(paths: Paths) -> None:
    write_export(paths, write_training(paths))
    for _ in range(2):
        assert tracking.record(PARAMS, paths) is not None
        description = client_of(paths).get_model_version("ddpm", "1").description
        assert description.split("\n\n")[1:] == ["Not promoted: it was not evaluated."]


def test_a_card_of_another_export_is_not_recorded(paths: Paths) -> None:
    write_all(paths)
    paths.card.write_text("# Another model\n")
    with pytest.raises(UserError, match=r"README\.md: damaged"):
        tracking.track(PARAMS, paths, as_json=False)
