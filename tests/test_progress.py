"""Progress lines."""

import pytest

from diffusion import progress
from diffusion.progress import Done, Progress


def test_lines_can_be_read_back(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_LINES", 0.0)
    with Progress("train", total=100, unit="images", done=20) as counter:
        counter.advance(30, "loss 0.0712")
        progress.say("train: step 5: held-out MSE 0.1")
        counter.advance(50)
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].endswith(", loss 0.0712")
    assert [progress.parse(line) for line in lines] == [
        Done("train", 50, 100),
        None,
        Done("train", 100, 100),
        Done("train", 100, 100),
    ]
