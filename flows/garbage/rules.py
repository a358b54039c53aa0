"""Which of several things go by `--keep` and `--older-than`."""

import re
from collections.abc import Iterable
from datetime import UTC, datetime, timedelta
from typing import NamedTuple, TypeVar

from diffusion.errors import UsageError

T = TypeVar("T")
_UNITS = {"h": "hours", "d": "days", "w": "weeks"}
_MOST = timedelta(days=36_500)


class Rule(NamedTuple):
    """What goes: all but the newest `keep`, if that is given, as far as they are older than `older_than`."""

    keep: int | None = None
    older_than: timedelta | None = None
    text: str = ""
    """`older_than` as it was given."""

    @classmethod
    def of(cls, keep: int | None, older_than: str | None) -> "Rule":
        """The rule of the options; raises UsageError naming the one that is wrong."""
        if keep is not None and keep < 0:
            raise UsageError(f"--keep: must be at least 0 (got {keep})")
        if older_than is None:
            return cls(keep)
        found = re.fullmatch(r"([0-9]{1,6})([hdw])", older_than)
        age = min(timedelta(**{_UNITS[found[2]]: int(found[1])}), _MOST) if found else None
        if age is None:
            raise UsageError(
                f"--older-than: must be a number of hours, days or weeks, such as 30d (got {older_than!r})"
            )
        return cls(keep, age, older_than)

    def selects(self, things: Iterable[tuple[T, datetime]]) -> list[T]:
        """Those of `things` that go, oldest first; each is given with its time."""
        if self.keep is None and self.older_than is None:
            return []
        ordered = sorted(things, key=lambda each: each[1])
        surplus = ordered[: max(0, len(ordered) - (self.keep or 0))]
        return [
            thing for thing, time in surplus if self.older_than is None or time < datetime.now(UTC) - self.older_than
        ]

    def __str__(self) -> str:
        parts = [] if self.keep is None else [f"all but the newest {self.keep}" if self.keep else "all"]
        parts += [f"older than {self.text}"] if self.older_than is not None else []
        return ", ".join(parts) or "--keep and --older-than choose"
