"""GET /images/stream: pictures as they form."""

import asyncio
import base64
import json
import threading
import weakref
from contextlib import closing
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray

from deploy.service import images, pictures, server
from deploy.service.state import OVERHEAD, Pictures, Service
from deploy.service.work import Work
from tests.deploy.models import write_model
from tests.deploy.services import ask, get, service
from tests.deploy.test_clients import Served, served, until
from tests.deploy.test_pictures import cells
from tests.export.test_sampler_graph import SHAPE

__all__ = ["served"]
pytestmark = pytest.mark.slow


class Event(NamedTuple):
    kind: str
    data: dict[str, Any]

    def images(self, columns: int, count: int) -> NDArray[np.uint8]:
        """The images of a grid at scale 1."""
        png = httpx.Response(200, headers={"Content-Type": "image/png"}, content=base64.b64decode(self.data["image"]))
        return cells(png, 1, columns, count)


def events(text: str) -> list[Event]:
    found = []
    for block in text.strip().split("\n\n"):
        kind, data = block.split("\n")
        found.append(Event(kind.removeprefix("event: "), json.loads(data.removeprefix("data: "))))
    return found


def stream(service: Service, query: str) -> list[Event]:
    (answer,) = ask(service, get(f"/images/stream?scale=1&{query}"))
    assert answer.headers["Content-Type"].startswith("text/event-stream"), answer.text
    assert answer.headers["X-Accel-Buffering"] == "no"
    return events(answer.text)


def test_a_stream_ends_with_the_image(classes: Service) -> None:
    *progress, done = stream(classes, "n=5&seed=7&class=2&steps=20&guidance=1.5")
    assert [(event.kind, event.data["step"]) for event in progress] == [("progress", step) for step in range(2, 20, 2)]
    assert {event.data["steps"] for event in (*progress, done)} == {20}
    (image,) = ask(classes, get("/images?n=5&seed=7&class=2&steps=20&guidance=1.5&scale=1"))
    np.testing.assert_array_equal(done.images(3, 5), cells(image, 1, 3, 5))
    assert (done.kind, done.data["seed"], done.data["model"], done.data["version"]) == ("done", 7, "ddpm", "a" * 12)


def test_estimates_are_those_of_the_model(classes: Service) -> None:
    """The estimate after the first evaluation of any number of steps is the image made in one step."""
    first, *others = stream(classes, "n=2&seed=3&class=turn&steps=6&every=1")
    (one,) = ask(classes, get("/images?n=2&seed=3&class=turn&steps=1&scale=1"))
    np.testing.assert_array_equal(first.images(2, 2), cells(one, 1, 2, 2))
    assert [event.data["step"] for event in others] == [2, 3, 4, 5, 6]


def test_all_classes_in_turn(classes: Service) -> None:
    turn, *each = ask(
        classes, get("/images?n=5&seed=1&class=turn"), *(get(f"/images?n=5&seed=1&class={label}") for label in range(3))
    )
    expected = [cells(each[image % 3], 4, 3, 5)[image] for image in range(5)]
    np.testing.assert_array_equal(cells(turn, 4, 3, 5), np.stack(expected))


def test_images_that_do_not_fit_into_a_batch_follow(tmp_path: Path) -> None:
    """Those that have not begun are grey."""
    small = service(write_model(tmp_path / "sampler.onnx", "ddpm", False), max_batch=2)
    *progress, done = stream(small, "n=3&seed=1&every=2")
    assert [event.data["step"] for event in progress] == [1, 2, 3]  # of 4, on average
    final = done.images(2, 3)
    grey = np.full((*SHAPE[1:], SHAPE[0]), 128)
    assert (progress[0].images(2, 3)[2] == grey).all()
    np.testing.assert_array_equal(progress[1].images(2, 3), [*final[:2], grey])
    np.testing.assert_array_equal(progress[2].images(2, 3)[:2], final[:2])
    (image,) = ask(small, get("/images?n=3&seed=1&scale=1"))
    np.testing.assert_array_equal(final, cells(image, 1, 2, 3))


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ("n=0", "n: input should be greater than or equal to 1 (got 0)"),
        ("steps=99", "steps: must be 1 to 50, or 0 for 4 (got 99)"),
        ("every=-1", "every: input should be greater than or equal to 0 (got -1)"),
        ("n=2&n=3", "n: given twice; remove one"),
    ],
)
def test_what_can_be_refused_is_refused_before_the_stream_begins(classes: Service, query: str, line: str) -> None:
    (answer,) = ask(classes, get(f"/images/stream?{query}"))
    assert (answer.status_code, answer.json()) == (400, {"error": line})


def test_a_full_queue(classes: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(classes.batcher, "_max_waiting", 3)
    (answer,) = ask(classes, get("/images/stream?n=4"))
    assert (answer.status_code, answer.headers["Retry-After"]) == (503, "1")


def test_a_failure_in_the_middle_is_an_event(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broken = service(write_model(tmp_path / "sampler.onnx", "ddim", False))
    model, run = broken.models.first, broken.models.first.run

    def fail(feeds: Any, span: Any, options: Any) -> Any:
        if span.first == 2:
            raise RuntimeError("no memory\nleft")
        return run(feeds, span, options)

    monkeypatch.setattr(model, "run", fail)
    found = stream(broken, "n=1&every=1")
    assert [event.kind for event in found] == ["progress", "progress", "error"]
    assert found[-1].data == {"error": "the model failed: no memory"}


def test_estimates_come_while_the_images_form(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first one is here before the second evaluation may run; the work of a client that leaves then ends."""
    run, second = served.run, threading.Event()

    def wait(feeds: Any, span: Any, options: Any = None) -> Any:
        if span.first:
            served.running.set()
            while not second.wait(0.01):
                if options.terminate:
                    served.ended.set()
                    raise RuntimeError("terminated")
        return run(feeds, span, options)

    monkeypatch.setattr(served.model, "run", wait)
    with closing(served.client()) as connection:
        connection.request("GET", "/images/stream?n=1&every=1")
        answer = connection.getresponse()
        assert answer.readline() == b"event: progress\n"
        assert json.loads(answer.readline().removeprefix(b"data: "))["step"] == 1
        assert served.running.wait(20)
    answer.close()
    assert served.ended.wait(20)
    until(lambda: served.service.batcher.waiting == 0)


def test_noise_of_later_steps(stochastic: Service) -> None:
    """Cut into slices, a stochastic sampler gets the noise of its own steps."""
    *_, done = stream(stochastic, "n=2&seed=5&every=1")
    (image,) = ask(stochastic, get("/images?n=2&seed=5&scale=1"))
    np.testing.assert_array_equal(done.images(2, 2), cells(image, 1, 2, 2))


def test_estimates_that_wait_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    """They do not keep the state that they are parts of, nor are there more of them than the limit."""
    monkeypatch.setattr(images, "MAX_UNSENT", 3 * 2 * 8)

    async def run() -> None:
        model: Any = SimpleNamespace(shape=(1, 2, 4))
        task = asyncio.create_task(asyncio.sleep(60))
        forming = images.Forming(model, Work(2, 9, 9, {}, lambda *_: {}), 1)
        for done in range(1, 9):
            state = np.full((3, 5, 1, 2, 4), done / 10, np.float32)
            assert forming.work.progress
            forming.work.progress(0, done, state[2, :2])
            kept = weakref.ref(state)
            del state
            assert kept() is None
        found = [((await forming.next(task)), forming.step) for _ in range(3)]
        assert [step for _, step in found] == [6, 7, 8]
        for made, step in found:
            assert made is not None
            assert (made == round((step / 10 + 1) * 127.5)).all()
        task.cancel()

    asyncio.run(run())


def test_pictures_that_were_asked_for_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    kept = service(write_model(tmp_path / "sampler.onnx", "ddpm", False))
    query = "n=3&seed=7&steps=3"
    (first,) = ask(kept, get(f"/images?scale=1&{query}"))
    (done,) = stream(kept, query)  # at once
    assert (done.kind, base64.b64decode(done.data["image"])) == ("done", first.content)
    monkeypatch.setattr(kept.models.first, "run", None)  # it cannot be computed
    again, other = ask(kept, get(f"/images?scale=1&{query}"), get(f"/images?scale=2&{query}"))
    assert (again.content, again.headers["ETag"]) == (first.content, first.headers["ETag"])
    assert other.status_code == 500
    assert "ddpm_cached_total 2.0" in kept.metrics.text().decode()


def test_the_cache_is_bounded(tmp_path: Path) -> None:
    """Of two pictures, one fits; of a larger one none is kept."""
    small = service(write_model(tmp_path / "sampler.onnx", "ddpm", False))
    (one,) = ask(small, get("/images?n=1&seed=1"))
    small.cache = Pictures(len(one.content) + OVERHEAD + 10)
    for query in ("n=1&seed=1", "n=1&seed=2", "n=9&seed=1"):
        ask(small, get(f"/images?{query}"))
        assert small.cache.currsize <= small.cache.maxsize
    assert len(small.cache) == 1


def test_a_client_that_does_not_read_on(
    served: Served, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Its connection is closed, although the stream has not ended; nothing is logged."""
    monkeypatch.setattr(pictures, "png", lambda *_: bytes(2**24))
    monkeypatch.setattr(server, "READ_SECONDS", 0.2)
    with served.connect() as connection:
        connection.sendall(b"GET /images/stream?n=1&every=1 HTTP/1.1\r\nHost: x\r\n\r\n")
        until(lambda: bool(served.server.server_state.connections))
        until(lambda: not served.server.server_state.connections)
    until(lambda: 'path="/images/stream"' in served.service.metrics.text().decode())
    assert not caplog.records


def test_a_stream_that_waits_says_that_it_is_alive(served: Served, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "KEEP_ALIVE_SECONDS", 0.1)
    served.go.clear()
    with closing(served.client()) as connection:
        connection.request("GET", "/images/stream?n=1&every=1")
        with connection.getresponse() as answer:
            assert answer.readline() == b": ping\n"
            served.go.set()
            assert b"event: done\n" in answer.readlines()


def test_a_client_that_reads_slowly_gets_fewer_estimates(classes: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    model, x_0_hat = classes.models.first, np.zeros((2, *SHAPE), np.float32)
    monkeypatch.setattr(images, "MAX_UNSENT", 3 * x_0_hat.size)  # a byte each
    work = pictures.work(pictures.ImageQuery(n=2, steps=20), 1, model, 16)

    async def steps() -> list[int]:
        forming, found = images.Forming(model, work, 1), list[int]()
        assert forming.work.progress
        for done in range(1, 9):
            forming.work.progress(0, done, x_0_hat)
        task = asyncio.create_task(asyncio.sleep(60))
        for _ in range(3):
            await forming.next(task)
            found.append(forming.step)
        assert not forming._added.is_set()
        task.cancel()
        return found

    assert work.evaluations == 20
    assert asyncio.run(steps()) == [6, 7, 8]
