"""What a user reads of a run in MLflow: its description, its tags, and the names of its metrics."""

import json
import re

import pytest
from mlflow import MlflowClient

from flows import mlflow_pages as pages
from flows import tracking
from flows.paths import Paths
from flows.tracking import names
from tests.flows.tracking.trees import PARAMS, changed, client_of, content, everything, runs_of, write_all

NOTE = "mlflow.note.content"


def note(client: MlflowClient, run_id: str | None) -> str:
    assert run_id is not None
    return client.get_run(run_id).data.tags.get(NOTE, "")


def test_a_run_says_what_was_trained_on_what_and_how_well(paths: Paths) -> None:
    with tracking.live(PARAMS, paths, None, "f1") as live:
        pass
    client = client_of(paths)
    assert note(client, live.run_id) == (
        "Training of network `unet` on **digits**, 1,452 greyscale images of 8x8 pixels: at most 1,000 steps of 128 "
        "images.\n\nNo results have been recorded yet."
    )
    write_all(paths, mse=0.3, val_errors=[0.2] * 4)
    assert tracking.record(PARAMS, paths, live.run_id) is not None
    trained, verdict, figures, glossary = note(client, live.run_id).split("\n\n")
    assert trained == (
        "Network `unet` trained on **digits**, 1,452 greyscale images of 8x8 pixels: 100 steps (of at most 1,000) of "
        "128 images. The images were augmented with probability 0.12."
    )
    assert figures == (
        "Held-out MSE 0.3000 (0.2900 to 0.3100); R² 0.7000; val MSE 0.2000. In parentheses: 95 % confidence intervals."
    )
    assert verdict == (
        "**Verdict on [ddpm version 1](/#/models/ddpm/versions/1?workflowType=machine_learning):** Promoted to "
        "champion: the first version; val MSE 0.2000 is at most 0.5"
    )
    assert live.run_id is not None
    recorded = client.get_run(live.run_id).data
    assert (recorded.params["train.augment"], recorded.params["trained.augment"]) == ("auto", "0.12")
    metrics = recorded.metrics
    named = set(re.findall(r"`(evaluate/\w+)`", glossary))
    assert {"evaluate/mse", "evaluate/r2", "evaluate/val_mse"} <= named & set(metrics)


def test_a_run_that_reuses_weights_says_whose(paths: Paths) -> None:
    write_all(paths)
    first = tracking.record(PARAMS, paths)
    other = changed(sample={"steps": 10})
    write_all(paths, mse=0.25, params=other)
    second = tracking.record(other, paths)
    assert first is not None
    assert second is not None
    client = client_of(paths)
    name = client.get_run(first.run_id).info.run_name
    link = f"[run {name}](/#/experiments/1/runs/{first.run_id}?workflowType=machine_learning)"
    assert f"The weights were trained in {link} and are reused here." in note(client, second.run_id)
    assert "reused" not in note(client, first.run_id)


def test_epochs_are_described_as_steps(paths: Paths) -> None:
    params = changed(train={"steps": 0, "epochs": 10})
    with tracking.live(params, paths, None, "f1") as live:
        pass
    assert "at most 114 steps of 128 images" in note(client_of(paths), live.run_id)  # 1,452 images: 11.3 an epoch
    write_all(paths, params=params)
    assert tracking.record(params, paths, live.run_id) is not None
    assert "100 steps (of at most 114) of 128 images" in note(client_of(paths), live.run_id)


def test_a_description_that_a_user_edited_or_removed_is_kept(paths: Paths) -> None:
    client = client_of(paths)
    for text in ("my own words", ""):
        params = changed(tracking={"experiment": f"e{len(text)}", "model_name": f"m{len(text)}"})
        with tracking.live(params, paths, None, "f1") as live:
            pass
        assert live.run_id is not None
        client.set_tag(live.run_id, NOTE, text)
        write_all(paths, params=params)
        recorded = tracking.record(params, paths, live.run_id)
        assert recorded is not None
        assert recorded.run_id == live.run_id
        assert note(client, live.run_id) == text


def test_manual_promotion_changes_only_the_verdict(paths: Paths) -> None:
    write_all(paths, val_errors=[0.9] * 4)
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    client = client_of(paths)
    before = note(client, recorded.run_id).split("\n\n")
    assert "Not promoted: val MSE 0.9000 is above the limit, 0.5" in before[1]
    tracking.promote(PARAMS, paths, "1", "the only one")
    after = note(client, recorded.run_id).split("\n\n")
    assert after[1].endswith("Promoted to champion by hand: the only one")
    assert (after[0], after[2:]) == (before[0], before[2:])
    assert tracking.record(PARAMS, paths) is not None  # nothing is judged again, and the verdict stays
    assert note(client, recorded.run_id).split("\n\n") == after


def test_users_see_no_digests(paths: Paths) -> None:
    """MLflow's pages show the tags that do not begin with `mlflow.`."""
    write_all(paths)
    tracking.record(PARAMS, paths)
    client = client_of(paths)
    (run,) = runs_of(client)
    assert [tag for tag in run.data.tags if not tag.startswith("mlflow.")] in ([], ["ddpm.git_dirty"])
    shown = [tag for tag in client.get_model_version("ddpm", "1").tags if not tag.startswith("mlflow.")]
    assert sorted(shown) == ["mse", "r2", "val_mse", "val_mse_se"]


def test_results_that_an_earlier_version_recorded_are_found(paths: Paths) -> None:
    """Earlier versions' tags began with `ddpm.`; neither a run, nor a model, nor a version is made for them again."""
    write_all(paths)
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    client = client_of(paths)
    run = client.get_run(recorded.run_id)
    models = client.search_logged_models([run.info.experiment_id])
    for tag, value in run.data.tags.items():
        if tag.startswith(names.HIDDEN):
            client.set_tag(recorded.run_id, names.former(tag), value)
            client.delete_tag(recorded.run_id, tag)
    client.delete_tag(recorded.run_id, NOTE)  # which they did not write
    client.delete_tag(recorded.run_id, names.former(f"{names.HIDDEN}note_sha256"))
    for model in models:
        for tag, value in model.tags.items():
            if tag.startswith(names.HIDDEN):
                client.set_logged_model_tags(model.model_id, {names.former(tag): value})
                client.delete_logged_model_tag(model.model_id, tag)
    for tag, value in client.get_model_version("ddpm", "1").tags.items():
        if tag.startswith(names.HIDDEN):
            client.set_model_version_tag("ddpm", "1", names.former(tag), value)
            client.delete_model_version_tag("ddpm", "1", tag)
    before = everything(client)
    assert tracking.record(PARAMS, paths) == recorded
    after = everything(client)
    assert note(client, recorded.run_id).startswith("Network `unet` trained on")
    for kind in ("models", "versions", "bytes"):
        assert after[kind] == before[kind]
    (now,) = after["runs"].values()
    (then,) = before["runs"].values()
    assert {key: now[key] for key in ("params", "curves", "files", "versions")} == {
        key: then[key] for key in ("params", "curves", "files", "versions")
    }
    assert set(now["tags"]) - set(then["tags"]) == {NOTE, f"{names.HIDDEN}note_sha256"}
    # Other results of the same weights find those of the earlier version.
    other = changed(sample={"steps": 10})
    write_all(paths, mse=0.25, params=other)
    second = tracking.record(other, paths)
    assert second is not None
    assert second.run_id != recorded.run_id
    assert second.trained_in == recorded.run_id


def test_loss_and_heldout_error_are_in_the_first_section_of_charts(paths: Paths) -> None:
    """MLflow draws a section for all metrics that share what comes before the last slash, in alphabetical order."""
    write_all(paths)
    recorded = tracking.record(PARAMS, paths)
    assert recorded is not None
    found = content(client_of(paths), recorded.run_id)
    sections = sorted({name.rpartition("/")[0] for name in found["curves"]})
    assert sections == ["curves", "evaluate", "evaluate/intervals", "export/denoiser", "train"]
    assert [name for name in found["curves"] if name.startswith("curves/")] == ["curves/heldout_mse", "curves/loss"]
    assert names.curve("loss_t000_099") == "loss_by_timestep/t000-099"
    report = {"mse": 0.25, "mse_low": 0.2, "images": 190, "bits_per_dim_images": 10, "pairs": 1520, "band": [1.0]}
    assert names.figures("evaluate", report) == (
        {"evaluate/mse": 0.25, "evaluate/intervals/mse_low": 0.2},
        {"evaluated.images": 190, "evaluated.bits_per_dim_images": 10, "evaluated.pairs": 1520},
    )
    assert names.figures("train", {"kept_step": 3, "augment": 0.12, "rollbacks": 0}) == (
        {"train/rollbacks": 0},
        {"trained.kept_step": 3, "trained.augment": 0.12},
    )


def test_the_runs_table_has_a_view_with_the_key_figures(paths: Paths) -> None:
    write_all(paths)
    assert tracking.record(PARAMS, paths) is not None
    client = client_of(paths)
    experiment = client.get_experiment_by_name("ddpm")
    assert experiment is not None
    view = json.loads(experiment.tags["mlflow.sharedViewState.key-figures"])
    state = json.loads(view["state"])
    assert "metrics.`evaluate/mse`" in state["selectedColumns"]
    client.set_experiment_tag(experiment.experiment_id, "mlflow.sharedViewState.key-figures", "of an earlier version")
    assert tracking.record(PARAMS, paths) is not None
    experiment = client.get_experiment_by_name("ddpm")
    assert experiment is not None
    assert json.loads(experiment.tags["mlflow.sharedViewState.key-figures"]) == view


def test_addresses_open_the_pages_for_training(monkeypatch: pytest.MonkeyPatch) -> None:
    server, training = "http://m:5000/", "workflowType=machine_learning"
    assert pages.runs(server, "7") == f"http://m:5000/#/experiments/7/runs?{training}&viewStateShareKey=key-figures"
    assert pages.run(server, "7", "abc") == f"http://m:5000/#/experiments/7/runs/abc?{training}"
    assert pages.version(server, "a b", "3") == f"http://m:5000/#/models/a%20b/versions/3?{training}"
    asked = []

    def answer(url: str) -> object:
        asked.append(url)
        return {"experiment": {"experiment_id": "7"}}

    monkeypatch.setattr(pages.http, "json", answer)
    assert pages.runs_of(server, "my runs") == pages.runs(server, "7")
    assert asked == ["http://m:5000/api/2.0/mlflow/experiments/get-by-name?experiment_name=my+runs"]
    monkeypatch.setattr(pages.http, "json", lambda _: None)
    assert pages.runs_of(server, "none yet") == f"http://m:5000/#/experiments?{training}"
