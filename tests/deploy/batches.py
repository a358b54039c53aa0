"""A model and requests for tests of batching."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import numpy as np

from deploy.service.batching import Batcher
from deploy.service.work import Feeds, Pace, Span, Work


class Steady(Pace):
    """A second for each evaluation of an image."""

    def __init__(self) -> None:
        super().__init__(1)

    def add(self, seconds: float) -> None:
        pass


class Model:
    """A model whose outputs encode its inputs; it waits for `go`.

    The state between evaluations is the noise, and the number of evaluations.
    """

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.pace: Pace = Steady()
        self.spans: list[tuple[int, int]] = []
        self.running, self.go = threading.Event(), threading.Event()

    def run(self, feeds: Feeds, span: Span, options: Any = None) -> Feeds:
        self.options = options
        self.running.set()
        assert self.go.wait(60)
        assert ("state" in feeds) == (span.first > 0)
        first = feeds["state"][0, :, 0] if span.first else feeds["noise"][:, 0]
        if span.first:
            assert (feeds["state"][1] == span.first).all()
        self.batches.append(first.tolist())
        self.spans.append((span.first, span.last))
        if (first < 0).any():
            raise RuntimeError("negative\nand more")
        if span.last < span.steps:
            state = np.stack([first, np.full(len(first), span.last), first + span.last / 1000])
            return {"state": state[..., None]}
        parts = [first * 10] + [feeds[name][0] for name in ("guidance",) if name in feeds]
        parts += [feeds["steps_noise"].sum((0, 2)) for name in ("steps_noise",) if name in feeds]
        return {"images": np.stack(np.broadcast_arrays(*parts), axis=1)}


def feeds(*noise: float, **others: Any) -> Feeds:
    return {"noise": np.array(noise).reshape(-1, 1), **{name: np.array(value) for name, value in others.items()}}


def submit(batcher: Batcher, model: Model, job: Feeds, client: str = "") -> Coroutine[Any, Any, Feeds]:
    steps = len(job["steps_noise"]) if "steps_noise" in job else int(job.get("steps", [1])[0])
    job = {name: value for name, value in job.items() if name != "steps"}
    return batcher.submit(model.run, Work.of(job, steps, steps, model.pace), client)


def soon(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, 30)

    asyncio.run(limited())
