"""Which requests are joined, in which order they run, and how errors are handled."""

import asyncio
from typing import Any

import numpy as np
import pytest

from deploy.service.batching import Batcher, QueueFull, RunFailed, Stopping
from deploy.service.work import Feeds, Pace, Span, Work
from tests.deploy.batches import Model, feeds, soon, submit


async def together(batcher: Batcher, model: Model, *jobs: Feeds) -> list[Any]:
    """Submit one job, then `jobs` while it runs; returns the outputs or errors of `jobs`."""
    tasks = [asyncio.create_task(submit(batcher, model, feeds(0)))]
    assert await asyncio.to_thread(model.running.wait, 60)
    tasks += [asyncio.create_task(submit(batcher, model, job)) for job in jobs]
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
    assert batches(feeds(1), feeds(2, 3), feeds(4)) == [[1, 4, 2, 3]]


def test_batches_are_limited_and_start_with_what_ends_first() -> None:
    assert batches(feeds(1, 2), feeds(3, 4), feeds(5), feeds(6, 7), max_batch=3) == [[5, 1, 2], [3, 4, 6], [7]]


def test_a_long_request_is_overtaken_by_short_ones() -> None:
    assert batches(feeds(*range(9)), feeds(11), feeds(12), max_batch=3) == [[11, 12, 0], [1, 2, 3], [4, 5, 6], [7, 8]]


def test_batch_wide_inputs_must_be_equal() -> None:
    ten, five = {"steps": [10], "guidance": [1.0]}, {"steps": [5], "guidance": [1.0]}
    other = {"steps": [10], "guidance": [2.0]}
    jobs = [feeds(1, **ten), feeds(2, **five), feeds(3, **other), feeds(4, **ten), feeds(5, **five)]
    assert batches(*jobs) == [[2, 5], [1, 4], [3]]


def test_step_noise_is_joined_along_its_second_axis() -> None:
    def job(first: float, steps: int) -> Feeds:
        return feeds(first, steps_noise=np.full((steps, 1, 1), first))

    model, jobs = Model(), [job(1, 3), job(2, 4), job(3, 3)]
    model.go.set()

    async def run() -> list[Feeds]:
        batcher = Batcher(8, 8)
        return await asyncio.gather(*(submit(batcher, model, each) for each in jobs))

    assert [result["images"].tolist() for result in asyncio.run(run())] == [[[10, 3]], [[20, 8]], [[30, 9]]]
    assert model.batches == [[1, 3], [2]]


def test_slices_have_the_inputs_of_their_images() -> None:
    """5 images in slices of 2, 2 and 1; the outputs are sums of each image's inputs."""

    def run(feeds: Feeds, *_: Any) -> Feeds:
        assert feeds["steps_noise"].shape == (3, len(feeds["noise"]), 2)
        return {"images": feeds["noise"][:, 0] + feeds["y"] + feeds["steps_noise"].sum((0, 2))}

    noise = np.arange(30.0).reshape(3, 5, 2)
    job = feeds(0.1, 0.2, 0.3, 0.4, 0.5, y=np.arange(5) * 1000, steps_noise=noise)

    async def outputs() -> Feeds:
        return await Batcher(2, 8).submit(run, Work.of(job, 3, 3, Pace()))

    np.testing.assert_array_equal(asyncio.run(outputs())["images"], run(job)["images"])


def test_requests_of_different_models_are_not_joined() -> None:
    one, two = Model(), Model()
    one.go.set()
    two.go.set()

    async def run() -> None:
        batcher = Batcher(8, 8)
        await asyncio.gather(*(submit(batcher, m, feeds(i)) for i, m in enumerate([one, two, one, two])))

    asyncio.run(run())
    assert (one.batches, two.batches) == ([[0, 2]], [[1, 3]])


def test_a_failing_request_does_not_affect_others() -> None:
    model = Model()
    good, bad, also = asyncio.run(together(Batcher(8, 8), model, feeds(1), feeds(-2), feeds(3)))
    assert (good, also) == ([10], [30])
    assert isinstance(bad, RunFailed)
    assert str(bad) == "negative"
    assert model.batches[1:] == [[1, -2, 3], [1], [-2], [3]]


def test_a_request_that_fails_later() -> None:
    """Joined ones are done again alone, from the slice that failed; what follows is not affected."""
    model = Model()
    jobs = feeds(1, 2, 3, 4), feeds(5, 6, 7, -8, 9), feeds(10, 11, 12, 13, 14, 15)
    good, bad, also = asyncio.run(together(Batcher(6, 100), model, *jobs))
    assert (good, also) == ([10, 20, 30, 40], [100, 110, 120, 130, 140, 150])
    assert isinstance(bad, RunFailed)
    assert model.batches[1:] == [[1, 2, 3, 4, 5, 6], [7, -8, 9, 10, 11, 12], [7, -8, 9], [10, 11, 12, 13, 14, 15]]


@pytest.mark.parametrize("fails", ["input", "output"])
def test_a_request_whose_inputs_or_outputs_cannot_be_made(fails: str) -> None:
    """What fails besides the model itself ends the request, too, and not the worker."""
    model = Model()
    model.go.set()

    def part(start: int, stop: int, _: Span) -> Feeds:
        if fails == "input":
            raise MemoryError("no memory")
        return feeds(*range(start, stop))

    def observe(_: int) -> None:
        if fails == "output":
            raise MemoryError("no memory")

    async def run() -> None:
        batcher = Batcher(8, 100, observe=observe)
        broken = batcher.submit(model.run, Work(2, 1, 1, {}, part))
        with pytest.raises(RunFailed, match="no memory"):
            await broken
        if fails == "input":
            assert (await submit(batcher, model, feeds(2)))["images"].tolist() == [[20]]

    soon(run())


def test_the_end_of_the_service_while_a_batch_is_done_again() -> None:
    model = Model()

    async def run() -> list[Any]:
        batcher = Batcher(8, 100)
        tasks = [asyncio.create_task(submit(batcher, model, feeds(value))) for value in (-1, 2, 3)]
        await asyncio.to_thread(model.running.wait, 60)
        model.running.clear()
        model.go.set()
        while len(model.batches) < 1 or not model.running.is_set():
            await asyncio.sleep(0)
        batcher.close()
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert {type(result) for result in asyncio.run(run())} <= {Stopping, RunFailed}


def test_the_queue_is_bounded() -> None:
    model = Model()
    first, second, third = asyncio.run(_crowd(Batcher(8, 5), model))
    assert (first, third) == ([10, 20], [50])
    assert isinstance(second, QueueFull)


async def _crowd(batcher: Batcher, model: Model) -> list[Any]:
    tasks = [asyncio.create_task(submit(batcher, model, feeds(0)))]
    assert await asyncio.to_thread(model.running.wait, 60)
    tasks += [asyncio.create_task(submit(batcher, model, job)) for job in (feeds(1, 2), feeds(3, 4), feeds(5))]
    await asyncio.sleep(0)
    model.go.set()
    results = await asyncio.gather(*tasks, return_exceptions=True)
    return [result["images"][:, 0].tolist() if isinstance(result, dict) else result for result in results[1:]]


def test_with_a_delay_the_first_request_waits_for_others() -> None:
    model = Model()
    model.go.set()

    async def run() -> None:
        batcher = Batcher(2, 8, delay=60)
        first = asyncio.create_task(submit(batcher, model, feeds(1)))
        await asyncio.sleep(0.01)
        assert not model.batches
        await asyncio.gather(first, submit(batcher, model, feeds(2)))

    soon(run())
    assert model.batches == [[1, 2]]


def test_a_cancelled_request_does_not_block_the_next() -> None:
    model = Model()

    async def run() -> None:
        batcher = Batcher(8, 8)
        first = asyncio.create_task(submit(batcher, model, feeds(1)))
        assert await asyncio.to_thread(model.running.wait, 60)
        first.cancel()
        model.go.set()
        assert (await submit(batcher, model, feeds(2)))["images"].tolist() == [[20]]

    asyncio.run(run())


def test_what_nobody_waits_for_ends() -> None:
    model = Model()

    async def run() -> None:
        batcher = Batcher(1, 100)
        gone = asyncio.create_task(submit(batcher, model, feeds(1, 2, 3, 4)))
        assert await asyncio.to_thread(model.running.wait, 60)
        other = asyncio.create_task(submit(batcher, model, feeds(5)))
        await asyncio.sleep(0)
        assert not model.options.terminate
        gone.cancel()
        await asyncio.sleep(0)
        assert model.options.terminate
        assert batcher.waiting == 1
        model.go.set()
        await other

    asyncio.run(run())
    assert model.batches == [[1], [5]]


def test_closing() -> None:
    model = Model()

    async def run() -> list[Any]:
        batcher = Batcher(1, 100)
        tasks = [asyncio.create_task(submit(batcher, model, feeds(value))) for value in (1, 2)]
        assert await asyncio.to_thread(model.running.wait, 60)
        batcher.close()
        assert model.options.terminate
        model.go.set()
        with pytest.raises(Stopping):
            batcher.check_room("")
        await asyncio.to_thread(batcher._thread.shutdown)
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(result) for result in asyncio.run(run())] == [Stopping, Stopping]
    assert model.batches == [[1]]
