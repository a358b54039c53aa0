"""Files that could not be used: set aside with their reasons, and too many of them stop the work."""

import csv
import io
from collections import Counter
from collections.abc import Sequence

from diffusion.errors import shortened
from diffusion.sources.folders import OTHER_FILE
from diffusion.sources.shards import Remark, Unusable
from diffusion.sources.splits import COPY_OF_TEST

EXPECTED = frozenset({OTHER_FILE, COPY_OF_TEST})
"""Reasons that are no loss: such files may be any number."""
MAX_REASONS = 5
"""Maximum number of reasons in a message."""


def reasons(rejected: Sequence[Remark]) -> list[tuple[str, int]]:
    """The reasons with their numbers of files, the most frequent ones first."""
    return Counter(remark.reason for remark in rejected).most_common()


def check(name: str, used: int, rejected: Sequence[Remark], max_rejected: float) -> None:
    """Raise Unusable if more than the share `max_rejected` of the images could not be used.

    Files that are no images, and copies of images in the source's own test split, do not count.
    """
    lost = [remark for remark in rejected if remark.reason not in EXPECTED]
    if len(lost) <= max_rejected * (len(lost) + used):
        return
    found = reasons(lost)
    examples = {remark.reason: remark.file for remark in reversed(lost)}
    listed = [f"{count} x {reason} ({shortened(examples[reason])})" for reason, count in found[:MAX_REASONS]]
    more = [f"{len(found) - MAX_REASONS} other reasons"] if len(found) > MAX_REASONS else []
    raise Unusable(
        f"{name}: {len(lost)} of {len(lost) + used} images cannot be used, more than shard.max_rejected "
        f"({max_rejected:g}): {', '.join(listed + more)}; mend or remove these files, or increase shard.max_rejected"
    )


def table(rejected: Sequence[Remark]) -> bytes:
    """The files and reasons as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [("file", "reason"), *((each.file, each.reason) for each in rejected)]
    )
    return text.getvalue().encode()
