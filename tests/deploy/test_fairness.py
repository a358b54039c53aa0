"""Shares of clients and requests, limits of the queue, and sizes of slices."""

import asyncio
from types import SimpleNamespace
from typing import Any

import pytest

from deploy.service import batching
from deploy.service.batching import Batcher, QueueFull
from deploy.service.work import Feeds, Pace, Span
from tests.deploy.batches import Model, feeds, soon, submit


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


def test_a_short_request_of_a_new_client_is_next() -> None:
    """It would end first, although a long one has had less than its share so far."""
    model = Model()

    async def run() -> None:
        batcher = Batcher(1, 100)
        jobs = [asyncio.create_task(submit(batcher, model, feeds(*(i,) * 2, steps=[10]), f"long {i}")) for i in (1, 2)]
        assert await asyncio.to_thread(model.running.wait, 60)
        jobs.append(asyncio.create_task(submit(batcher, model, feeds(9, steps=[1]), "short")))
        await asyncio.sleep(0)
        model.go.set()
        await asyncio.gather(*jobs)

    soon(run())
    assert model.batches == [[1], [9], [2], [1], [2]]


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

    soon(run())


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

    soon(run())


class Timed(Model):
    """A model that takes 0.02 s per image and step, by a clock that stands still otherwise."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        super().__init__()
        self.pace, self.seconds = Pace(), 0.0
        monkeypatch.setattr(batching, "time", SimpleNamespace(perf_counter=lambda: self.seconds))

    def run(self, feeds: Feeds, span: Span, options: Any = None) -> Feeds:
        images = feeds["state"].shape[1] if "state" in feeds else len(feeds["noise"])
        self.seconds += 0.02 * images * (span.last - span.first)
        return super().run(feeds, span, options)


def test_slices_follow_the_measured_speed(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.11 s hold 5 images of one evaluation, or 2 of 2; of 10 they hold none, so 5 images take an evaluation each."""
    model, sizes = Timed(monkeypatch), list[int]()
    model.go.set()
    batcher = Batcher(64, 100, slice_seconds=0.11, observe=sizes.append)

    async def run() -> None:
        await submit(batcher, model, feeds(*range(21), steps=[1]))
        assert sizes == [1, 5, 5, 5, 5]  # the speed is not known at first
        await submit(batcher, model, feeds(*range(3), steps=[2]))
        assert sizes[5:] == [2, 1]
        model.spans.clear()
        outputs = await submit(batcher, model, feeds(*range(6), steps=[10]))
        assert outputs["images"][:, 0].tolist() == [0, 10, 20, 30, 40, 50]

    asyncio.run(run())
    assert sizes[7:] == [5, 1]
    assert model.spans[:10] == [(step, step + 1) for step in range(10)]
    assert model.spans[10:] == [(0, 5), (5, 10)]


def test_too_much_work(monkeypatch: pytest.MonkeyPatch) -> None:
    """9 images of 10 steps wait while the tenth runs: 1.8 s, and the limit is 0.5 s."""
    model = Timed(monkeypatch)
    model.go.set()

    async def run() -> QueueFull:
        batcher = Batcher(1, 1000, max_wait=0.5)
        await submit(batcher, model, feeds(0, steps=[1]))
        model.go.clear()
        model.running.clear()
        long = asyncio.create_task(submit(batcher, model, feeds(*range(10), steps=[10])))
        assert await asyncio.to_thread(model.running.wait, 60)
        with pytest.raises(QueueFull, match=r"^no room in the queue: 2 seconds of work are ahead") as full:
            await submit(batcher, model, feeds(1, steps=[1]))
        batcher.check_room("another", 2, 0.4)  # it waits for as much of the other's work, 0.4 s
        with pytest.raises(QueueFull):
            batcher.check_room("another", 3, 0.6)
        model.go.set()
        await long
        return full.value

    assert asyncio.run(run()).seconds == 2


def test_a_client_leaves_room_in_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 12 images, a client may have 6 in the queue; then another one may have 3."""
    model = Timed(monkeypatch)

    async def run() -> None:
        batcher = Batcher(1, 12)
        jobs = [asyncio.create_task(submit(batcher, model, feeds(0, steps=[1])))]
        assert await asyncio.to_thread(model.running.wait, 60)
        jobs += [asyncio.create_task(submit(batcher, model, feeds(0, steps=[1]))) for _ in range(6)]
        await asyncio.sleep(0)
        with pytest.raises(
            QueueFull, match=r"queue: 6 images are waiting, 6 of them yours \(limit 12\); try again in 1 s"
        ):
            batcher.check_room("")
        batcher.check_room("another", 6)
        with pytest.raises(QueueFull):
            batcher.check_room("another", 7)
        model.go.set()
        await asyncio.gather(*jobs)

    soon(run())
