"""Choices about how a source is read, where the files leave them open."""

from typing import Literal, NamedTuple

Layout = Literal["auto", "channels-first", "channels-last"]


class Reading(NamedTuple):
    """How to read a source; the defaults ask where a file is ambiguous."""

    split_names_as_classes: bool = False
    """Whether classes, and folders inside classes, may be named like a split."""
    layout: Layout = "auto"
    """Order of the axes in arrays: channels-first is (N, C, H, W), channels-last (N, H, W, C)."""
    value_range: tuple[float, ...] = ()
    """The values of black and white in arrays; empty: those of their type."""


DEFAULTS = Reading()
