"""Rejected files: those that cannot be used, with their reasons. Too many of them stop the stage."""

import csv
import io
from collections import Counter
from collections.abc import Iterable, Sequence

from diffusion.errors import UserError, counted, shortened
from diffusion.sources.images import OTHER_FILE
from diffusion.sources.splits import COPY_OF_TEST
from diffusion.storage.tar import Facts

EXPECTED = frozenset({OTHER_FILE, COPY_OF_TEST})
"""Reasons that do not count; there may be any number of such files."""
MAX_REASONS = 5
"""Maximum number of reasons in a message."""
MAX_LISTED = 100_000
"""Maximum number of rejected files that are listed; there may be one for each image, such as a text beside it."""


class TooFewImages(UserError):
    """Too few images of a source can be used."""


class Remark(Facts):
    """A file of the source, with the reason for rejecting it or a warning of its decoder."""

    file: str
    reason: str


class Rejections:
    """Rejected files: the first MAX_LISTED of them, and the number of all by reason."""

    def __init__(self, remarks: Iterable[Remark] = ()) -> None:
        self.listed, self.reasons = list[Remark](), Counter[str]()
        self._first = dict[str, str]()
        for remark in remarks:
            self.add(remark)

    def add(self, remark: Remark) -> None:
        self.reasons[remark.reason] += 1
        self._first.setdefault(remark.reason, remark.file)
        if len(self.listed) < MAX_LISTED:
            self.listed.append(remark)

    def __len__(self) -> int:
        return self.reasons.total()

    @property
    def more(self) -> dict[str, int]:
        """The number of files that are not listed, by reason."""
        return dict(self.reasons - Counter(remark.reason for remark in self.listed))

    def check(self, name: str, used: int, max_rejected: float) -> None:
        """Raise TooFewImages if no image could be used, or more than the share `max_rejected` could not be used.

        Files that are not images, and copies of images in the source's own test split, do not count.
        """
        if not used:
            why = f"; the first: {self.listed[0].file}: {self.listed[0].reason}" if self.listed else ""
            raise TooFewImages(f"{name}: {counted(len(self), 'image')}, of which none can be used{why}")
        lost = [(reason, count) for reason, count in self.reasons.most_common() if reason not in EXPECTED]
        number = sum(count for _, count in lost)
        if number <= max_rejected * (number + used):
            return
        found = [
            f"{shortened(self._first[reason])}{f' and {count - 1} more' if count > 1 else ''}: {reason}"
            for reason, count in lost[:MAX_REASONS]
        ]
        raise TooFewImages(
            f"{name}: {number} of {number + used} images cannot be used, more than shard.max_rejected "
            f"({max_rejected:g}) allows: repair or remove them, or increase it; {'; '.join(found)}"
        )


def table(rejected: Sequence[Remark]) -> bytes:
    """The files and reasons as CSV."""
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(
        [("file", "reason"), *((each.file, each.reason) for each in rejected)]
    )
    return text.getvalue().encode()
