"""Which version becomes champion, and what its description says of it."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from diffusion.errors import UserError
from flows import __main__ as cli
from flows import tracking
from flows.paths import Paths
from tests.flows.tracking.champions import BETTER, BITS, FIRST, LIMIT, QUALITY, SAMPLES, gated, version
from tests.flows.tracking.trees import PARAMS, client_of, everything, judgments, write_all


def table(paths: Paths, number: str) -> list[dict[str, Any]]:
    """The latest decision on a version, read with pandas from the table in its run."""
    client = client_of(paths)
    run = client.get_run(str(client.get_model_version("ddpm", number).run_id))
    assert {"path": "gate.json", "type": "table"} in json.loads(run.data.tags["mlflow.loggedArtifacts"])
    file = Path(str(run.info.artifact_uri).removeprefix("file://")) / "gate.json"
    rows = pd.read_json(file, orient="split").astype(object)
    return [dict(row) for row in rows.where(rows.notna(), None).to_dict("records")]


def description(paths: Paths, number: str) -> str:
    return judgments(paths, "ddpm", number)


def test_the_first_version_within_the_gate_is_champion(paths: Paths) -> None:
    assert version(paths, b"poor", [0.6] * 5, mse=0.1) == ["challenger"]
    assert description(paths, "1") == "Not promoted: val MSE 0.6000 is above the limit, 0.5"
    assert version(paths, b"fair", [0.4] * 5, mse=0.9) == ["challenger", "champion"]  # test has no say
    assert description(paths, "2") == "Promoted to champion: the first version; val MSE 0.4000 is at most 0.5"


def test_a_wider_gate_judges_again(paths: Paths) -> None:
    version(paths, b"poor", [0.6] * 5)
    wider = gated({"kind": "limit", "figure": "val_mse", "value": 0.7})
    assert version(paths, b"poor", [0.6] * 5, params=wider) == ["challenger", "champion"]
    assert len(client_of(paths).search_model_versions("name = 'ddpm'")) == 1
    assert description(paths, "1").split("\n\n") == [
        "Not promoted: val MSE 0.6000 is above the limit, 0.5",
        "Promoted to champion: the first version; val MSE 0.6000 is at most 0.7",
    ]


@pytest.mark.parametrize(
    ("lower_by", "champion", "reason"),
    [
        # Lower on all images by about as much: small compared with the errors' spread, but not with its noise.
        ([0.010, 0.011, 0.009, 0.012, 0.008], "2", "the difference, -0.01 ± 0.0014 (95 %, 5 images), is below zero"),
        # Lower on average by more, but not on every image.
        (
            [0.100, -0.080, 0.090, -0.060, 0.010],
            "1",
            "the difference, -0.012 ± 0.073 (95 %, 5 images), is not below zero by more than the measurement noise",
        ),
        (
            [0.0] * 5,
            "1",
            "the difference, +0 ± 0 (95 %, 5 images), is not below zero by more than the measurement noise",
        ),
        ([-0.1] * 5, "1", "the difference, +0.1 ± "),
    ],
)
def test_a_version_must_be_better_on_val_beyond_the_noise(
    first: Paths, lower_by: list[float], champion: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    second = [error - by for error, by in zip(FIRST, lower_by, strict=True)]
    version(first, b"second", second, mse=0.1 if champion == "1" else 0.9)  # its error on test says the opposite
    aliases = client_of(first).get_registered_model("ddpm").aliases
    assert {alias: str(at) for alias, at in aliases.items()} == {"challenger": "2", "champion": champion}
    said = description(first, "2")
    assert said.startswith("Promoted to champion: " if champion == "2" else "Not promoted: ")
    assert f"val MSE {np.mean(second):.4f} against 0.3000 of version 1" in said
    assert reason in said
    assert capfd.readouterr().err == ""
    assert description(first, "1").startswith("Promoted to champion: the first version")


def test_other_data_let_no_new_champion_in_but_by_hand(first: Paths, capfd: pytest.CaptureFixture[str]) -> None:
    assert version(first, b"second", [0.1] * 5, pairs="b") == ["challenger"]
    why = (
        "val MSE is not comparable: val_pairs_sha256 is aaaaaaaaaaaa for version 1, bbbbbbbbbbbb for version 2; "
        "`ddpm promote 2 --reason TEXT` makes version 2 the champion"
    )
    assert capfd.readouterr().err == f"MLflow: champion of ddpm stays version 1: {why}\n"
    assert description(first, "2") == f"Not promoted: {why}"
    tracking.promote(PARAMS, first, "2", " the new camera ")
    assert capfd.readouterr().out == "ddpm version 2 is now champion (previously version 1)\n"
    assert description(first, "2").split("\n\n") == [
        f"Not promoted: {why}",
        "Promoted to champion by hand in place of version 1: the new camera",
    ]
    # From now on, versions are compared on the new data.
    assert version(first, b"third", [0.09] * 5, pairs="b") == ["challenger", "champion"]
    before = everything(client_of(first))
    version(first, b"second", [0.1] * 5, pairs="b")  # brought again, it is not judged again
    assert everything(client_of(first)) == before


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        ("val_errors.csv", "val MSE of each image of version 1 is not in its run"),
        ("SHA256SUMS", "val MSE of version 1 is not in its run with a SHA256SUMS"),
        ("scored.json", "val MSE of version 1 does not match SHA256SUMS in its run"),
        ("run", "val MSE of version 1 is not in its run with a SHA256SUMS"),
        ("val_errors.csv's digits", "val MSE of version 1 does not match SHA256SUMS in its run"),
        ("evaluate.json's digits", "val MSE of version 1 does not match SHA256SUMS in its run"),
    ],
)
def test_a_champion_without_its_errors_is_only_replaced_manually(
    first: Paths, gone: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    client = client_of(first)
    run_id = str(client.get_model_version("ddpm", "1").run_id)
    artifacts = Path(str(client.get_run(run_id).info.artifact_uri).removeprefix("file://"))
    if gone.endswith("'s digits"):
        file = artifacts / "evaluation" / gone.removesuffix("'s digits")
        file.write_text(file.read_text().replace("0.3", "0.9"))
    elif gone != "run":
        (artifacts / "evaluation" / gone).unlink()
    else:  # as `mlflow gc` does
        client.delete_run(run_id)
        client._tracking_client.store._hard_delete_run(run_id)
    assert version(first, b"second", [0.1] * 5) == ["challenger"]
    assert f"Not promoted: {reason} ({run_id}); `ddpm promote 2" in description(first, "2")
    assert "ddpm promote 2 --reason TEXT" in capfd.readouterr().err


def test_a_champion_registered_by_hand_is_only_replaced_by_hand(first: Paths) -> None:
    client = client_of(first)
    client.create_model_version("ddpm", "/models/of/others")
    client.set_registered_model_alias("ddpm", "champion", "2")
    assert version(first, b"second", [0.1] * 5) == ["challenger"]
    assert "val MSE of version 2 is not known, as it was registered without a run; `ddpm p" in description(first, "3")


def test_altered_errors_promote_nothing(first: Paths, capfd: pytest.CaptureFixture[str]) -> None:
    write_all(first, b"second", val_errors=[0.4] * 5)
    errors = first.evaluation / "val_errors.csv"
    errors.write_text(errors.read_text().replace("0.4", "0.1"))
    before = everything(client_of(first))
    assert tracking.record(PARAMS, first) is None
    assert capfd.readouterr().err.startswith(f"MLflow: not recorded: {errors}: damaged (")
    assert everything(client_of(first)) == before


def test_what_promote_refuses(paths: Paths, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(
        UserError, match=r"^version 1: no such version of ddpm in MLflow at sqlite:.*; no version is registered$"
    ):
        tracking.promote(PARAMS, paths, "1", "why")
    version(paths, b"first", FIRST)
    version(paths, b"second", [0.9] * 5)
    before = everything(client_of(paths))
    for number in ("3", "newest"):
        with pytest.raises(UserError, match=rf"^version {number}: no such version of ddpm .*; available: 1, 2$"):
            tracking.promote(PARAMS, paths, number, "why")
    with pytest.raises(UserError, match=r"^--reason: must not be empty"):
        tracking.promote(PARAMS, paths, "2", " ")
    assert everything(client_of(paths)) == before
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://127.0.0.1:9")
    with pytest.raises(UserError, match=r"^MLflow at http://127\.0\.0\.1:9: \[Errno 111\] Connection refused$"):
        tracking.promote(PARAMS, paths, "2", "why")


def test_the_command_promotes(
    first: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version(first, b"second", [0.4] * 5)
    monkeypatch.chdir(first.root)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # the tests' own process continues
    assert cli.main(["promote", "2", "--reason", "its pictures are better"]) == 0
    assert capsys.readouterr().out == "ddpm version 2 is now champion (previously version 1)\n"
    assert cli.main(["promote", "7", "--reason", "none"]) == 1
    assert capsys.readouterr().err.startswith("ddpm promote: error: version 7: no such version of ddpm")


LOWER = [0.28, 0.33, 0.24, 0.30, 0.27]
"""FIRST, lower by 0.016 on average."""


def test_the_decision_is_a_table_in_the_versions_run(measured: Paths) -> None:
    params = gated(LIMIT, BETTER, BITS, QUALITY)
    assert [(row["figure"], row["rule"], row["verdict"]) for row in table(measured, "1")] == [
        ("val MSE", "at most 0.5", "met"),
        ("val MSE", "significantly lower", "no champion yet"),
        ("bits/dim", "not significantly higher", "no champion yet"),
        ("Fréchet distance", "not significantly higher by more than 0.1", "no champion yet"),
    ]
    better = SAMPLES | {"frechet_distance": 2.25, "frechet_distance_low": 2.15, "frechet_distance_high": 2.35}
    worse_bits = [3.1, 3.15, 3.45]
    aliases = version(measured, b"second", LOWER, params=params, bits=worse_bits, figures=better)
    assert aliases == ["challenger", "champion"]
    limit, error, likelihood, quality = table(measured, "2")
    assert (limit["challenger"], limit["margin"], limit["champion"]) == (pytest.approx(0.284), 0.5, None)
    interval = stats.ttest_rel(LOWER, FIRST)
    half = 1.96 * interval.statistic**-1 * np.mean(np.subtract(LOWER, FIRST))
    assert error["difference"] == pytest.approx(-0.016)
    assert (error["low"], error["high"]) == (pytest.approx(-0.016 - half), pytest.approx(-0.016 + half))
    # (0.1, -0.05, 0.05): mean 1/30, standard deviation sqrt(0.0175 / 3)
    assert likelihood["difference"] == pytest.approx(1 / 30)
    assert likelihood["high"] - likelihood["difference"] == pytest.approx(1.96 * (0.0175 / 3 / 3) ** 0.5)
    assert (quality["challenger"], quality["champion"]) == (2.25, 2.0)
    assert quality["low"] == pytest.approx(0.25 - (0.2**2 + 0.1**2) ** 0.5)
    assert {row["verdict"] for row in (limit, error, likelihood, quality)} == {"met"}
    said = description(measured, "2")
    assert said.startswith("Promoted to champion: val MSE 0.2840 is at most 0.5; val MSE 0.2840 against 0.3000 of")
    assert said == "Promoted to champion: " + "; ".join(row["reason"] for row in (limit, error, likelihood, quality))


@pytest.mark.parametrize(
    ("bits", "figures", "reason"),
    [
        (
            [3.2, 3.4, 3.61],
            SAMPLES,
            "bits/dim 3.4033 against 3.2000 of version 1: the difference, +0.2033 ± 0.0065 (95 %, 3 images), is above "
            "zero",
        ),
        (
            [3.0, 3.2, 3.4],
            SAMPLES | {"frechet_distance": 3.0, "frechet_distance_low": 2.8, "frechet_distance_high": 3.2},
            "Fréchet distance 3.0000 against 2.0000 of version 1: the difference, +1 ± 0.28 (95 %, 256 samples each), "
            "is above 0.1",
        ),
    ],
)
def test_a_better_version_is_refused_if_another_figure_is_worse(
    measured: Paths, bits: list[float], figures: dict[str, Any], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    params = gated(LIMIT, BETTER, BITS, QUALITY)
    assert version(measured, b"second", LOWER, params=params, bits=bits, figures=figures) == ["challenger"]
    assert description(measured, "2") == f"Not promoted: {reason}"
    assert [row["verdict"] for row in table(measured, "2")].count("not met") == 1
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize(
    ("bits", "figures", "reason"),
    [
        ([], SAMPLES, "bits/dim of version 2 was not measured"),
        ([3.0, 3.2], SAMPLES, "bits/dim is not comparable: the number of images is 3 for version 1, 2 for version 2"),
        ([3.0, 3.2, 3.4], {}, "Fréchet distance of version 2 was not measured"),
        (
            [3.0, 3.2, 3.4],
            SAMPLES | {"frechet_distance_heldout": 0.85},
            "Fréchet distance is not comparable: frechet_distance_heldout is 0.75 for version 1, 0.85 for version 2",
        ),
        (
            [3.0, 3.2, 3.4],
            SAMPLES | {"quality_images": 128},
            "Fréchet distance is not comparable: quality_images is 256 for version 1, 128 for version 2",
        ),
    ],
)
def test_figures_that_cannot_be_compared_promote_nothing(
    measured: Paths, bits: list[float], figures: dict[str, Any], reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    params = gated(LIMIT, BETTER, BITS, QUALITY)
    assert version(measured, b"second", LOWER, params=params, bits=bits, figures=figures) == ["challenger"]
    by_hand = "`ddpm promote 2 --reason TEXT` makes version 2 the champion"
    assert description(measured, "2") == f"Not promoted: {reason}; {by_hand}"
    assert [row["reason"] for row in table(measured, "2") if row["verdict"] == "not comparable"] == [reason]
    assert capfd.readouterr().err == f"MLflow: champion of ddpm stays version 1: {reason}; {by_hand}\n"


def test_a_champion_of_an_earlier_version_has_fewer_figures(first: Paths) -> None:
    """Its run has no evaluate.json; its error is comparable all the same."""
    client = client_of(first)
    run_id = str(client.get_model_version("ddpm", "1").run_id)
    artifacts = Path(str(client.get_run(run_id).info.artifact_uri).removeprefix("file://"))
    (artifacts / "evaluation/evaluate.json").unlink()
    params = gated(BITS, QUALITY)
    version(first, b"second", LOWER, params=params, bits=[3.0, 3.2], figures=SAMPLES)
    assert description(first, "2") == (
        f"Not promoted: bits/dim of version 1 is not in its run ({run_id}); Fréchet distance of version 1 is not in "
        f"its run ({run_id}); `ddpm promote 2 --reason TEXT` makes version 2 the champion"
    )
    assert version(first, b"third", LOWER) == ["challenger", "champion"]


def test_a_changed_gate_replaces_the_table_and_adds_to_the_description(first: Paths) -> None:
    version(first, b"second", [0.32, 0.36, 0.27, 0.34, 0.30])
    assert [row["verdict"] for row in table(first, "2")] == ["met", "not met"]
    only_a_limit = gated(LIMIT)
    assert version(first, b"second", [0.32, 0.36, 0.27, 0.34, 0.30], params=only_a_limit) == ["challenger", "champion"]
    assert [(row["rule"], row["verdict"]) for row in table(first, "2")] == [("at most 0.5", "met")]
    assert description(first, "2").count("\n\n") == 1
    recorded = tracking.record(only_a_limit, first)  # nothing is judged again, but the table is there
    assert recorded is not None
    assert recorded.gate == [{**row, "reason": "val MSE 0.3180 is at most 0.5"} for row in table(first, "2")]


def test_without_rules_the_newest_version_is_champion(paths: Paths) -> None:
    assert version(paths, b"first", [0.9] * 5, params=gated()) == ["challenger", "champion"]
    assert version(paths, b"second", [0.95] * 5, params=gated()) == ["challenger", "champion"]
    assert description(paths, "2") == "Promoted to champion: tracking.gate has no rules"
    assert table(paths, "2") == []
