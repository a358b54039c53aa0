"""Fair batching: requests are done in slices of their images, which are shared out by cost and joined into batches."""

from __future__ import annotations

import asyncio
import contextlib
import math
import time
from collections import Counter
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
Observe = Callable[[float, float, int, int, int], None]
"""Called after a slice was run: with when (time.perf_counter) and for how many seconds, the number of its images and
steps, and that of the images of all slices that were run together."""
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
    observe: Observe = lambda *_: None

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
        """Cost of what was done for it, plus its client's clock when it came."""
        self.started = 0
        """Number of images that are done or being done."""
        self.key: Hashable = (run, work.steps, *((name, work.common[name].tobytes()) for name in sorted(work.common)))
        """Equal for jobs that can be joined: same model, same number of steps, same common inputs."""
        self.parts: dict[int, Feeds] = {}
        """Outputs, by the first image that they are of."""
        self.outputs: asyncio.Future[Feeds] = loop.create_future()

    @property
    def left(self) -> int:
        """Number of images that have not been started."""
        return self.work.count - self.started

    @property
    def cost(self) -> int:
        """Cost of these."""
        return self.left * self.work.steps

    def add(self, start: int, outputs: Feeds) -> None:
        """Add the outputs of the images that begin with `start`; the last ones complete the job."""
        self.parts[start] = outputs
        if not self.left and not self.outputs.done():
            parts = list(self.parts.values())
            self.outputs.set_result({name: np.concatenate([part[name] for part in parts]) for name in outputs})


@dataclass
class Client:
    """A client that has jobs, or had more than its share."""

    served: float = 0.0
    """Cost of what was done for it, plus the batcher's clock when it came."""
    clock: float = 0.0
    """Where its next job begins: the cost that a job would have been served by now in equal shares."""


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

    Clients share the model equally, and so do the jobs of a client, by cost, as in weighted fair queuing: each batch
    begins with the slice that would end first if all ran at once at equal speed. Jobs that fit are joined to it. A
    clock follows what each client would have been served in that case. A client that comes begins there, or where it
    left if that is later; so those that come and go do not overtake the others, however many they are.
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
            max_waiting: maximum number of images in the queue, of which a client may use what it leaves to others.
            max_wait: how many seconds a request may have to wait for others, estimated from what was done so far.
            slice_seconds: how long a batch may take, by the same estimate, if it has more than one image.
            delay: seconds a request may wait for others while nothing runs.
            observe: called with the size of each batch.
        """
        self._max_batch, self._max_waiting, self._max_wait = max_batch, max_waiting, max_wait
        self._slice_seconds, self._delay, self._observe = slice_seconds, delay, observe
        self._queue: list[Job] = []
        """The jobs that are not done, in the order they came."""
        self._running: list[Slice] = []
        self._options = ort.RunOptions()
        self._clients: dict[str, Client] = {}
        self._clock = 0.0
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

    def check_room(self, client: str, count: int = 1, steps: int = 0) -> None:
        """Raise QueueFull if a request of the client would be refused now, and Stopping if the batcher is closed."""
        if self._closed:
            raise Stopping
        images, costs = Counter[str](), Counter[str]()
        for job in self._queue:
            images[job.client] += job.left
            costs[job.client] += job.cost
        # Until the request is done, each other client gets at most as much as its own.
        ahead = sum(min(cost, costs[client] + count * steps) for name, cost in costs.items() if name != client)
        wait = (costs[client] + ahead) / self._speed if self._speed else 0.0
        used = images[client] + images.total()
        if wait > self._max_wait:
            left = wait - self._max_wait
            line = f"{wait:.0f} seconds of work are ahead, and the limit is {self._max_wait:g}"
        elif used + count > self._max_waiting:
            drained = costs.total() / self._speed if self._speed else 0.0
            left = drained * min(1.0, (used + count - self._max_waiting) / max(1, used))
            line = f"{images.total()} images are waiting, {images[client]} of them yours (limit {self._max_waiting})"
        else:
            return
        seconds = max(1, math.ceil(left))
        raise QueueFull(f"no room in the queue: {line}; try again in {seconds} s", seconds)

    async def submit(self, run: Run, work: Work, client: str = "") -> Feeds:
        """Return the outputs for some work, possibly computed in batches with other requests.

        If the caller is cancelled, the rest of the work is not done.

        Raises:
            QueueFull: too much is waiting; try again later.
            Stopping: the batcher was closed.
            RunFailed: `run` raised an error for this request.
        """
        self.check_room(client, work.count, work.steps)
        share = self._clients.setdefault(client, Client())
        if all(job.client != client for job in self._queue):
            share.served = max(share.served, self._clock)
        job = Job(run, work, client, share.clock)
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
        for job in self._queue:
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
        """Forget jobs that are done or cancelled, and clients without a job or debt; whether any jobs are left."""
        self._queue = [job for job in self._queue if not job.outputs.done()]
        active = {job.client for job in self._queue}
        self._clients = {
            name: each for name, each in self._clients.items() if name in active or each.served > self._clock
        }
        return bool(self._queue)

    def _room(self, job: Job) -> int:
        """How many images a batch that begins with this job may have."""
        if math.isinf(self._slice_seconds):
            return self._max_batch
        return max(1, min(self._max_batch, int(self._speed * self._slice_seconds / job.work.steps)))

    def _next(self) -> list[Slice]:
        """The next batch; nothing runs now, so each job has images left."""
        costs = {job: min(job.left, self._room(job)) * job.work.steps for job in self._queue}
        order = sorted(self._queue, key=lambda job: job.served + costs[job])
        first = {job.client: job for job in reversed(order)}
        order.sort(key=lambda job: self._clients[job.client].served + costs[first[job.client]])
        jobs = Counter(job.client for job in order)
        key, room, batch = order[0].key, self._room(order[0]), list[Slice]()
        for job in order:
            if room and job.key == key:
                part = Slice(job, job.started, job.started + min(room, job.left))
                room -= part.size
                job.started = part.stop
                cost, client = part.size * job.work.steps, self._clients[job.client]
                job.served += cost
                client.served += cost
                client.clock += cost / jobs[job.client]
                self._clock += cost / len(jobs)
                batch.append(part)
        return batch

    async def _do(self, batch: list[Slice]) -> None:
        """Run a batch, and hand out its outputs; if it fails, its jobs are done again, each alone."""
        self._running, self._options = batch, ort.RunOptions()
        began, count = time.perf_counter(), sum(part.size for part in batch)
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, _run, batch, self._options)
            seconds = time.perf_counter() - began
            speed = count * batch[0].job.work.steps / seconds
            self._speed = 0.7 * self._speed + 0.3 * speed if self._speed else speed
            self._observe(count)
            for part, outputs in zip(batch, results, strict=True):
                part.job.work.observe(began, seconds, part.size, part.job.work.steps, count)
                part.job.add(part.start, outputs)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            for job, start, _ in batch:
                if len(batch) > 1:
                    job.started, job.key = start, object()
                elif not job.outputs.done():
                    job.outputs.set_exception(RunFailed(golden.brief(error)))
        finally:
            self._running = []


def _run(batch: list[Slice], options: ort.RunOptions) -> list[Feeds]:
    """Run the model once; returns the outputs of each slice."""
    own = [part.job.work.part(part.start, part.stop) for part in batch]
    joined: dict[str, Any] = {name: np.concatenate([each[name] for each in own], AXES[name]) for name in own[0]}
    ends = np.cumsum([part.size for part in batch])[:-1]
    outputs = batch[0].job.run(joined | batch[0].job.work.common, options)
    split = {name: np.split(value, ends) for name, value in outputs.items()}
    return [{name: parts[index] for name, parts in split.items()} for index in range(len(batch))]
