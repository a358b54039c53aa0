"""Versions with measured errors, and the rules by which one becomes champion."""

from collections.abc import Mapping, Sequence
from typing import Any

from flows import params as parameters
from flows import tracking
from flows.paths import Paths
from tests.flows.tracking.trees import PARAMS, changed, write_all

FIRST = [0.30, 0.34, 0.26, 0.31, 0.29]
"""Errors on five validation images; their mean is 0.3."""
FRECHET = {"frechet_distance": 2.0, "frechet_distance_low": 1.8, "frechet_distance_high": 2.2}
SAMPLES = FRECHET | {"frechet_distance_heldout": 0.75, "quality_images": 256, "quality_reference_images": 1000}
LIMIT = {"kind": "limit", "figure": "val_mse", "value": 0.5}
BETTER = {"kind": "better", "figure": "val_mse", "by": 0.0}
BITS = {"kind": "not-worse", "figure": "bits_per_dim", "by": 0.0}
QUALITY = {"kind": "not-worse", "figure": "frechet_distance", "by": 0.1}


def version(
    paths: Paths,
    weights: bytes,
    val_errors: list[float],
    mse: float = 0.3,
    pairs: str = "a",
    params: parameters.Params = PARAMS,
    bits: Sequence[float] = (),
    figures: Mapping[str, Any] | None = None,
) -> list[str]:
    """Register a version; returns its aliases."""
    write_all(paths, weights, mse, pairs * 64, params, val_errors, bits, figures)
    recorded = tracking.record(params, paths)
    assert recorded is not None
    return recorded.aliases


def gated(*rules: dict[str, Any]) -> parameters.Params:
    """The repository's parameters with other rules."""
    return changed(tracking={"gate": list(rules)})
