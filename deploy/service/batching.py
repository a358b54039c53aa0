"""Fair batching: requests are done in slices, which are shared out by cost and joined into batches.

A slice is some network evaluations of some images of a request.
"""

from __future__ import annotations

import asyncio
import contextlib
import math
import sys
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import onnxruntime as ort

from deploy.service.work import AXES, LAST_X_0_HAT, Feeds, Group, Job, Run, Span, Work
from diffusion.export import golden


class QueueFull(Exception):
    """The queue has no room for the request; `seconds` says when it is expected to have."""

    def __init__(self, message: str, seconds: float) -> None:
        super().__init__(message)
        self.seconds = seconds


class Stopping(Exception):
    """The service ends before the request is done."""


class RunFailed(Exception):
    """Running the model failed; the message is one line."""


@dataclass
class Client:
    """A client that has jobs, or had more than its share."""

    served: float = 0.0
    """Cost of what was done for it, plus the batcher's clock when it came."""
    clock: float = 0.0
    """Where its next job begins: the cost that a job would have been served by now in equal shares."""


class Load:
    """The images and seconds of the jobs in the queue, by client."""

    def __init__(self, jobs: list[Job]) -> None:
        self.images = Counter[str]()
        self.seconds = defaultdict[str, float](float)
        self.total_images, self.total_seconds = 0, 0.0
        for job in jobs:
            self.add(job)

    def add(self, job: Job) -> None:
        held, seconds = job.held, job.seconds
        self.images[job.client] += held
        self.seconds[job.client] += seconds
        self.total_images += held
        self.total_seconds += seconds


class Slice(NamedTuple):
    """Some evaluations of a group of images of a job."""

    job: Job
    group: Group
    span: Span


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
            slice_seconds: how long a batch may take, by the same estimate, but for one evaluation of one image.
            delay: seconds a request may wait for others while nothing runs.
            observe: called with the size of each batch.
        """
        self._max_batch, self._max_waiting, self._max_wait = max_batch, max_waiting, max_wait
        self._slice_seconds, self._delay, self._observe = slice_seconds, delay, observe
        self._queue: list[Job] = []
        """The jobs that are not done, in the order they came."""
        self._load: Load | None = None
        """Of these, since requests come much more often than it changes otherwise."""
        self._running: list[Slice] = []
        self._options = ort.RunOptions()
        self._clients: dict[str, Client] = {}
        self._clock = 0.0
        self._closed = False
        self._enough = asyncio.Event()
        self._worker: asyncio.Task[None] | None = None
        self._thread = ThreadPoolExecutor(1, "onnxruntime")

    @property
    def load(self) -> Load:
        """What is in the queue."""
        if self._load is None:
            self._load = Load(self._queue)
        return self._load

    @property
    def waiting(self) -> int:
        """Images in the queue."""
        return self.load.total_images

    def check_room(self, client: str, count: int = 1, seconds: float = 0.0) -> None:
        """Raise QueueFull if a request of the client would be refused now, and Stopping if the batcher is closed.

        The request is for `count` images, and takes some seconds if it is alone.
        """
        if self._closed:
            raise Stopping
        load, wait = self.load, 0.0
        images, own = load.images.get(client, 0), load.seconds.get(client, 0.0)
        if load.total_seconds > self._max_wait:
            # Until the request is done, each other client gets at most as much as its own.
            others = (needed for name, needed in load.seconds.items() if name != client)
            wait = own + sum(min(needed, own + seconds) for needed in others)
        used = images + load.total_images
        if wait > self._max_wait:
            left = wait - self._max_wait
            line = f"{wait:.0f} seconds of work are ahead, and the limit is {self._max_wait:g}"
        elif used + count > self._max_waiting:
            left = load.total_seconds * min(1.0, (used + count - self._max_waiting) / max(1, used))
            line = f"{load.total_images} images are waiting, {images} of them yours (limit {self._max_waiting})"
        else:
            return
        until = max(1, math.ceil(left))
        raise QueueFull(f"no room in the queue: {line}; try again in {until} s", until)

    async def submit(self, run: Run, work: Work, client: str = "") -> Feeds:
        """Return the outputs for some work, possibly computed in batches with other requests.

        If the caller is cancelled, the rest of the work is not done.

        Raises:
            QueueFull: too much is waiting; try again later.
            Stopping: the batcher was closed.
            RunFailed: `run` raised an error for this request.
        """
        self.check_room(client, work.count, work.seconds)
        share = self._clients.setdefault(client, Client())
        if client not in self.load.images:
            share.served = max(share.served, self._clock)
        job = Job(run, work, client, share.clock)
        self._queue.append(job)
        self.load.add(job)
        if self.waiting >= self._max_batch:
            self._enough.set()
        if self._worker is None or self._worker.done():
            self._worker = asyncio.create_task(self._work())
        try:
            return await job.outputs
        finally:
            if job.outputs.cancelled():
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
        self._queue, self._load = [job for job in self._queue if not job.outputs.done()], None
        active = {job.client for job in self._queue}
        self._clients = {
            name: each for name, each in self._clients.items() if name in active or each.served > self._clock
        }
        return bool(self._queue)

    def _room(self, job: Job) -> int:
        """How many images a batch that begins with this job may have: with all their evaluations, if one such fits."""
        if job.group and job.group.done:
            return max(job.group.size, self._images(job, 1))
        return self._images(job, 1 if job.work.progress else job.work.evaluations) or self._images(job, 1)

    def _fitting(self, job: Job) -> int:
        """How many evaluations of an image fit into a slice."""
        return sys.maxsize if math.isinf(self._slice_seconds) else job.work.pace.within(self._slice_seconds)

    def _images(self, job: Job, evaluations: int) -> int:
        """How many images fit into a batch with some evaluations; at least 1 with one."""
        return min(self._max_batch, max(int(evaluations == 1), self._fitting(job) // evaluations))

    def _evaluations(self, job: Job, images: int) -> int:
        """How many evaluations of a job come next, in a batch with some images."""
        left = job.work.evaluations - job.done
        if job.work.progress:
            left = min(left, job.work.every - job.done % job.work.every)
        return max(1, min(left, self._fitting(job) // images))

    def _cost(self, job: Job) -> float:
        """Cost of the next slice of a job, if it were alone."""
        size = job.group.size if job.group else min(job.left, self._room(job))
        return size * self._evaluations(job, size) * job.work.weight

    def _next(self) -> list[Slice]:
        """The next batch; nothing runs now, so each job has images left."""
        costs = {job: self._cost(job) for job in self._queue}
        order = sorted(self._queue, key=lambda job: job.served + costs[job])
        first = {job.client: job for job in reversed(order)}
        order.sort(key=lambda job: self._clients[job.client].served + costs[first[job.client]])
        leader, room, joined = order[0], self._room(order[0]), list[tuple[Job, Group]]()
        for job in order:
            if job.key == leader.key and job.done == leader.done:
                group = job.group or Group(job.started, job.started + min(room, job.left))
                if 0 < group.size <= room:
                    room -= group.size
                    joined.append((job, group))
        size = sum(group.size for _, group in joined)
        evaluations = min(self._evaluations(job, size) for job, _ in joined)
        span = Span(leader.work.steps, leader.done, leader.done + evaluations)
        jobs = Counter(job.client for job in order)
        for job, group in joined:
            job.group, job.started = group, max(job.started, group.stop)
            cost, client = group.size * evaluations * job.work.weight, self._clients[job.client]
            job.served += cost
            client.served += cost
            client.clock += cost / jobs[job.client]
            self._clock += cost / len(jobs)
        self._load = None
        return [Slice(job, group, span) for job, group in joined]

    async def _do(self, batch: list[Slice]) -> None:
        """Run a batch, and hand out its outputs; if it fails, its jobs are done again, each alone."""
        self._running, self._options = batch, ort.RunOptions()
        began, count = time.perf_counter(), sum(group.size for _, group, _ in batch)
        span, ends = batch[0].span, batch[0].span.last == batch[0].job.work.evaluations
        try:
            results = await asyncio.get_running_loop().run_in_executor(self._thread, _run, batch, self._options)
            seconds = time.perf_counter() - began
            batch[0].job.work.pace.add(seconds / (count * (span.last - span.first)))
            if ends:
                self._observe(count)
            for (job, group, _), outputs in zip(batch, results, strict=True):
                job.work.observe(began, seconds, group.size, span, count)
                if ends:
                    job.group = None
                    job.add(group.start, outputs)
                else:
                    group.done, group.state = span.last, outputs["state"]
                if job.work.progress:
                    x_0_hat = outputs["x_0"] if ends else outputs["state"][LAST_X_0_HAT]
                    job.work.progress(group.start, span.last, x_0_hat)
        except Exception as error:  # ONNX Runtime's exceptions share no base class
            for job, group, _ in batch:
                if len(batch) > 1:
                    job.key = object()
                    if not group.done:
                        job.group, job.started = None, group.start
                elif not job.outputs.done():
                    job.outputs.set_exception(RunFailed(golden.brief(error)))
        finally:
            self._running, self._load = [], None


def _run(batch: list[Slice], options: ort.RunOptions) -> list[Feeds]:
    """Run the model once; returns the outputs of each slice."""
    own, span = list[Feeds](), batch[0].span
    for job, group, _ in batch:
        given = job.work.part(group.start, group.stop, span)
        if group.state is not None:
            given = {name: value for name, value in given.items() if name != "noise"} | {"state": group.state}
        own.append(given)
    joined: dict[str, Any] = {name: np.concatenate([each[name] for each in own], AXES[name]) for name in own[0]}
    ends = np.cumsum([group.size for _, group, _ in batch])[:-1]
    outputs = batch[0].job.run(joined | batch[0].job.work.common, span, options)
    split = {name: np.split(value, ends, AXES.get(name, 0)) for name, value in outputs.items()}
    return [{name: parts[index] for name, parts in split.items()} for index in range(len(batch))]
