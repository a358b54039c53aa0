"""Tolerances for comparing two float32 computations, derived from their distance to float64."""

from torch import Tensor

TIMES = 16
"""Sums in another order round differently, but by the same order of magnitude; mistakes are far larger."""


def assert_rounds_alike(found: Tensor, float32: Tensor, float64: Tensor) -> None:
    """Assert that `found` is as close to `float64` as `float32` is, up to a factor.

    So the bound follows the network's size and the coefficients, on every processor.
    """
    rounding = (float32.double() - float64).abs().max().item()
    assert 0 < rounding < 1e-3 * float64.abs().max().item()  # otherwise it would say nothing
    assert (found.double() - float64).abs().max().item() <= TIMES * rounding
