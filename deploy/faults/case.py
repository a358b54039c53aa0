"""A fault, and what became of it."""

from collections.abc import Callable
from typing import Any, NamedTuple


class Seen(NamedTuple):
    """What a user saw of a fault by which nothing was lost."""

    times: int
    """How often it was injected."""
    text: str


class Unavailable(Exception):
    """The fault cannot be injected on this machine; says why."""


class Case(NamedTuple):
    """A fault."""

    fault: str
    inject: Callable[[Any], Seen]
    """Injects it, on what its group prepares; raises Failed (deploy/team/stack.py) if anything is lost."""
