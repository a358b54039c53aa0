"""Which version becomes champion, and what its description says of it."""

from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from diffusion.errors import UserError
from flows import __main__ as cli
from flows import params as parameters
from flows import tracking
from flows.paths import Paths
from flows.tracking import champion
from tests.flows.tracking.trees import PARAMS, changed, client_of, everything, write_all

FIRST = [0.30, 0.34, 0.26, 0.31, 0.29]
"""Errors on five validation images; their mean is 0.3."""


def version(
    paths: Paths,
    weights: bytes,
    val_errors: list[float],
    mse: float = 0.3,
    pairs: str = "a",
    params: parameters.Params = PARAMS,
) -> list[str]:
    """Register a version; returns its aliases."""
    write_all(paths, weights, mse, pairs * 64, params, val_errors)
    recorded = tracking.record(params, paths)
    assert recorded is not None
    return recorded.aliases


def description(paths: Paths, number: str) -> str:
    return str(client_of(paths).get_model_version("ddpm", number).description)


def test_the_first_version_within_the_gate_is_champion(paths: Paths) -> None:
    assert version(paths, b"poor", [0.6] * 5, mse=0.1) == ["challenger"]
    assert description(paths, "1") == "Not promoted: val MSE 0.6000 exceeds tracking.max_mse, 0.5"
    assert version(paths, b"fair", [0.4] * 5, mse=0.9) == ["challenger", "champion"]  # test has no say
    assert (
        description(paths, "2")
        == "Promoted to champion: the first version whose val MSE, 0.4000, is at most tracking.max_mse, 0.5"
    )


def test_a_wider_gate_judges_again(paths: Paths) -> None:
    version(paths, b"poor", [0.6] * 5)
    assert version(paths, b"poor", [0.6] * 5, params=changed(tracking={"max_mse": 0.7})) == ["challenger", "champion"]
    assert len(client_of(paths).search_model_versions("name = 'ddpm'")) == 1
    assert description(paths, "1").split("\n\n") == [
        "Not promoted: val MSE 0.6000 exceeds tracking.max_mse, 0.5",
        "Promoted to champion: the first version whose val MSE, 0.6000, is at most tracking.max_mse, 0.7",
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
    paths: Paths, lower_by: list[float], champion: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    version(paths, b"first", FIRST, mse=0.3)
    second = [error - by for error, by in zip(FIRST, lower_by, strict=True)]
    version(paths, b"second", second, mse=0.1 if champion == "1" else 0.9)  # its error on test says the opposite
    aliases = client_of(paths).get_registered_model("ddpm").aliases
    assert {alias: str(at) for alias, at in aliases.items()} == {"challenger": "2", "champion": champion}
    said = description(paths, "2")
    assert said.startswith("Promoted to champion: " if champion == "2" else "Not promoted: ")
    assert f"val MSE {np.mean(second):.4f}, version 1's is 0.3000" in said
    assert reason in said
    assert capfd.readouterr().err == ""
    assert description(paths, "1").startswith("Promoted to champion: the first version")


def test_the_interval_is_that_of_the_paired_z_test() -> None:
    """For many images, where Student's t is normal: the rule then is scipy's paired test at 2.5 %, one-sided."""
    rng = np.random.default_rng(0)
    old = rng.uniform(0.1, 0.5, 5000)
    agreed = set()
    for shift in np.linspace(-0.004, 0.002, 25):
        new = old + rng.normal(shift, 0.05, len(old))
        mean, margin = champion.compare(new, old)
        p = stats.ttest_rel(new, old, alternative="less").pvalue
        assert (mean + margin < 0) == (p < stats.norm.sf(1.96))
        agreed.add(mean + margin < 0)
    assert agreed == {True, False}


def test_other_data_let_no_new_champion_in_but_by_hand(paths: Paths, capfd: pytest.CaptureFixture[str]) -> None:
    version(paths, b"first", FIRST)
    assert version(paths, b"second", [0.1] * 5, pairs="b") == ["challenger"]
    why = (
        "version 1 was scored on val pairs aaaaaaaaaaaa, version 2 on bbbbbbbbbbbb: not comparable; "
        "`ddpm promote 2 --reason TEXT` makes version 2 the champion"
    )
    assert capfd.readouterr().err == f"MLflow: champion of ddpm stays version 1: {why}\n"
    assert description(paths, "2") == f"Not promoted: {why}"
    tracking.promote(PARAMS, paths, "2", " the new camera ")
    assert capfd.readouterr().out == "ddpm version 2 is now champion (previously version 1)\n"
    assert description(paths, "2").split("\n\n") == [
        f"Not promoted: {why}",
        "Promoted to champion by hand in place of version 1: the new camera",
    ]
    # From now on, versions are compared on the new data.
    assert version(paths, b"third", [0.09] * 5, pairs="b") == ["challenger", "champion"]
    before = everything(client_of(paths))
    version(paths, b"second", [0.1] * 5, pairs="b")  # brought again, it is not judged again
    assert everything(client_of(paths)) == before


@pytest.mark.parametrize(
    ("gone", "reason"),
    [
        ("val_errors.csv", "are not in its run with a SHA256SUMS"),
        ("SHA256SUMS", "are not in its run with a SHA256SUMS"),
        ("run", "are not in its run with a SHA256SUMS"),
        ("digits", "do not match SHA256SUMS in its run"),
    ],
)
def test_a_champion_without_its_errors_is_only_replaced_manually(
    paths: Paths, gone: str, reason: str, capfd: pytest.CaptureFixture[str]
) -> None:
    version(paths, b"first", FIRST)
    client = client_of(paths)
    run_id = str(client.get_model_version("ddpm", "1").run_id)
    artifacts = Path(str(client.get_run(run_id).info.artifact_uri).removeprefix("file://"))
    if gone == "digits":
        errors = artifacts / "evaluation/val_errors.csv"
        errors.write_text(errors.read_text().replace("0.3", "0.9"))
    elif gone != "run":
        (artifacts / "evaluation" / gone).unlink()
    else:  # as `mlflow gc` does
        client.delete_run(run_id)
        client._tracking_client.store._hard_delete_run(run_id)
    assert version(paths, b"second", [0.1] * 5) == ["challenger"]
    assert f"the per-image errors of version 1 {reason} ({run_id})" in description(paths, "2")
    assert "ddpm promote 2 --reason TEXT" in capfd.readouterr().err


def test_altered_errors_promote_nothing(paths: Paths, capfd: pytest.CaptureFixture[str]) -> None:
    version(paths, b"first", [0.3] * 5)
    write_all(paths, b"second", val_errors=[0.4] * 5)
    errors = paths.evaluation / "val_errors.csv"
    errors.write_text(errors.read_text().replace("0.4", "0.1"))
    before = everything(client_of(paths))
    assert tracking.record(PARAMS, paths) is None
    assert capfd.readouterr().err.startswith(f"MLflow: not recorded: {errors}: damaged (")
    assert everything(client_of(paths)) == before


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
    paths: Paths, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    version(paths, b"first", FIRST)
    version(paths, b"second", [0.4] * 5)
    monkeypatch.chdir(paths.root)
    monkeypatch.setattr(cli.signal, "signal", lambda *_: None)  # the tests' own process continues
    assert cli.main(["promote", "2", "--reason", "its pictures are better"]) == 0
    assert capsys.readouterr().out == "ddpm version 2 is now champion (previously version 1)\n"
    assert cli.main(["promote", "7", "--reason", "none"]) == 1
    assert capsys.readouterr().err.startswith("ddpm promote: error: version 7: no such version of ddpm")
