"""How close two computations of one thing in float32 are: about as close as either is to float64."""

from torch import Tensor

TIMES = 16
"""Sums in another order round otherwise, but not by another order of magnitude; a mistake is off by many."""


def assert_rounds_alike(found: Tensor, float32: Tensor, float64: Tensor) -> None:
    """`found` is as far from `float64` as `float32` is, to within a factor.

    So the bound follows the network's size and the coefficients, on every processor.
    """
    rounding = (float32.double() - float64).abs().max().item()
    assert 0 < rounding < 1e-3 * float64.abs().max().item()  # otherwise it would say nothing
    assert (found.double() - float64).abs().max().item() <= TIMES * rounding
