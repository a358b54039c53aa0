"""Pairs in more tars than are open at once."""

from pathlib import Path

import numpy as np
import pytest

from diffusion.pairs import pairs as module
from diffusion.pairs.pairs import Pairs
from diffusion.storage import tar
from diffusion.storage.tar import SPLITS
from tests.pairs.test_pairs import make


def test_more_tars_than_are_open_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each block in a tar of its own, of which one is open."""
    directory = tmp_path / "together"
    make(directory)
    monkeypatch.setattr(module, "MAX_TAR_BYTES", 1)
    monkeypatch.setattr(tar, "MAX_OPEN", 1)
    manifest = make(tmp_path / "pairs")
    assert [len(manifest.splits[split].tars) for split in SPLITS] == [3, 2, 1]
    for split in SPLITS:
        pairs, together = Pairs(tmp_path / "pairs", split), Pairs(directory, split)
        for block in (*range(pairs.blocks), 0):
            np.testing.assert_array_equal(pairs.x_0(block), together.x_0(block))
            np.testing.assert_array_equal(pairs.labels(block), together.labels(block))
            for ours, theirs in zip(pairs.recipe(block, 1), together.recipe(block, 1), strict=True):
                np.testing.assert_array_equal(ours, theirs)
            if split != "train":
                for ours, theirs in zip(pairs.heldout(block, 1), together.heldout(block, 1), strict=True):
                    np.testing.assert_array_equal(ours, theirs)
