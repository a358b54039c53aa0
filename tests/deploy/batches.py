"""A model and requests for tests of batching."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import numpy as np

from deploy.service.batching import Batcher, Work
from deploy.service.models import Feeds


class Model:
    """A model whose outputs encode its inputs; it waits for `go`."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.running, self.go = threading.Event(), threading.Event()

    def run(self, feeds: Feeds, options: Any = None) -> Feeds:
        self.options = options
        self.running.set()
        assert self.go.wait(60)
        first = feeds["noise"][:, 0]
        self.batches.append(first.tolist())
        if (first < 0).any():
            raise RuntimeError("negative\nand more")
        parts = [first * 10] + [feeds[name][0] for name in ("steps", "guidance") if name in feeds]
        parts += [feeds["steps_noise"].sum((0, 2)) for name in ("steps_noise",) if name in feeds]
        return {"images": np.stack(np.broadcast_arrays(*parts), axis=1)}


def feeds(*noise: float, **others: Any) -> Feeds:
    return {"noise": np.array(noise).reshape(-1, 1), **{name: np.array(value) for name, value in others.items()}}


def submit(batcher: Batcher, model: Model, job: Feeds, client: str = "") -> Coroutine[Any, Any, Feeds]:
    steps = len(job["steps_noise"]) if "steps_noise" in job else int(job.get("steps", [1])[0])
    return batcher.submit(model.run, Work.of(job, steps), client)


def soon(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, 30)

    asyncio.run(limited())
