"""Following a training in its MLflow run."""

import math
import signal
import time

import pytest
from mlflow import MlflowClient
from PIL import Image

from diffusion.errors import Stopped
from diffusion.storage.files import write_json
from flows import tracking
from flows.paths import Paths
from tests.flows.tracking.trees import (
    LOSS,
    PARAMS,
    client_of,
    content,
    everything,
    follow,
    image_steps,
    runs_of,
    write_all,
    write_training,
)


@pytest.mark.parametrize("known", [True, False])
def test_an_interrupted_training_resumes_in_its_mlflow_run(paths: Paths, known: bool) -> None:
    live = tracking.live(PARAMS, paths, None, "f1")
    follow(live, paths, range(81))  # the checkpoint is of step 50: what came later is trained again
    with pytest.raises(Stopped), live:
        raise Stopped(signal.SIGTERM)
    assert live.run_id is not None
    client = client_of(paths)
    assert client.get_run(live.run_id).info.status == "KILLED"
    with tracking.live(PARAMS, paths, live.run_id if known else None, "f1") as again:
        assert again.run_id == live.run_id
        assert client.get_run(live.run_id).info.status == "RUNNING"
        follow(again, paths, range(51, 101))
    write_all(paths)
    recorded = tracking.record(PARAMS, paths, live.run_id)
    assert recorded is not None
    assert recorded.run_id == live.run_id
    assert len(runs_of(client)) == 1
    found = content(client, live.run_id)
    assert found["curves"]["curves/loss"] == [(row["step"], row["loss"]) for row in LOSS]
    assert found["curves"]["train/images_per_second"] == [(row["step"], 1000.0) for row in LOSS]
    assert found["curves"]["curves/heldout_mse"] == [(50, 0.4), (100, 0.3)]
    assert image_steps(found["files"]) == [50, 100]
    assert found["status"] == "FINISHED"


def test_a_resumed_training_has_the_name_and_origin_of_the_flow_run_that_resumed_it(paths: Paths) -> None:
    facts, found = paths.root / "run.json", []
    for name, number in (("calm-owl", "17"), ("brave-otter", "18"), ("", "")):
        if name:
            write_json(facts, {"name": name, "flow_run_id": number, "git_revision": number * 20, "git_dirty": True})
        else:
            facts.unlink()  # as of `dvc repro`
        with pytest.raises(KeyboardInterrupt), tracking.live(PARAMS, paths, None, "fingerprint"):
            raise KeyboardInterrupt
        (run,) = runs_of(client_of(paths))
        tags = run.data.tags
        names = (run.info.run_name, tags["mlflow.runName"])
        found.append((*names, *(tags.get(key) for key in ("mlflow.ddpm.flow_run_id", "mlflow.source.git.commit"))))
    assert found == [
        ("calm-owl", "calm-owl", "17", "17" * 20),
        ("brave-otter", "brave-otter", "18", "18" * 20),
        ("digits-fingerpr", "digits-fingerpr", None, None),
    ]


@pytest.mark.parametrize("followed", [True, False])
def test_a_training_that_went_back_is_shown_by_its_second_attempt(paths: Paths, followed: bool) -> None:
    """MLflow keeps both points of a step; those of the second attempt are the later ones, which give its figures."""
    with tracking.live(PARAMS, paths, None, "f1") as live:
        follow(live, paths, range(51))
        for step in (60, 80, 100):
            live.metrics({"loss": 9.0}, step)
        live.metrics({"heldout_mse": math.nan}, 100)
        broken = paths.state / "broken.png"
        Image.new("L", (64, 64)).save(broken)
        live.image(broken, 100)
        time.sleep(0.01)  # MLflow distinguishes points by the millisecond
        if followed:
            follow(live, paths, range(51, 101))
    write_all(paths)
    assert tracking.record(PARAMS, paths, live.run_id) is not None
    client = client_of(paths)
    (run,) = runs_of(client)
    history = sorted(client.get_metric_history(run.info.run_id, "curves/loss"), key=lambda point: point.timestamp)
    assert {point.step: point.value for point in history} == {row["step"]: row["loss"] for row in LOSS}
    assert len(history) == len(LOSS) + 3
    figures = {key: run.data.metrics[f"curves/{key}"] for key in ("loss", "heldout_mse")}
    assert figures == {"loss": LOSS[-1]["loss"], "heldout_mse": 0.3}
    pictures = image_steps(content(client, run.info.run_id)["files"])
    assert pictures == ([50, 100, 100] if followed else [50, 100])


def test_a_failed_training_is_marked_so(paths: Paths) -> None:
    live = tracking.live(PARAMS, paths, None, "f1")
    with pytest.raises(ZeroDivisionError), live:
        raise ZeroDivisionError
    assert live.run_id is not None
    assert client_of(paths).get_run(live.run_id).info.status == "FAILED"


def test_a_run_that_could_not_be_begun_is_completed_by_its_record(
    paths: Paths, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patched:
        patched.setattr(MlflowClient, "log_inputs", lambda *_, **__: 1 / 0)
        with tracking.live(PARAMS, paths, None, "f1") as live:
            follow(live, paths, range(101))
    write_all(paths)
    recorded = tracking.record(PARAMS, paths, live.run_id)
    assert recorded is not None
    (run,) = runs_of(client_of(paths))
    assert (run.info.run_id, run.info.status) == (recorded.run_id, "FINISHED")


@pytest.mark.parametrize("flow", ["17", "18"])
def test_a_training_whose_server_went_away_is_recorded_in_its_run(paths: Paths, flow: str) -> None:
    """The checkpoint with the run's id is gone by then. Another flow run's training is left alone."""
    facts = {"name": "calm-owl", "git_revision": 20 * "1", "git_dirty": False}
    write_json(paths.root / "run.json", facts | {"flow_run_id": "17"})
    with tracking.live(PARAMS, paths, None, "f1") as live:
        follow(live, paths, range(51))
    client = client_of(paths)
    assert live.run_id is not None
    client.update_run(live.run_id, status="RUNNING")  # as if the server had not heard of the end
    write_all(paths)
    write_json(paths.root / "run.json", facts | {"flow_run_id": flow})
    recorded = tracking.record(PARAMS, paths, None)
    assert recorded is not None
    assert (recorded.run_id == live.run_id) == (flow == "17")
    assert len(runs_of(client)) == (1 if flow == "17" else 2)
    found = content(client, recorded.run_id)
    assert (found["status"], found["curves"]["curves/heldout_mse"]) == ("FINISHED", [(50, 0.4), (100, 0.3)])
    assert found["curves"]["curves/loss"] == [(row["step"], row["loss"]) for row in LOSS]


def train_again(paths: Paths, fingerprint: str, weights: bytes) -> tuple[str, str]:
    """A whole training; returns the runs that it was followed and recorded in."""
    with tracking.live(PARAMS, paths, None, fingerprint) as live:
        follow(live, paths, range(101))
    write_training(paths, weights)
    recorded = tracking.record(PARAMS, paths, live.run_id)
    assert live.run_id is not None
    assert recorded is not None
    return live.run_id, recorded.run_id


@pytest.mark.parametrize("fingerprint", ["f1", "f2"])
def test_trainings_that_give_the_same_results_share_a_run(paths: Paths, fingerprint: str) -> None:
    """The same training, forced, or one by code that changed without effect."""
    _, first = train_again(paths, "f1", b"weights")
    before = everything(client_of(paths))
    followed, recorded = train_again(paths, fingerprint, b"weights")
    assert recorded == first
    assert followed != first
    after = everything(client_of(paths))
    assert (after["runs"], after["models"]) == (before["runs"], before["models"])
    followed, recorded = train_again(paths, "f1", b"others")  # an equal training on another machine
    assert followed == recorded != first
    assert [run.info.status for run in runs_of(client_of(paths))] == ["FINISHED", "FINISHED"]
