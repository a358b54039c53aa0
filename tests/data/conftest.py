"""Fixtures for the tests of the data layer."""

import gc
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import webdataset


@pytest.fixture
def webdataset_samples(monkeypatch: pytest.MonkeyPatch) -> Callable[[list[str]], list[dict[str, Any]]]:
    """Reads tar files with plain webdataset, which must need no pickle."""
    monkeypatch.setenv("WDS_SECURE", "1")

    def read(paths: list[str]) -> list[dict[str, Any]]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)  # webdataset leaves its files to the garbage collector
            samples = list(webdataset.WebDataset(paths, shardshuffle=False).decode("pil"))
            gc.collect()
        return samples

    return read
