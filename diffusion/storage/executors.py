"""Executors: where the tasks of a stage run. The results and their order do not depend on the choice.

A task, its result and the function must be picklable; a worker imports the function from its module.
"""

import os
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from typing import Any, ClassVar, Protocol, TypeVar

MAX_BYTES = 2**29
"""Memory for the tasks in flight and their results; a task that needs more is in flight alone."""
TRIES = 3
"""How often a task is tried whose worker is killed."""
Task = TypeVar("Task")
Result = TypeVar("Result")


class LostWorker(Exception):
    """The workers that did a task were killed, TRIES times in a row."""

    def __init__(self, task: Any) -> None:
        super().__init__(task)
        self.task = task


class Executor(Protocol):
    """Does tasks, in this process or in others."""

    shares_files: ClassVar[bool]
    """Whether tasks can open this machine's files; otherwise they have to carry the contents."""

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], size: Callable[[Task], int]
    ) -> Generator[tuple[Task, Result]]:
        """Each task with its result, in order. Only a few tasks are in flight at once; closing the generator ends them.

        Args:
            function: does a task; its exceptions are raised here.
            tasks: the tasks, iterated over in this process.
            size: number of bytes that a task and its result need, about.
        Raises:
            LostWorker: see there.
        """
        ...


@dataclass(frozen=True)
class OwnProcess:
    """Does one task after the other in this process."""

    shares_files: ClassVar[bool] = True

    def map(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        size: Callable[[Task], int],  # noqa: ARG002
    ) -> Generator[tuple[Task, Result]]:
        for task in tasks:
            yield task, function(task)


OWN_PROCESS = OwnProcess()


def ordered_map(
    submit: Callable[[Task], Future[Result]],
    result: Callable[[Future[Result]], Result],
    tasks: Iterable[Task],
    size: Callable[[Task], int],
    most: int,
    lost: type[Exception],
) -> Generator[tuple[Task, Result]]:
    """Submit tasks, at most `most` ahead of the results.

    If `result` raises `lost`, the task is submitted again while no other task is in flight, since it may have been
    killed for lack of memory. Raises LostWorker after TRIES losses.
    """
    remaining = iter(tasks)
    in_flight = deque[tuple[Task, Future[Result]]]()
    room = MAX_BYTES
    while True:
        while len(in_flight) < most and (room > 0 or not in_flight) and (task := next(remaining, None)) is not None:
            in_flight.append((task, submit(task)))
            room -= size(task)
        if not in_flight:
            return
        first, future = in_flight.popleft()
        for losses in count(1):
            try:
                done = result(future)
                break
            except lost:
                if losses == TRIES:
                    raise LostWorker(first) from None
                for _, other in in_flight:
                    with suppress(Exception):  # raised when it is its turn
                        result(other)
                future = submit(first)
        del future
        room += size(first)
        yield first, done


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
