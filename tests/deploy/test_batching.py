"""Which requests are joined, in which order they run, and how errors are handled."""

import asyncio
import threading
from collections.abc import Coroutine
from typing import Any

import numpy as np

from deploy.service.batching import Batcher, QueueFull, RunFailed
from deploy.service.models import Feeds


class Model:
    """A model whose outputs encode its inputs; it waits for `go`."""

    def __init__(self) -> None:
        self.batches: list[list[float]] = []
        self.running, self.go = threading.Event(), threading.Event()

    def run(self, feeds: Feeds) -> Feeds:
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


async def together(batcher: Batcher, model: Model, *jobs: Feeds) -> list[Any]:
    """Submit one job, then `jobs` while it runs; returns the outputs or errors of `jobs`."""
    tasks = [asyncio.create_task(batcher.submit(model.run, feeds(0)))]
    assert await asyncio.to_thread(model.running.wait, 60)
    tasks += [asyncio.create_task(batcher.submit(model.run, job)) for job in jobs]
    await asyncio.sleep(0)
    assert batcher.waiting == sum(len(job["noise"]) for job in jobs)
    model.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    assert batcher.waiting == 0
    return [result["images"][:, 0].tolist() if isinstance(result, dict) else result for result in results[1:]]


def batches(*jobs: Feeds, max_batch: int = 8) -> list[list[float]]:
    """Run jobs that wait together; returns the noise of each batch."""
    model, sizes = Model(), list[int]()
    batcher = Batcher(max_batch, 100, observe=sizes.append)
    results = asyncio.run(together(batcher, model, *jobs))
    assert results == [[10 * value for value in job["noise"][:, 0]] for job in jobs]
    assert sizes == [len(batch) for batch in model.batches]
    return model.batches[1:]


def test_waiting_requests_are_joined() -> None:
    assert batches(feeds(1), feeds(2, 3), feeds(4)) == [[1, 2, 3, 4]]


def test_batches_are_limited_and_start_with_the_oldest_request() -> None:
    assert batches(feeds(1, 2), feeds(3, 4), feeds(5), feeds(6, 7), max_batch=3) == [[1, 2, 5], [3, 4], [6, 7]]


def test_a_larger_request_runs_alone() -> None:
    assert batches(feeds(1), feeds(*range(2, 7)), feeds(8), max_batch=3) == [[1, 8], [2, 3, 4, 5, 6]]


def test_batch_wide_inputs_must_be_equal() -> None:
    ten, five = {"steps": [10], "guidance": [1.0]}, {"steps": [5], "guidance": [1.0]}
    other = {"steps": [10], "guidance": [2.0]}
    jobs = [feeds(1, **ten), feeds(2, **five), feeds(3, **other), feeds(4, **ten), feeds(5, **five)]
    assert batches(*jobs) == [[1, 4], [2, 5], [3]]


def test_step_noise_is_joined_along_its_second_axis() -> None:
    def job(first: float, steps: int) -> Feeds:
        return feeds(first, steps_noise=np.full((steps, 1, 1), first))

    model, jobs = Model(), [job(1, 3), job(2, 4), job(3, 3)]
    model.go.set()

    async def run() -> list[Feeds]:
        batcher = Batcher(8, 8)
        return await asyncio.gather(*(batcher.submit(model.run, each) for each in jobs))

    assert [result["images"].tolist() for result in asyncio.run(run())] == [[[10, 3]], [[20, 8]], [[30, 9]]]
    assert model.batches == [[1, 3], [2]]


def test_requests_of_different_models_are_not_joined() -> None:
    one, two = Model(), Model()
    one.go.set()
    two.go.set()

    async def run() -> None:
        batcher = Batcher(8, 8)
        await asyncio.gather(*(batcher.submit(m.run, feeds(i)) for i, m in enumerate([one, two, one, two])))

    asyncio.run(run())
    assert (one.batches, two.batches) == ([[0, 2]], [[1, 3]])


def test_a_failing_request_does_not_affect_others() -> None:
    model = Model()
    good, bad, also = asyncio.run(together(Batcher(8, 8), model, feeds(1), feeds(-2), feeds(3)))
    assert (good, also) == ([10], [30])
    assert isinstance(bad, RunFailed)
    assert str(bad) == "negative"
    assert model.batches[1:] == [[1, -2, 3], [1], [-2], [3]]


def test_the_queue_is_bounded() -> None:
    model = Model()
    first, second, third = asyncio.run(_crowd(Batcher(8, 3), model))
    assert (first, third) == ([10, 20], [50])
    assert isinstance(second, QueueFull)


async def _crowd(batcher: Batcher, model: Model) -> list[Any]:
    tasks = [asyncio.create_task(batcher.submit(model.run, feeds(0)))]
    assert await asyncio.to_thread(model.running.wait, 60)
    tasks += [asyncio.create_task(batcher.submit(model.run, job)) for job in (feeds(1, 2), feeds(3, 4), feeds(5))]
    await asyncio.sleep(0)
    model.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return [result["images"][:, 0].tolist() if isinstance(result, dict) else result for result in results[1:]]


def test_with_a_delay_the_first_request_waits_for_others() -> None:
    model = Model()
    model.go.set()

    async def run() -> None:
        batcher = Batcher(2, 8, delay=60)
        first = asyncio.create_task(batcher.submit(model.run, feeds(1)))
        await asyncio.sleep(0.01)
        assert not model.batches
        await asyncio.gather(first, batcher.submit(model.run, feeds(2)))

    _soon(run())
    assert model.batches == [[1, 2]]


def _soon(work: Coroutine[Any, Any, None]) -> None:
    async def limited() -> None:
        await asyncio.wait_for(work, 30)

    asyncio.run(limited())


def test_a_cancelled_request_does_not_block_the_next() -> None:
    model = Model()

    async def run() -> None:
        batcher = Batcher(8, 8)
        first = asyncio.create_task(batcher.submit(model.run, feeds(1)))
        assert await asyncio.to_thread(model.running.wait, 60)
        first.cancel()
        model.go.set()
        assert (await batcher.submit(model.run, feeds(2)))["images"].tolist() == [[20]]

    asyncio.run(run())
