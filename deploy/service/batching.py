"""Dynamic batching: requests that come while a batch runs are joined, and run as one."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from deploy.service.models import Feeds
from diffusion.export import golden

Run = Callable[[Feeds], Feeds]
AXES = {"noise": 0, "y": 0, "steps_noise": 1}
"""The axis along which an input is joined. Others (`steps`, `guidance`) are of a whole batch, and have to be equal."""


class QueueFull(Exception):
    """More images are waiting than may."""


class RunFailed(Exception):
    """Running the model failed; the message is one line."""


class Job:
    """One request: inputs with a batch of `count` images, and the future of its outputs."""

    def __init__(self, run: Run, feeds: Feeds) -> None:
        loop = asyncio.get_running_loop()
        self.run, self.feeds, self.count, self.since = run, feeds, len(feeds["noise"]), loop.time()
        self.outputs: asyncio.Future[Feeds] = loop.create_future()

    def key(self) -> Hashable:
        """Equal for jobs that can be joined: the same model, values that hold for all, and sizes along other axes."""

        def part(name: str, value: NDArray[Any]) -> Hashable:
            axis = AXES.get(name)
            return value.tobytes() if axis is None else (*value.shape[:axis], *value.shape[axis + 1 :])

        return self.run, tuple((name, part(name, self.feeds[name])) for name in sorted(self.feeds))


class Batcher:
    """Runs jobs one batch at a time, the oldest first, in a thread of its own."""

    def __init__(
        self, max_batch: int, max_waiting: int, delay: float = 0.0, observe: Callable[[int], None] = lambda _: None
    ) -> None:
        """At most max_batch images in a batch (a larger request runs alone) and max_waiting in the queue.

        delay: seconds that a request may wait for others when nothing runs. observe: gets the size of each batch.
        """
        self._max_batch, self._max_waiting, self._delay, self._observe = max_batch, max_waiting, delay, observe
        self._queue: list[Job] = []
        self._enough = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "onnxruntime")

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return sum(job.count for job in self._queue)

    async def submit(self, run: Run, feeds: Feeds) -> Feeds:
        """The outputs of `run`, whose inputs may have been joined with others'.

        Raises: QueueFull: nothing was done, and later it may be. RunFailed: `run` raised an error for this request.
        """
        job = Job(run, feeds)
        if self.waiting + job.count > self._max_waiting:
            raise QueueFull(f"{self.waiting} images are waiting, and at most {self._max_waiting} may; try again later")
        self._queue.append(job)
        if self.waiting >= self._max_batch:
            self._enough.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        return await job.outputs

    async def _work(self) -> None:
        while self._queue:
            early = self._queue[0].since + self._delay - asyncio.get_running_loop().time()
            if early > 0 and self.waiting < self._max_batch:
                self._enough.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._enough.wait(), early)
            await self._finish(self._next())

    def _next(self) -> list[Job]:
        """The oldest job, and all that can go with it; whoever is left is nearer to being the oldest."""
        first, size = self._queue[0], 0
        key, taken, left = first.key(), list[Job](), list[Job]()
        for job in self._queue:
            if job is first or (size + job.count <= self._max_batch and job.key() == key):
                taken.append(job)
                size += job.count
            else:
                left.append(job)
        self._queue = left
        return taken

    async def _finish(self, jobs: list[Job]) -> None:
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, _run, jobs)
        except Exception as error:  # ONNX Runtime's have nothing in common
            if len(jobs) > 1:  # one alone may be to blame
                for job in jobs:
                    await self._finish([job])
            elif not jobs[0].outputs.done():
                jobs[0].outputs.set_exception(RunFailed(golden.brief(error)))
            return
        self._observe(sum(job.count for job in jobs))
        for job, outputs in zip(jobs, results, strict=True):
            if not job.outputs.done():  # cancelled, that is
                job.outputs.set_result(outputs)


def _run(jobs: list[Job]) -> list[Feeds]:
    """The outputs of each job, from one run of the model."""
    first = jobs[0]
    if len(jobs) == 1:
        return [first.run(first.feeds)]
    joined = {
        name: np.concatenate([job.feeds[name] for job in jobs], AXES[name]) if name in AXES else value
        for name, value in first.feeds.items()
    }
    ends = np.cumsum([job.count for job in jobs])[:-1]
    split = {name: np.split(value, ends) for name, value in first.run(joined).items()}
    return [{name: parts[index] for name, parts in split.items()} for index in range(len(jobs))]
