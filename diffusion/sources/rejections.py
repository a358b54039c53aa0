"""Rejected files: those that cannot be used, with their reasons. Too many of them stop the stage."""

import csv
import io
from collections import Counter
from collections.abc import Sequence

from diffusion.errors import UserError, counted, shortened
from diffusion.sources.images import OTHER_FILE
from diffusion.sources.splits import COPY_OF_TEST
from diffusion.storage.tar import Facts

EXPECTED = frozenset({OTHER_FILE, COPY_OF_TEST})
"""Reasons that do not count; there may be any number of such files."""
MAX_REASONS = 5
"""Maximum number of reasons in a message."""


class TooFewImages(UserError):
    """Too few images of a source can be used."""


class Remark(Facts):
    """A file of the source, with the reason for rejecting it or a warning of its decoder."""

    file: str
    reason: str


def reasons(rejected: Sequence[Remark]) -> list[tuple[str, int]]:
    """The reasons with their numbers of files, the most frequent ones first."""
    return Counter(remark.reason for remark in rejected).most_common()


def check(name: str, used: int, rejected: Sequence[Remark], max_rejected: float) -> None:
    """Raise TooFewImages if no image could be used, or more than the share `max_rejected` could not be used.

    Files that are not images, and copies of images in the source's own test split, do not count.
    """
    if not used:
        why = f"; the first: {rejected[0].file}: {rejected[0].reason}" if rejected else ""
        raise TooFewImages(f"{name}: {counted(len(rejected), 'image')}, of which none can be used{why}")
    lost = [remark for remark in rejected if remark.reason not in EXPECTED]
    if len(lost) <= max_rejected * (len(lost) + used):
        return
    first = {remark.reason: remark.file for remark in reversed(lost)}
    found = [
        f"{shortened(first[reason])}{f' and {count - 1} more' if count > 1 else ''}: {reason}"
        for reason, count in reasons(lost)
    ]
    raise TooFewImages(
        f"{name}: {len(lost)} of {len(lost) + used} images cannot be used, more than shard.max_rejected "
        f"({max_rejected:g}) allows: repair or remove them, or increase it; {'; '.join(found[:MAX_REASONS])}"
    )


def table(rejected: Sequence[Remark]) -> bytes:
    """The files and reasons as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [("file", "reason"), *((each.file, each.reason) for each in rejected)]
    )
    return text.getvalue().encode()
