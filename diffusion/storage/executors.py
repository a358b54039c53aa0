"""Executors: where the tasks of a stage run. The results and their order do not depend on the choice.

A task, its result and the function must be picklable; a worker imports the function from its module.
"""

import hashlib
import logging
import multiprocessing
import os
import platform
import signal
import sys
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping
from concurrent.futures import BrokenExecutor, CancelledError, Future, ProcessPoolExecutor, wait
from contextlib import chdir
from dataclasses import dataclass
from functools import cache, partial
from importlib.metadata import version
from itertools import chain
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, Generic, Protocol, TypeVar

from PIL import features

from diffusion.errors import UserError

SECONDS_TO_ANSWER = 10
"""How long a Dask scheduler may take to answer, and to name its first worker."""
MAX_BYTES = 2**29
"""Memory for the tasks in flight and their results; a task that needs more is in flight alone."""
DECODERS = ("jpg", "libjpeg_turbo", "zlib", "zlib_ng", "libtiff", "jpg_2000", "webp", "avif", "littlecms2")
"""Libraries of Pillow, by its names, on which pixels and stored bytes depend."""
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

    def map(
        self,
        function: Callable[[Task], Result],
        tasks: Iterable[Task],
        size: Callable[[Task], int],  # noqa: ARG002
    ) -> Generator[tuple[Task, Result]]:
        for task in tasks:
            yield task, function(task)


OWN_PROCESS = OwnProcess()


@dataclass(frozen=True)
class Processes:
    """Does tasks in worker processes on this machine, which end with this process, even if it is killed."""

    workers: int

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], size: Callable[[Task], int]
    ) -> Generator[tuple[Task, Result]]:
        # Workers are forked from a server without threads, since a fork copies locks that threads hold.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([getattr(function, "func", function).__module__])
        waiting, alive = context.Pipe(duplex=False)  # at the end of the pipe, workers exit

        start = partial(ProcessPoolExecutor, self.workers, context, _start_worker, (waiting,))
        pool = start()

        def submit(task: Task) -> Future[Result]:
            nonlocal pool
            for _ in range(TRIES):
                try:
                    return pool.submit(function, task)
                except (BrokenExecutor, OSError):  # a worker was killed, or the server
                    pool.shutdown()
                    pool = start()
            return pool.submit(function, task)

        try:
            yield from ordered_map(submit, Future.result, tasks, size, 2 * self.workers, BrokenExecutor)
        finally:
            alive.close()
            pool.shutdown(cancel_futures=True)
            waiting.close()


def _start_worker(waiting: Connection) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches workers too; the main process ends them
    threading.Thread(target=_end_with_pipe, args=(waiting,), daemon=True).start()


def _end_with_pipe(pipe: Connection) -> None:
    pipe.poll(None)
    os._exit(0)


@dataclass(frozen=True)
class Dask:
    """Does tasks on the workers of a Dask cluster; needs the extra `cluster`.

    Workers need the same software, and the same files in the same place.
    """

    address: str
    """That of the scheduler, such as tcp://10.0.0.1:8786."""

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], size: Callable[[Task], int]
    ) -> Generator[tuple[Task, Result]]:
        """As `Executor.map`.

        Raises UserError if the extra is not installed, or if the scheduler or the workers cannot be used.
        """
        try:
            from distributed import Client, KilledWorker
            from distributed.comm.core import CommClosedError
        except ModuleNotFoundError as error:
            raise UserError(
                f"{self.address}: Dask is not installed ({error}); install the extra: `pip install -e '.[cluster]'`"
            ) from None
        for name in logging.root.manager.loggerDict:
            if name.startswith(("distributed", "tornado")):
                logging.getLogger(name).setLevel(logging.CRITICAL)  # hide tracebacks when a connection is lost
        try:
            client = Client(self.address, timeout=SECONDS_TO_ANSWER)
        except (OSError, ValueError) as error:
            raise UserError(f"{self.address}: no Dask scheduler answers ({error})") from None
        with client:
            executor, remote = client.get_executor(pure=False), Remote(function, str(Path.cwd()), software())

            def submit(task: Task) -> Future[Result]:
                return executor.submit(partial(remote, task))  # Dask would look for its own objects in an argument

            def result(future: Future[Result]) -> Result:
                # Without a scheduler or workers, a future never ends.
                while not wait([future], SECONDS_TO_ANSWER).done:
                    if client.status != "running":
                        raise CancelledError
                    client.wait_for_workers(1, SECONDS_TO_ANSWER)
                return future.result()

            try:
                client.wait_for_workers(1, SECONDS_TO_ANSWER)
                most = 2 * sum(client.nthreads().values())
                yield from ordered_map(submit, result, tasks, size, most, KilledWorker)
            except TimeoutError:
                raise UserError(
                    f"{self.address}: the Dask scheduler has no workers; start some where this project is installed"
                ) from None
            except (CancelledError, CommClosedError):
                raise UserError(f"{self.address}: the connection to the Dask scheduler was lost") from None


@dataclass(frozen=True)
class Remote(Generic[Task, Result]):
    """A function to call on another machine; relative paths mean the same there."""

    function: Callable[[Task], Result]
    folder: str
    software: Mapping[str, str]

    def __call__(self, task: Task) -> Result:
        """Raises UserError if that machine lacks the folder, or has other software."""
        machine, own = platform.node(), software()
        for name, wanted in self.software.items():
            if own.get(name) != wanted:
                raise UserError(
                    f"the Dask worker on {machine} has {name} {own.get(name)}, but {wanted} is used here; install the "
                    "same there, and start the worker again"
                )
        if not Path(self.folder).is_dir():
            raise UserError(f"{self.folder}: the Dask worker on {machine} has no such folder; share it between them")
        with _ALONE, chdir(self.folder):
            return self.function(task)


_ALONE = threading.Lock()
"""Held while a task is done: the current folder and the decoders' warnings belong to the whole process."""


@cache
def software() -> dict[str, str]:
    """What the bytes of a result depend on, with versions."""
    code = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*.py")):
        code.update(path.read_bytes())
    packages = {name: version(name) for name in ("numpy", "pillow", "scipy", "imagehash")}
    decoders = {name: str(features.version(name)) for name in DECODERS if features.check(name)}
    return packages | decoders | {"the package diffusion with digest": code.hexdigest()[:12]}


def ordered_map(
    submit: Callable[[Task], Future[Result]],
    result: Callable[[Future[Result]], Result],
    tasks: Iterable[Task],
    size: Callable[[Task], int],
    most: int,
    lost: type[Exception],
) -> Generator[tuple[Task, Result]]:
    """Submit tasks, at most `most` ahead of the results; if `result` raises `lost`, they are submitted again.

    After a loss, which may be any task's fault, the first one is alone until it is done. Raises LostWorker, which names
    the task at fault, after TRIES losses without a result in between.
    """
    remaining: Iterator[Task] = iter(tasks)
    in_flight = deque[tuple[Task, Future[Result]]]()
    room, losses = MAX_BYTES, 0
    while True:
        while (
            len(in_flight) < (1 if losses else most)
            and (room > 0 or not in_flight)
            and (task := next(remaining, None)) is not None
        ):
            in_flight.append((task, submit(task)))
            room -= size(task)
        if not in_flight:
            return
        first, future = in_flight[0]
        try:
            done = result(future)
        except lost:
            losses += 1
            if losses == TRIES:
                raise LostWorker(first) from None
            remaining = chain([task for task, _ in in_flight], remaining)
            room += sum(size(task) for task, _ in in_flight)
            in_flight.clear()
            continue
        del in_flight[0], future
        room, losses = room + size(first), 0
        yield first, done


def usable_cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1
