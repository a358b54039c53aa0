"""Fair batching: requests are done in slices of their images, which are shared out by cost and joined into batches."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections.abc import Callable, Hashable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from deploy.service.models import Feeds
from diffusion.export import golden

Run = Callable[[Feeds, ort.RunOptions], Feeds]
"""Runs a model; raises any exception if the options' `terminate` is set meanwhile."""
AXES = {"noise": 0, "y": 0, "steps_noise": 1}
"""The axis of the images of an input. Other inputs (`steps`, `guidance`) must be equal within a batch."""


class QueueFull(Exception):
    """The queue has no room for the request; `seconds` says when it is expected to have."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class Stopping(Exception):
    """The service ends before the request is done."""


class RunFailed(Exception):
    """Running the model failed; the message is one line."""


@dataclass(frozen=True)
class Work:
    """What a request asks of a model. It costs `count` times `steps`."""

    count: int
    """Number of images."""
    steps: int
    """Number of sampling steps."""
    common: Feeds
    """The inputs that all images have in common."""
    part: Callable[[int, int], Feeds]
    """The other inputs of the images from start to stop; called in another thread, right before they are needed."""

    @classmethod
    def of(cls, feeds: Feeds, steps: int) -> Work:
        """The work of running a model on all its inputs."""
        own = {name: value for name, value in feeds.items() if name in AXES}

        def part(start: int, stop: int) -> Feeds:
            return {name: value[(slice(None),) * AXES[name] + (slice(start, stop),)] for name, value in own.items()}

        common = {name: value for name, value in feeds.items() if name not in AXES}
        return cls(len(feeds["noise"]), steps, common, part)


class Job:
    """A request in progress."""

    def __init__(self, run: Run, work: Work, client: str, served: float) -> None:
        loop = asyncio.get_running_loop()
        self.run, self.work, self.client, self.since = run, work, client, loop.time()
        self.served = served
        """Cost of what was done for it, plus that of its client's other requests when it came."""
        self.started = 0
        """Number of images that are done or being done."""
        self.parts: list[Feeds] = []
        self.outputs: asyncio.Future[Feeds] = loop.create_future()

    @property
    def left(self) -> int:
        """Number of images that have not been started."""
        return self.work.count - self.started

    def key(self) -> Hashable:
        """Equal for jobs that can be joined: same model, same common inputs, same number of steps."""
        return self.run, self.work.steps, *((name, value.tobytes()) for name, value in sorted(self.work.common.items()))

    def add(self, outputs: Feeds) -> None:
        """Add the outputs of its next images; the last ones complete it."""
        self.parts.append(outputs)
        if sum(len(part["images"]) for part in self.parts) == self.work.count and not self.outputs.done():
            self.outputs.set_result(
                {name: np.concatenate([part[name] for part in self.parts]) for name in self.parts[0]}
            )


class Slice(NamedTuple):
    """Some images of a job."""

    job: Job
    start: int
    stop: int

    @property
    def size(self) -> int:
        return self.stop - self.start


class Batcher:
    """Runs slices of jobs in a separate thread, one batch at a time.

    Each batch begins with the client that was served least, and the request of this client that was served least, by
    the cost of what was done since they came (start-time fair queuing); requests that fit are joined to it. A client or
    request that comes begins where the least served one is, so that none is overtaken forever.
    """

    def __init__(
        self,
        max_batch: int,
        max_waiting: int,
        max_wait: float = math.inf,
        slice_seconds: float = math.inf,
        delay: float = 0.0,
        observe: Callable[[int], None] = lambda _: None,
    ) -> None:
        """Create a batcher.

        Args:
            max_batch: maximum number of images per batch.
            max_waiting: maximum number of images in the queue.
            max_wait: maximum seconds of work in the queue, estimated from what was done so far.
            slice_seconds: how long a batch may take, by the same estimate, if it has more than one image.
            delay: seconds a request may wait for others while nothing runs.
            observe: called with the size of each batch.
        """
        self._max_batch, self._max_waiting, self._max_wait = max_batch, max_waiting, max_wait
        self._slice_seconds, self._delay, self._observe = slice_seconds, delay, observe
        self._queue: list[Job] = []
        self._running: list[Slice] = []
        self._options = ort.RunOptions()
        self._served: dict[str, float] = {}
        """By client with requests: cost of what was done for it."""
        self._speed = 0.0
        """Cost done per second; 0 before the first batch."""
        self._closed = False
        self._enough = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "onnxruntime")

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return sum(job.left for job in self._queue)

    @property
    def wait(self) -> float:
        """Seconds of work in the queue, estimated."""
        return sum(job.left * job.work.steps for job in self._queue) / self._speed if self._speed else 0.0

    def check_room(self, count: int) -> None:
        """Raise QueueFull if a request for `count` images would be refused now."""
        if self._closed:
            raise Stopping
        wait, images = self.wait, self.waiting
        if wait > self._max_wait:
            left = math.ceil(wait - self._max_wait)
            line = f"{wait:.0f} seconds of work are waiting, and the limit is {self._max_wait:g}"
        elif images + count > self._max_waiting:
            left = math.ceil(wait * min(1.0, (images + count - self._max_waiting) / images)) if images else 1
            line = f"{images} images are waiting, and the limit is {self._max_waiting}"
        else:
            return
        seconds = max(1, left)
        raise QueueFull(f"no room in the queue: {line}; try again in {seconds} s", seconds)

    async def submit(self, run: Run, work: Work, client: str = "") -> Feeds:
        """Return the outputs for some work, possibly computed in batches with other requests.

        If the caller is cancelled, the rest of the work is not done.

        Raises:
            QueueFull: too much is waiting; try again later.
            Stopping: the batcher was closed.
            RunFailed: `run` raised an error for this request.
        """
        self.check_room(work.count)
        others = [job.served for job in self._queue if job.client == client]
        job = Job(run, work, client, min(others, default=0.0))
        self._served.setdefault(client, min(self._served.values(), default=0.0))
        self._queue.append(job)
        if self.waiting >= self._max_batch:
            self._enough.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return await job.outputs
        finally:
            self._prune()
            if self._running and all(part.job.outputs.done() for part in self._running):
                self._options.terminate = True

    def close(self) -> None:
        """Fail all requests, and end what runs."""
        self._closed = True
        for job in [*self._queue, *(part.job for part in self._running)]:
            if not job.outputs.done():
                job.outputs.set_exception(Stopping())
        self._options.terminate = True

    async def _work(self) -> None:
        while self._prune():
            early = min(job.since for job in self._queue) + self._delay - asyncio.get_running_loop().time()
            if early > 0 and self.waiting < self._max_batch:
                self._enough.clear()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._enough.wait(), early)
            if self._prune():
                await self._do(self._next())

    def _prune(self) -> bool:
        """Forget jobs that were cancelled, or have no images left, and clients without jobs; whether any are left."""
        self._queue = [job for job in self._queue if job.left and not job.outputs.done()]
        active = {job.client for job in self._queue}
        self._served = {client: served for client, served in self._served.items() if client in active}
        return bool(self._queue)

    def _next(self) -> list[Slice]:
        """The next batch."""
        order = sorted(self._queue, key=lambda job: (self._served[job.client], job.served, job.since))
        key, steps = order[0].key(), order[0].work.steps
        room = self._max_batch
        if not math.isinf(self._slice_seconds):
            room = max(1, min(room, int(self._speed * self._slice_seconds / steps)))
        batch = []
        for job in order:
            if room and job.key() == key:
                part = Slice(job, job.started, job.started + min(room, job.left))
                room -= part.size
                job.started = part.stop
                job.served += part.size * steps
                self._served[job.client] += part.size * steps
                batch.append(part)
        return batch

    async def _do(self, batch: list[Slice]) -> None:
        """Run a batch, and hand out its outputs."""
        self._running, self._options = batch, ort.RunOptions()
        began, count = time.perf_counter(), sum(part.size for part in batch)
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, _run, batch, self._options)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            if len(batch) > 1:  # a single request may be the cause
                for part in batch:
                    if not part.job.outputs.done():
                        await self._do([part])
            elif not batch[0].job.outputs.done():
                batch[0].job.outputs.set_exception(RunFailed(golden.brief(error)))
            return
        finally:
            self._running = []
        speed = count * batch[0].job.work.steps / (time.perf_counter() - began)
        self._speed = 0.7 * self._speed + 0.3 * speed if self._speed else speed
        self._observe(count)
        for part, outputs in zip(batch, results, strict=True):
            part.job.add(outputs)


def _run(batch: list[Slice], options: ort.RunOptions) -> list[Feeds]:
    """Run the model once; returns the outputs of each slice."""
    own = [part.job.work.part(part.start, part.stop) for part in batch]
    joined: dict[str, Any] = {name: np.concatenate([each[name] for each in own], AXES[name]) for name in own[0]}
    ends = np.cumsum([part.size for part in batch])[:-1]
    outputs = batch[0].job.run(joined | batch[0].job.work.common, options)
    split = {name: np.split(value, ends) for name, value in outputs.items()}
    return [{name: parts[index] for name, parts in split.items()} for index in range(len(batch))]
