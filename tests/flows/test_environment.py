"""Settings in environment variables: an invalid value gives one line that names variable and value."""

from pathlib import Path

import pytest

from diffusion.errors import UserError
from flows import services
from flows.__main__ import main
from flows.environment import setting
from flows.stages.training import CHECKPOINT_SECONDS, PREVIEW_QUALITY, checkpoint_seconds, preview_quality

MAIN = {
    "PREFECT_PORT": (lambda: services.main(["status"]), "error: "),
    "MLFLOW_PORT": (lambda: services.main(["down"]), "error: "),
    "DDPM_KEEP_RUNS": (lambda: main(["runs"]), "ddpm runs: error: "),
    "DDPM_KEEP_DAYS": (lambda: main(["runs"]), "ddpm runs: error: "),
}


@pytest.mark.parametrize("value", ["many", "", "-1", "1e7"])
@pytest.mark.parametrize("variable", MAIN)
def test_an_invalid_value_gives_one_line(
    variable: str,
    value: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv(variable, value)
    command, prefix = MAIN[variable]
    assert command() == 1
    output = capsys.readouterr()
    assert output.out == ""
    (line,) = output.err.splitlines()
    assert line.startswith(f"{prefix}{variable}: ")
    assert line.endswith(f"(got {value!r})")


@pytest.mark.parametrize("value", ["often", "-1", "nan"])
def test_an_invalid_checkpoint_interval_is_rejected_before_training(
    value: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(CHECKPOINT_SECONDS, value)
    with pytest.raises(UserError, match=rf"^{CHECKPOINT_SECONDS}: .* \(got '{value}'\)$"):
        checkpoint_seconds()


@pytest.mark.parametrize("value", ["some", "-1", "1", "19", "2.5"])
def test_an_invalid_number_of_samples_is_rejected_before_training(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(PREVIEW_QUALITY, value)
    with pytest.raises(UserError, match=rf"^{PREVIEW_QUALITY}: .* \(got '?{value}'?\)$"):
        preview_quality()


def test_previews_are_not_compared_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    assert preview_quality() == 0
    monkeypatch.setenv(PREVIEW_QUALITY, "20")
    assert preview_quality() == 20


def test_a_setting_is_converted_or_the_default(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DDPM_TEST", "0.5")
    assert setting("DDPM_TEST", 60.0, float) == 0.5
    monkeypatch.delenv("DDPM_TEST")
    assert setting("DDPM_TEST", 60.0, float) == 60.0
