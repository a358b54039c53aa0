"""`ddpm import-model` with the real DVC and a real MLflow store, and what a change of such a model reruns."""

import json
import shutil
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch
from dvc.repo import Repo
from dvc.stage import PipelineStage

from diffusion.errors import UserError
from diffusion.exchange import diffusers
from diffusion.model import Model
from diffusion.nn.unet import UNetOptions
from diffusion.sampling.build import SampleOptions
from diffusion.storage.files import sha256, write_sums
from flows import dvc_add, params, run_list, summary, tracking, workspace, yaml_files
from flows.__main__ import main
from flows.origin import Origin
from flows.paths import Paths
from tests.flows.tracking.trees import PARAMS, client_of, write_all, write_tree

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")]  # in DVC's trie

ROOT = Path(__file__).parents[2]
STAGE = summary.StageSummary("train", 1.0, "run")
MODELS, RUN, OLD = Path("data/models"), Path(".ddpm/runs/calm-owl"), Path("elsewhere/old model")


def save(directory: Path, seed: int = 0, **network: Any) -> str:
    """Write an untrained model as params.yaml describes it; returns the digest of its weights."""
    shape = (PARAMS.pairs.channels, PARAMS.pairs.height, PARAMS.pairs.width)
    options = PARAMS.network.model_copy(update=network)
    Model.new(shape, options, PARAMS.process, seed=seed).save(directory)
    return sha256(directory / "model.safetensors")


@pytest.fixture
def models(repository: Path) -> Path:
    """A repository with the models of a run and of a folder."""
    (repository / MODELS).mkdir()
    shutil.copy(ROOT / MODELS / "SHA256SUMS", MODELS)
    save(RUN / "models/ddpm")
    workspace.Run("calm-owl", "id", "2026-01-01T00:00:00+00:00", "", False, "completed").write(RUN)
    save(OLD, seed=1)
    return repository


@pytest.fixture
def dvc_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """`dvc add` without starting a process, which takes a second."""

    def add(target: Path, root: Path, _: bool) -> None:
        with Repo(str(root)) as repo:
            repo.add([str(target)])

    monkeypatch.setattr(dvc_add, "_dvc_add", add)


def content(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}


def refused(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    """The message with which an import is refused; nothing in data/models changes."""
    before = content(MODELS)
    capsys.readouterr()
    assert main(["import-model", *arguments]) in (1, 2)
    assert content(MODELS) == before
    *_, last = capsys.readouterr().err.splitlines()
    return last.removeprefix("ddpm import-model: error: ")


def test_the_model_of_a_run_is_added_to_dvc(models: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-model", "calm"]) == 0
    digest = sha256(RUN / "models/ddpm/model.safetensors")
    origin = Origin(run="calm-owl", weights_sha256=digest)
    expected = content(RUN / "models/ddpm") | {"origin.json": (json.dumps(asdict(origin), indent=2) + "\n").encode()}
    assert content(MODELS / "calm-owl") == expected
    said = capsys.readouterr().out
    assert said.startswith("data/models/calm-owl now holds the model of run calm-owl: ")
    assert f" parameters, 8x8x1, sha256 {digest[:12]}\n" in said
    assert (
        "    ddpm set train.start_from=calm-owl\n    git add data/models/calm-owl.dvc data/models/.gitignore\n" in said
    )
    assert "differs" not in said
    assert (MODELS / ".gitignore").read_text() == "/calm-owl\n"
    assert yaml_files.read_yaml(MODELS / "calm-owl.dvc")["desc"] == "the model of run calm-owl"
    assert {path.name for path in MODELS.iterdir()} == {"calm-owl", "calm-owl.dvc", ".gitignore", "SHA256SUMS"}
    with Repo(str(models)) as repo:
        assert repo.status(["data/models/calm-owl.dvc"]) == {}
    shutil.rmtree(MODELS / "calm-owl")
    workspace.dvc(models, "checkout", "data/models/calm-owl.dvc")
    assert content(MODELS / "calm-owl") == expected


@pytest.mark.usefixtures("models", "dvc_in_this_process")
def test_a_folder_is_imported_and_replaced_only_if_asked(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-model", str(OLD)]) == 0
    assert Origin.read(MODELS / "old-model").folder == "elsewhere/old model"
    assert "the model of the folder elsewhere/old model: " in capsys.readouterr().out
    assert refused(capsys, str(OLD)) == (
        "data/models/old-model: already exists; choose another --name, or replace it with --force"
    )
    assert main(["import-model", "calm-owl", "--name", "old-model", "--force"]) == 0
    assert (MODELS / "old-model/config.json").read_bytes() == (RUN / "models/ddpm/config.json").read_bytes()
    assert Origin.read(MODELS / "old-model").run == "calm-owl"
    # An imported model that is imported from there comes from where it did.
    assert main(["import-model", "data/models/old-model", "--name", "second"]) == 0
    assert content(MODELS / "second") == content(MODELS / "old-model")
    assert (MODELS / ".gitignore").read_text() == "/old-model\n/second\n"


@pytest.mark.usefixtures("models", "dvc_in_this_process")
def test_what_cannot_be_imported(capsys: pytest.CaptureFixture[str]) -> None:
    assert refused(capsys, "calm", "--name", "a/b").startswith("--name: must start with a letter or digit and contain")
    assert refused(capsys, "calm", "--name", "SHA256SUMS", "--force").startswith("data/models/SHA256SUMS: already exis")
    assert refused(capsys, "elsewhere/none") == "elsewhere/none: no such folder"
    Path("empty").mkdir()
    assert refused(capsys, "empty") == (
        "empty: holds neither config.json and model.safetensors, as models/ddpm, nor a model of diffusers"
    )
    weights = OLD / "model.safetensors"
    whole = weights.read_bytes()
    weights.write_bytes(whole[:-1] + bytes([whole[-1] ^ 1]))
    assert refused(capsys, str(OLD)) == f"{weights}: damaged (it does not match its digest in SHA256SUMS)"
    weights.write_bytes(whole)
    (OLD / "SHA256SUMS").unlink()
    assert "has no SHA256SUMS, so it cannot be verified" in refused(capsys, str(OLD))
    (RUN / "models/ddpm/model.safetensors").unlink()
    assert refused(capsys, "calm").startswith("run 'calm-owl': .ddpm/runs/calm-owl/models/ddpm/model.safetensors is mi")
    record = workspace.Run.read(RUN)
    workspace.Run(**asdict(record) | {"teacher": "old-ape"}).write(RUN)
    assert refused(capsys, "calm") == (
        "run 'calm-owl': is a distillation; import the model of its teacher, run 'old-ape'"
    )
    shutil.rmtree(".dvc")
    assert refused(capsys, str(OLD)) == ".dvc: no such folder here; run this in the pipeline's folder"


@pytest.mark.usefixtures("dvc_in_this_process")
@pytest.mark.parametrize("force", [False, True])
def test_a_failure_of_dvc_leaves_all_as_it_was(
    models: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, force: bool
) -> None:
    assert main(["import-model", "calm-owl"]) == 0

    def fail(target: Path, *_: Any) -> None:
        assert (target / "origin.json").exists()
        target.with_name(f"{target.name}.dvc").write_text("half")
        (models / MODELS / ".gitignore").write_text("half")
        raise UserError("dvc add: no space")

    monkeypatch.setattr(dvc_add, "_dvc_add", fail)
    assert refused(capsys, str(OLD), *(["--name", "calm-owl", "--force"] if force else [])) == "dvc add: no space"


@pytest.mark.usefixtures("models", "dvc_in_this_process")
def test_a_model_of_diffusers_is_converted(capsys: pytest.CaptureFixture[str]) -> None:
    network = UNetOptions(base_channels=32, channel_multipliers=(1, 2), attention_levels=(), convention="diffusers")
    Model.new((1, 8, 8), network, seed=3).save("plain")
    diffusers.export_model(Path("plain"), Path("pipeline"), SampleOptions(), force=False)
    assert main(["import-model", "pipeline"]) == 0
    *_, last = capsys.readouterr().out.splitlines()
    assert last.startswith("First change what differs in params.yaml. The model has ")
    assert "network.attention_levels [], not [1]; " in last
    own, other = Model.load("plain").net.state_dict(), Model.load(MODELS / "pipeline").net.state_dict()
    assert all(torch.equal(own[name], other[name]) for name in own | other)


@pytest.fixture
def registered(models: Path) -> Paths:
    """MLflow with version 1 of the registered model, the champion, in a working tree with its results."""
    paths = Paths(models)
    write_tree(paths)
    save(models / "made", seed=2)
    write_all(paths, (models / "made/model.safetensors").read_bytes())
    shutil.copy(models / "made/config.json", paths.model)
    write_sums(paths.model)
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    assert (recorded.model_version, "champion" in recorded.aliases) == ("1", True)
    return paths


@pytest.mark.usefixtures("dvc_in_this_process")
def test_versions_come_from_mlflow(registered: Paths, capsys: pytest.CaptureFixture[str]) -> None:
    client = client_of(registered)
    (run,) = client.search_runs([experiment.experiment_id for experiment in client.search_experiments()])
    weights = sha256(registered.model / "model.safetensors")
    name = run.info.run_name or ""
    of_run = {"run": name, "run_id": run.info.run_id, "weights_sha256": weights}
    assert main(["import-model", "1"]) == 0
    assert Origin.read(MODELS / "ddpm-1") == Origin(version="ddpm version 1", **of_run)
    assert f"the model of ddpm version 1, trained in run {name}: " in capsys.readouterr().out
    assert content(MODELS / "ddpm-1").items() >= content(registered.model).items()
    assert main(["import-model", "champion", "--name", "best"]) == 0
    assert content(MODELS / "best") == content(MODELS / "ddpm-1")
    # Its weights are known by their digest.
    assert main(["import-model", "models/ddpm"]) == 0
    assert Origin.read(MODELS / "ddpm") == Origin(folder="models/ddpm", **of_run)
    for given in ("7", "nobody"):
        assert refused(capsys, given).startswith(
            f"{given}: no run (see `ddpm runs`), no folder, and no version or alias of the registered model ddpm in "
        )
    (file,) = registered.mlflow_artifacts.rglob("model.safetensors")
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    message = refused(capsys, "1", "--name", "other")
    assert message.startswith("models:/m-")
    assert message.endswith("/model.safetensors: damaged (these are not the weights of ddpm version 1)")


@pytest.mark.usefixtures("models", "dvc_in_this_process")
def test_without_mlflow_only_versions_cannot_be_imported(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    assert refused(capsys, "3").startswith("MLflow at http://127.0.0.1:9: ")
    assert main(["import-model", "calm-owl"]) == 0
    assert "so the run that trained the model is not known" in capsys.readouterr().err
    assert Origin.read(MODELS / "calm-owl").run_id == ""


@pytest.mark.usefixtures("dvc_in_this_process")
def test_dvc_reruns_the_training_when_these_weights_change_and_only_then(models: Path) -> None:
    (dependency,) = (
        dep for dep in yaml_files.read_yaml(ROOT / "dvc.yaml")["stages"]["train"]["deps"] if "start_from" in dep
    )
    stage = {"cmd": "mkdir -p out", "params": ["train"], "deps": [dependency], "outs": ["out"]}
    yaml_files.write_yaml(models / "dvc.yaml", {"stages": {"train": stage}})

    def changed() -> bool:
        """Whether DVC would run the stage; then runs it."""
        with Repo(str(models)) as repo:
            return "train" in [stage.name for stage in repo.reproduce(["train"]) if isinstance(stage, PipelineStage)]

    def start_from(name: str) -> None:
        assert main(["set", f"train.start_from={name}"]) == 0

    def bring(given: Path, *arguments: str) -> None:
        assert main(["import-model", str(given), *arguments]) == 0

    save(models / "third", seed=3)
    assert changed()
    assert not changed()  # from random weights
    bring(RUN / "models/ddpm", "--name", "first")
    assert not changed()
    start_from("first")
    assert changed()
    assert not changed()
    bring(OLD, "--name", "other")
    Origin(run="another-name", weights_sha256=Origin.read(MODELS / "first").weights_sha256).write(MODELS / "first")
    assert not changed()  # another model, or another origin of these weights
    bring(models / "third", "--name", "first", "--force")
    assert changed()
    assert not changed()
    start_from("''")
    assert changed()  # or restores what it had


@pytest.mark.usefixtures("models", "dvc_in_this_process")
def test_a_run_checks_out_its_model_and_says_what_it_starts_from(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["import-model", "calm-owl"]) == 0
    shutil.rmtree(MODELS / "calm-owl")  # it is in DVC's cache
    document: Callable[..., Any] = lambda **network: workspace.document(  # noqa: E731
        None, {"train": {"start_from": "calm-owl"}, "network": network}
    )
    with workspace.use("next", "id-next", document()) as directory:
        assert params.load(directory / "params.yaml").train.start_from == "calm-owl"
        assert (directory / MODELS / "calm-owl/model.safetensors").exists()
        summary.write(
            directory, summary.Summary("next", [STAGE, STAGE], {}, "/sampler.onnx", "", "", start="run calm-owl")
        )
    assert workspace.Run.read(directory).start == "run calm-owl"
    capsys.readouterr()
    run_list.show()
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert rows[0][-2:] == ["STARTS", "FROM"]
    assert [row[-2:] for row in rows if row[:1] == ["next"]] == [["run", "calm-owl"]]
    summary.show("next")
    assert capsys.readouterr().out.startswith("run next, started from run calm-owl\n")
    with (
        pytest.raises(UserError, match=r"^train.start_from: .* has network.base_channels 32, not 64; set the same"),
        workspace.use("wrong", "id-wrong", document(base_channels=64)),
    ):
        raise AssertionError
    with (
        pytest.raises(UserError, match=r"^train.start_from: data/models/none holds no model; `ddpm import-model` brin"),
        workspace.use("none", "id-none", workspace.document(None, {"train": {"start_from": "none"}})),
    ):
        raise AssertionError
