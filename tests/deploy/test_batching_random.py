"""Many random requests at once, joined, cut into slices, cancelled and failing, against the direct result."""

import asyncio
import random
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from deploy.service import batching
from deploy.service.batching import Batcher, QueueFull, RunFailed, Stopping
from deploy.service.work import Feeds, Pace, Span, Work

BAD = 13
"""The class of an image that fails."""
FAILURE = "bad image, or bad luck"
ENDS = {"done", "full", "cancelled", "failed", "stopping"}


class Erratic(Pace):
    """Measurements from 0.1 ms to 3 s, so that slices have all sizes."""

    def __init__(self, chance: random.Random) -> None:
        super().__init__(chance.choice([0, 1e-3, 0.02, 1.0]))
        self._chance = chance

    def add(self, seconds: float) -> None:
        super().add(self._chance.choice([seconds, 1e-4, 1e-2, 0.5, 3.0]))


class Model:
    """x_(k+1) = x_k / 2 + scale * y + (k + 1) * guidance + noise_k; the second column of x_0_hat counts evaluations."""

    def __init__(self, chance: random.Random, scale: int, max_batch: int, failures: float) -> None:
        self.pace, self._chance = Erratic(chance), chance
        self.scale, self.max_batch, self.failures = scale, max_batch, failures
        self.stochastic = chance.random() < 0.5

    def next(self, x: Any, k: int, noise: Any, given: Feeds) -> Any:
        return x / 2 + self.scale * given["y"][:, None] + (k + 1) * given["guidance"][0] + noise

    def run(self, given: Feeds, span: Span, _: Any = None) -> Feeds:
        state = given["state"] if span.first else np.stack([given["noise"], given["noise"], 0 * given["noise"]])
        assert 0 <= span.first < span.last <= span.steps
        assert state.shape[1] == len(given["y"]) <= self.max_batch
        assert (state[2][:, 1] == span.first).all()
        if (given["y"] == BAD).any() or self._chance.random() < self.failures:
            raise RuntimeError(FAILURE)
        x = state[0]
        for k in range(span.first, span.last):
            x = self.next(x, k, given["steps_noise"][k - span.first] if self.stochastic else 0, given)
        counted = np.stack([x[:, 0], np.full(len(x), span.last)], axis=1)
        if span.last == span.steps:
            return {"images": x, "x_0": counted}
        return {"state": np.stack([x, state[1], counted])}

    def direct(self, given: Feeds, steps: int) -> Any:
        x = given["noise"]
        for k in range(steps):
            x = self.next(x, k, given["steps_noise"][k] if self.stochastic else 0, given)
        return x


async def request(batcher: Batcher, model: Model, chance: random.Random, seed: int) -> str:
    """Send a request, check what it gets, and say how it ended."""
    rng, count, steps = np.random.default_rng(seed), chance.randint(1, 9), chance.choice([1, 2, 3, 5, 10])
    bad, leaves, every = chance.random() < 0.08, chance.random() < 0.25, chance.choice([0, 0, 1, 2, 3, 10**30])
    given = {"noise": rng.normal(size=(count, 2)), "y": rng.integers(0, 3, count)}
    given["guidance"] = np.array([chance.choice([0.0, 1.0])])
    if bad:
        given["y"][chance.randrange(count)] = BAD
    if model.stochastic:
        given["steps_noise"] = rng.normal(size=(steps, count, 2))
    work, called = Work.of(given, steps, steps, model.pace), list[tuple[range, int]]()

    def progress(start: int, done: int, x_0_hat: Any) -> None:
        assert (x_0_hat[:, 1] == done).all()
        called.append((range(start, start + len(x_0_hat)), done))

    if every:
        work = replace(work, progress=progress, every=every)
    await asyncio.sleep(chance.random() * 0.01)
    task = asyncio.ensure_future(batcher.submit(model.run, work, chance.choice("abc")))
    if leaves:
        asyncio.get_running_loop().call_later(chance.random() * 0.01, task.cancel)
    try:
        outputs = await task
    except asyncio.CancelledError:
        assert leaves
        return "cancelled"
    except QueueFull as error:
        return "full" if 1 <= error.seconds < 1e6 else f"full for {error.seconds} s"
    except Stopping:
        return "stopping"
    except RunFailed:
        assert bad or model.failures
        return "failed"
    assert not bad
    np.testing.assert_allclose(outputs["images"], model.direct(given, steps), rtol=1e-12)
    for image in range(count if every else 0):
        seen = [done for images, done in called if image in images]
        assert seen == sorted(set(seen))
        assert {*range(every, steps, every), steps} <= set(seen)
    return "done"


async def trial(seed: int) -> list[str]:
    """A batcher with random limits and requests; returns how they ended."""
    chance = random.Random(seed)
    max_batch, failures = chance.choice([1, 2, 3, 8]), chance.choice([0, 0, 0.1])
    slice_seconds, delay = chance.choice([np.inf, 0.2, 0.05, 1e-3, 1e-9]), chance.choice([0, 0, 0.001])
    batcher = Batcher(max_batch, chance.choice([40, 200]), chance.choice([np.inf, 60.0]), slice_seconds, delay)
    models = [Model(chance, 1 + number, max_batch, failures) for number in range(2)]
    if chance.random() < 0.1:
        asyncio.get_running_loop().call_later(0.01, batcher.close)
    requests = (request(batcher, chance.choice(models), chance, seed + i) for i in range(chance.randint(2, 25)))
    ends = await asyncio.wait_for(asyncio.gather(*requests), 60)
    if batcher._worker:
        await asyncio.wait_for(batcher._worker, 60)  # nothing is left to do
    assert batcher.waiting == 0
    batcher._thread.shutdown()
    return ends


@pytest.mark.parametrize("seed", range(0, 4000, 1000))
def test_random_requests(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    run, wrong = batching._run, list[Exception]()

    def checked(*batch: Any) -> list[Feeds]:
        try:
            return run(*batch)
        except Exception as error:
            if str(error) != FAILURE:  # it would be hidden, as the requests are done again, each alone
                wrong.append(error)
            raise

    monkeypatch.setattr(batching, "_run", checked)
    ends = [end for number in range(15) for end in asyncio.run(trial(seed + number))]
    assert {"done", "full", "cancelled", "failed"} <= set(ends) <= ENDS
    assert not wrong
