"""The error message in the output of DVC; the outputs are verbatim from DVC 3."""

import pytest

from flows.dvc_output import reason

FOOTER = "\nHaving any troubles? Hit us up at https://dvc.org/support, we are always happy to help!\n"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        (f"ERROR: unexpected error - [Errno 28] No space left{FOOTER}", "unexpected error - [Errno 28] No space left"),
        (
            "WARNING: Cache missing\nERROR: Checkout failed for following targets:\nmodels/ddpm\n"
            "Is your cache up to date?\n<https://error.dvc.org/missing-files>\n",
            "Checkout failed for following targets: models/ddpm Is your cache up to date?",
        ),
        ("ERROR: failed to reproduce 'a'\nERROR: bad, see https://dvc.org/doc\n", "bad, see https://dvc.org/doc"),
        (f"Traceback (most recent call last):\n  File x\nMemoryError\n{FOOTER}", "MemoryError"),
        (FOOTER, ""),
        ("", ""),
    ],
)
def test_the_error_is_reported_rather_than_where_to_get_help(output: str, expected: str) -> None:
    assert reason(output) == expected
