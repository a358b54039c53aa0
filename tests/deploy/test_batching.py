"""Which requests are joined, in which order they run, and how errors are handled."""

import asyncio
import threading
import time
from collections.abc import Coroutine
from typing import Any

import numpy as np
import pytest

from deploy.service.batching import Batcher, QueueFull, RunFailed, Stopping, Work
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
        return await Batcher(2, 8).submit(run, Work.of(job, 3))

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

    def part(start: int, stop: int) -> Feeds:
        if fails == "input":
            raise MemoryError("no memory")
        return feeds(*range(start, stop))

    def observe(_: int) -> None:
        if fails == "output":
            raise MemoryError("no memory")

    async def run() -> None:
        batcher = Batcher(8, 100, observe=observe)
        broken = batcher.submit(model.run, Work(2, 1, {}, part))
        with pytest.raises(RunFailed, match="no memory"):
            await broken
        if fails == "input":
            assert (await submit(batcher, model, feeds(2)))["images"].tolist() == [[20]]

    _soon(run())


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
        first = asyncio.create_task(submit(batcher, model, feeds(1)))
        assert await asyncio.to_thread(model.running.wait, 60)
        first.cancel()
        model.go.set()
        assert (await submit(batcher, model, feeds(2)))["images"].tolist() == [[20]]

    asyncio.run(run())


async def waiting_together(batcher: Batcher, model: Model, *jobs: tuple[str, Feeds]) -> list[Any]:
    """Submit jobs of clients while another one runs, and let them run."""
    first = asyncio.create_task(submit(batcher, model, feeds(0), "first"))
    assert await asyncio.to_thread(model.running.wait, 60)
    tasks = [asyncio.create_task(submit(batcher, model, job, client)) for client, job in jobs]
    await asyncio.sleep(0)
    model.go.set()
    return (await asyncio.gather(first, *tasks, return_exceptions=True))[1:]


def test_clients_get_equal_shares_of_the_cost() -> None:
    model = Model()
    long = [("many", feeds(*range(1, 5))) for _ in range(3)]
    asyncio.run(waiting_together(Batcher(2, 100), model, *long, ("few", feeds(*range(11, 15)))))
    order = ["few" if batch[0] > 10 else "many" for batch in model.batches[1:]]
    assert order == ["many", "few", "many", "few", "many", "many", "many", "many"]


def test_steps_count_as_cost() -> None:
    model = Model()
    jobs = [(name, feeds(*(value,) * 8, steps=[steps])) for name, value, steps in (("a", 1, 20), ("b", 2, 10))]
    asyncio.run(waiting_together(Batcher(1, 100), model, *jobs))
    assert [batch[0] for batch in model.batches[1:13]] == [2, 1, 2, 2, 1, 2, 2, 1, 2, 2, 1, 2]


@pytest.mark.parametrize("clients", [1, 2, 6], ids="{} clients".format)
def test_a_request_is_never_overtaken_for_good(clients: int) -> None:
    """A request of 5 images among five clients' endless short ones gets its share, whoever sends these."""
    model, done = Model(), 0

    async def run() -> None:
        batcher = Batcher(1, 100)
        model.go.set()
        long = asyncio.create_task(submit(batcher, model, feeds(*range(5))))

        async def stream(number: int) -> None:
            nonlocal done
            while not long.done():
                await submit(batcher, model, feeds(9), f"{number % clients}" if number % clients else "")
                done += 1
                assert done < 50

        await asyncio.gather(long, *(stream(number) for number in range(5)))

    _soon(run())


def test_new_clients_do_not_overtake_for_good() -> None:
    """As many clients as there are requests: each comes while another one runs, and none comes back."""
    model, done = Model(), 0

    async def run() -> None:
        batcher = Batcher(1, 100)
        model.go.set()
        long = asyncio.create_task(submit(batcher, model, feeds(*range(5)), "long"))

        async def stream(name: str) -> None:
            nonlocal done
            while not long.done():
                await submit(batcher, model, feeds(9), f"{name} {done}")
                done += 1
                assert done < 50

        await asyncio.gather(long, *(stream(name) for name in "abcde"))
        assert len(batcher._clients) < 10  # the others are forgotten

    _soon(run())


def test_slices_follow_the_measured_speed() -> None:
    """At 0.02 s per image and step, 0.1 s hold 5 images of one step, and none of 10 steps, which run one by one."""

    class Slow(Model):
        def run(self, feeds: Feeds, options: Any = None) -> Feeds:
            time.sleep(0.02 * len(feeds["noise"]) * int(feeds["steps"][0]))
            return super().run(feeds, options)

    model, sizes = Slow(), list[int]()
    model.go.set()
    batcher = Batcher(64, 100, slice_seconds=0.11, observe=sizes.append)

    async def run() -> None:
        await submit(batcher, model, feeds(*range(21), steps=[1]))
        await submit(batcher, model, feeds(*range(3), steps=[10]))

    asyncio.run(run())
    assert sizes[0] == 1  # the speed is not known yet
    assert all(3 <= size <= 5 for size in sizes[1:4])
    assert sizes[-3:] == [1, 1, 1]


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


def test_too_much_work() -> None:
    """The queue may hold 2 s; after a batch of 0.05 s per image and step, 100 images and steps are 5 s."""

    class Slow(Model):
        def run(self, feeds: Feeds, options: Any = None) -> Feeds:
            time.sleep(0.05)
            return super().run(feeds, options)

    model = Slow()
    model.go.set()

    async def run() -> QueueFull:
        batcher = Batcher(1, 1000, max_wait=2)
        await submit(batcher, model, feeds(0))
        long = asyncio.create_task(submit(batcher, model, feeds(*range(10), steps=[10])))
        await asyncio.sleep(0.01)
        with pytest.raises(
            QueueFull, match=r"^no room in the queue: \d seconds of work are ahead, .* 2; try again"
        ) as full:
            await submit(batcher, model, feeds(1))
        batcher.check_room("another", 2, 10)  # its wait is that of as much of the other's work
        with pytest.raises(QueueFull):
            batcher.check_room("another", 5, 10)
        long.cancel()
        return full.value

    assert 3 <= asyncio.run(run()).seconds <= 5


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
        return await asyncio.gather(*tasks, return_exceptions=True)

    assert [type(result) for result in asyncio.run(run())] == [Stopping, Stopping]
    assert model.batches == [[1]]
