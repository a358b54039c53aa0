"""Worker processes on this machine."""

import multiprocessing
import os
import signal
import threading
import time
import traceback
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import BrokenExecutor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass
from multiprocessing import resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.context import ForkServerContext, ForkServerProcess
from queue import SimpleQueue
from typing import Any, ClassVar

from diffusion.errors import UserError
from diffusion.storage.executors import Result, Task, ordered_map

SERVER_ENDS_SECONDS = 0.5


@dataclass(frozen=True)
class Processes:
    """Does tasks in worker processes on this machine, which end with this process, even if it is killed.

    Each worker has a pipe and a thread of its own. The workers of a `ProcessPoolExecutor` share one pipe: one that is
    killed while it sends a result leaves it locked, and the pool waits forever.
    """

    workers: int
    shares_files: ClassVar[bool] = True

    def map(
        self, function: Callable[[Task], Result], tasks: Iterable[Task], size: Callable[[Task], int]
    ) -> Generator[tuple[Task, Result]]:
        # Workers are forked from a server without threads, since a fork copies locks that threads hold.
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload([getattr(function, "func", function).__module__])
        workers = [_Worker(context) for _ in range(self.workers)]
        idle = SimpleQueue[_Worker]()

        def submit(task: Task) -> Future[Result]:
            return threads.submit(do, task)

        def do(task: Task) -> Result:
            worker = idle.get()
            try:
                return worker.do(function, task)
            finally:
                idle.put(worker)

        with ExitStack() as at_end:  # in reverse order
            for worker in workers:
                idle.put(worker)
                at_end.callback(worker.close)
            threads = at_end.enter_context(ThreadPoolExecutor(self.workers, initializer=_ignore_interrupts))
            for worker in workers:
                at_end.callback(worker.kill)
            at_end.callback(threads.shutdown, wait=False, cancel_futures=True)
            yield from ordered_map(submit, Future.result, tasks, size, 2 * self.workers, BrokenExecutor)


def _ignore_interrupts() -> None:
    """Processes that this thread starts inherit the mask: Ctrl-C reaches them too, but the main process ends them."""
    resource_tracker.ensure_running()  # which would unblock the signal later
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})


class _Worker:
    """A process that does one task after the other; it is started for the first one, and again after it was killed."""

    def __init__(self, context: ForkServerContext) -> None:
        self._context = context
        self._lock = threading.Lock()
        self._killed = False
        self._process: ForkServerProcess | None = None
        self._pipe: Connection[Any, Any]

    def do(self, function: Callable[[Task], Result], task: Task) -> Result:
        """The result.

        Raises BrokenExecutor if the process, or the one that forks it, was killed, and UserError if the system allows
        no further process.
        """
        try:
            self._start()
            self._pipe.send((function, task))
            result, error = self._pipe.recv()
        except (EOFError, OSError):  # the latter within a message
            self.close()
            raise BrokenExecutor from None
        if error is not None:
            raise error
        return result

    def _start(self) -> None:
        with self._lock:
            if self._killed:
                raise BrokenExecutor
            if self._process is not None:
                return
            try:
                self._pipe, other = self._context.Pipe()
                with other:
                    process = self._context.Process(target=_work, args=(other,), daemon=True)
                    process.start()
            except (ConnectionError, EOFError):  # the process that forks it is ending
                time.sleep(SERVER_ENDS_SECONDS)  # so that the next try starts another one
                raise
            except OSError as error:
                raise UserError(
                    f"no further worker process can be started ({error.strerror}); use fewer (DDPM_WORKERS), or raise "
                    "the limit (ulimit -n)"
                ) from None
            self._process = process

    def kill(self) -> None:
        """End the process at once, for good; `do` then raises BrokenExecutor."""
        with self._lock:
            self._killed = True
            if self._process is not None:
                self._process.kill()

    def close(self) -> None:
        """End the process, if there is one, and release what belongs to it."""
        with self._lock:
            if self._process is not None:
                self._process.kill()
                self._process.join()
                self._process = None
                self._pipe.close()


def _work(pipe: "Connection[Any, Any]") -> None:
    """Do tasks until the other end is closed."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    while True:
        try:
            function, task = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send((function(task), None))
        except Exception as error:
            if not isinstance(error, UserError):
                error.add_note(f"In a worker process:\n{traceback.format_exc()}")
            pipe.send((None, error))


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(0)
