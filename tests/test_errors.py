"""Wording of messages."""

import pytest

from diffusion.errors import counted


@pytest.mark.parametrize(
    ("found", "right"),
    [
        (counted(0, "image"), "0 images"),
        (counted(1, "image"), "1 image"),
        (counted(1, "class", "classes"), "1 class"),
        (counted(2, "class", "classes"), "2 classes"),
        (counted(1200, "step", spec=","), "1,200 steps"),
        (counted(0.5, "day", spec="g"), "0.5 days"),
        (counted(1.0, "day", spec="g"), "1 day"),
    ],
)
def test_a_number_agrees_with_its_noun(found: str, right: str) -> None:
    assert found == right
