"""Dynamic batching: requests that arrive while a batch runs are joined into the next one."""

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
"""The axis along which an input is concatenated. Other inputs (`steps`, `guidance`) must be equal within a batch."""


class QueueFull(Exception):
    """The queue has no room for the request."""


class RunFailed(Exception):
    """Running the model failed; the message is one line."""


class Job:
    """One request: inputs with a batch of `count` images, and the future of its outputs."""

    def __init__(self, run: Run, feeds: Feeds) -> None:
        loop = asyncio.get_running_loop()
        self.run, self.feeds, self.count, self.since = run, feeds, len(feeds["noise"]), loop.time()
        self.outputs: asyncio.Future[Feeds] = loop.create_future()

    def key(self) -> Hashable:
        """Equal for jobs that can be joined: same model, same batch-wide values, same sizes along the other axes."""

        def part(name: str, value: NDArray[Any]) -> Hashable:
            axis = AXES.get(name)
            return value.tobytes() if axis is None else (*value.shape[:axis], *value.shape[axis + 1 :])

        return self.run, tuple((name, part(name, self.feeds[name])) for name in sorted(self.feeds))


class Batcher:
    """Runs jobs in a separate thread, one batch at a time, oldest first."""

    def __init__(
        self, max_batch: int, max_waiting: int, delay: float = 0.0, observe: Callable[[int], None] = lambda _: None
    ) -> None:
        """Create a batcher.

        Args:
            max_batch: maximum number of images per batch; a larger request runs alone.
            max_waiting: maximum number of images in the queue.
            delay: seconds a request may wait for others while nothing runs.
            observe: called with the size of each batch.
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
        """Return the outputs of `run` for `feeds`, possibly computed in a batch with other requests.

        Raises:
            QueueFull: too many images are waiting; try again later.
            RunFailed: `run` raised an error for this request.
        """
        job = Job(run, feeds)
        if self.waiting + job.count > self._max_waiting:
            raise QueueFull(
                f"no room in the queue: {self.waiting} images are waiting, and the limit is {self._max_waiting}; "
                "try again later"
            )
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
        """Take the oldest job and all jobs that can join it; no job starves, since the others move up."""
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
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            if len(jobs) > 1:  # a single request may be the cause
                for job in jobs:
                    await self._finish([job])
            elif not jobs[0].outputs.done():
                jobs[0].outputs.set_exception(RunFailed(golden.brief(error)))
            return
        self._observe(sum(job.count for job in jobs))
        for job, outputs in zip(jobs, results, strict=True):
            if not job.outputs.done():  # otherwise it was cancelled
                job.outputs.set_result(outputs)


def _run(jobs: list[Job]) -> list[Feeds]:
    """Run the model once; returns the outputs of each job."""
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
