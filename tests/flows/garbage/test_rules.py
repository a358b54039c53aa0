"""`--keep` and `--older-than`."""

from datetime import UTC, datetime, timedelta

import pytest

from diffusion.errors import UsageError
from flows.garbage.rules import Rule

THINGS = [(f"{days} days", datetime.now(UTC) - timedelta(days=days)) for days in (0, 40, 1, 6, 100)]


@pytest.mark.parametrize(
    ("keep", "older_than", "gone"),
    [
        (None, None, []),
        (2, None, ["100 days", "40 days", "6 days"]),
        (0, None, ["100 days", "40 days", "6 days", "1 days", "0 days"]),
        (5, None, []),
        (9, None, []),
        (None, "30d", ["100 days", "40 days"]),
        (None, "12h", ["100 days", "40 days", "6 days", "1 days"]),
        (None, "10w", ["100 days"]),
        (None, "0d", ["100 days", "40 days", "6 days", "1 days", "0 days"]),
        (None, "999999w", []),
        (2, "30d", ["100 days", "40 days"]),
        (4, "5d", ["100 days"]),
    ],
)
def test_what_goes(keep: int | None, older_than: str | None, gone: list[str]) -> None:
    assert Rule.of(keep, older_than).selects(THINGS) == gone


@pytest.mark.parametrize("text", ["30", "d", "-3d", "1.5d", "3 d", "30m", "30D", "1234567d", "three days", "٣d"])
def test_other_ages_are_refused(text: str) -> None:
    with pytest.raises(UsageError, match=r"^--older-than: must be a number of hours, days or weeks, such as 30d"):
        Rule.of(None, text)


def test_a_negative_number_is_refused() -> None:
    with pytest.raises(UsageError, match=r"^--keep: must be at least 0 \(got -1\)"):
        Rule.of(-1, None)
