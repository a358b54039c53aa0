"""Progress lines."""

import time

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
    read = [progress.parse(line) for line in lines]
    assert [done and (done[:4], done.seconds_left == 0, done.note) for done in read] == [
        (("train", 50, 100, "images"), True, "loss 0.0712"),  # in no time
        None,
        (("train", 100, 100, "images"), True, ""),
        (("train", 100, 100, "images"), True, ""),
    ]


@pytest.mark.parametrize(
    ("line", "done"),
    [
        (
            "train: 640/128000 images, 812/s, 157 s left, loss 0.0712",
            Done("train", 640, 128000, "images", 812.0, 157, "loss 0.0712"),
        ),
        ("evaluate: 2/50 steps, 0.5/s, 96 s left", Done("evaluate", 2, 50, "steps", 0.5, 96)),
        ("evaluate: 0/50 steps, drawing samples", Done("evaluate", 0, 50, "steps", note="drawing samples")),
        ("evaluate-student: 2/62 steps, 9/s, 7 s left", Done("evaluate-student", 2, 62, "steps", 9.0, 7)),
        ("train: step 30: held-out MSE 0.3597", None),
        ("evaluate: 2/50 steps of many", None),
    ],
)
def test_what_a_line_says(line: str, done: Done | None) -> None:
    assert progress.parse(line) == done


def test_work_without_units_reminds_of_itself(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "SECONDS_BETWEEN_REMINDERS", 0.05)
    with progress.working("export: tracing"):
        time.sleep(0.3)
    lines = capsys.readouterr().err.splitlines()
    assert lines[:2] == ["export: tracing", "export: tracing, 0 s"]
    time.sleep(0.1)
    assert capsys.readouterr().err == ""  # over


def test_a_line_is_one_line_and_obeys_no_terminal_codes(capsys: pytest.CaptureFixture[str]) -> None:
    progress.say("shard: 2 classes: cat\nand dog 4, \x1b[31mfüchse 4, 猫 1")
    assert capsys.readouterr().err == "shard: 2 classes: cat\\nand dog 4, \\x1b[31mfüchse 4, 猫 1\n"
