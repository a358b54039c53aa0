"""GET /images: grids of images as PNG, and /images/stream: the same while they form."""

import asyncio
import base64
import json
import math
import secrets
from collections import deque
from collections.abc import AsyncGenerator
from dataclasses import dataclass, replace
from typing import Annotated, Any

import numpy as np
from fastapi import APIRouter, Query, Request, Response
from fastapi.responses import StreamingResponse
from fastapi.sse import KEEPALIVE_COMMENT, format_sse_event
from numpy.typing import NDArray
from pydantic import Field
from starlette.requests import ClientDisconnect

from deploy.service import pictures, protocol
from deploy.service.errors import EXPECTED, answer, described
from deploy.service.models import Model, to_uint8
from deploy.service.requests import chosen, compute, sender, unchanged
from deploy.service.state import Service
from deploy.service.work import Feeds, Work

KEEP_ALIVE_SECONDS = 15.0
"""After so long without an event, a stream sends a comment, since proxies close connections that are idle."""
EVENTS = 10
"""About how many estimates a stream sends, unless asked for another number of steps between them."""

PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {}}, "description": "A PNG; X-Seed and X-Model-Version tell what made it."},
    304: {"description": "The picture is that of If-None-Match."},
    **described(400, 404, 500, 503, 504),
}
STREAM: dict[int | str, dict[str, Any]] = {
    200: {"content": {"text/event-stream": {}}, "description": "Events `progress`, then `done` or `error`."},
    **described(400, 404, 503),
}

MAX_UNSENT = 2**20
"""Bytes of the estimates of a stream that wait to be sent; if a client reads more slowly, it gets fewer of them."""


class StreamQuery(pictures.ImageQuery):
    """The query of GET /images/stream."""

    every: int = Field(0, ge=0, description=f"Steps between estimates; 0 for about {EVENTS} of them.")


@dataclass(frozen=True)
class Asked:
    """A valid request for images."""

    model: Model
    seed: int
    work: Work
    etag: str | None
    """Of what is asked; None for a random seed."""


def routes(service: Service) -> APIRouter:
    """Create the routes."""
    router = APIRouter()

    def asked(request: Request, query: pictures.ImageQuery) -> Asked:
        for name in (given := request.query_params):
            if len(given.getlist(name)) > 1:
                raise protocol.Invalid(f"{name}: given twice; remove one")
        model = chosen(service, query.model)
        seed = secrets.randbelow(2**32) if query.seed is None else query.seed
        work = pictures.work(query, seed, model, service.max_images)
        return Asked(model, seed, work, None if query.seed is None else pictures.etag(query, model))

    async def picture(found: Asked, scale: int, outputs: Feeds) -> bytes:
        """The PNG of some outputs, which is kept if it can be asked for again."""
        png = await service.convert(pictures.png, outputs["images"], scale)
        if found.etag:
            service.keep(found.etag, png)
        return png

    @router.get("/images", response_class=Response, responses=PICTURE)
    async def images(request: Request, query: Annotated[pictures.ImageQuery, Query()]) -> Response:
        """A grid of generated images."""
        found = asked(request, query)
        headers = {"X-Model-Version": found.model.version, "X-Seed": str(found.seed), "Cache-Control": "no-store"}
        if found.etag:  # unchanged until the model changes, which the ETag tells in one round trip
            headers |= {"Cache-Control": "no-cache", "ETag": found.etag}
            if unchanged(request, found.etag):
                return Response(status_code=304, headers=headers)
        png = service.kept(found.etag)
        if png is None:
            png = await picture(found, query.scale, await compute(service, request, found.model, found.work))
        return Response(png, media_type="image/png", headers=headers)

    @router.get("/images/stream", response_class=Response, responses=STREAM)
    async def stream(request: Request, query: Annotated[StreamQuery, Query()]) -> Response:
        """The same as it forms: events `progress`, then `done` or `error`.

        Their data is JSON: step, steps and image, a PNG in base64; at the end also seed, model and version; or error.
        """
        found = asked(request, query)
        if service.kept(found.etag, count=False) is None:  # what can be refused is before the response begins
            service.batcher.check_room(sender(request), found.work.count, found.work.seconds)
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}  # nginx sends each event at once
        return StreamingResponse(events(request, query, found), media_type="text/event-stream", headers=headers)

    # FastAPI's EventSourceResponse is not used: it logs a traceback if the client leaves while an event is being sent.
    async def events(request: Request, query: StreamQuery, asked: Asked) -> AsyncGenerator[bytes]:
        model, steps = asked.model, asked.work.steps

        def event(kind: str, png: bytes, step: int, **facts: Any) -> bytes:
            image = base64.b64encode(png).decode()
            return _event(kind, {"step": step, "steps": steps, **facts, "image": image})

        facts = {"seed": asked.seed, "model": model.name, "version": model.version}
        if (png := service.kept(asked.etag)) is not None:
            yield event("done", png, steps, **facts)
            return
        forming = Forming(model, asked.work, query.every)
        task = asyncio.create_task(compute(service, request, model, forming.work))
        try:
            while True:
                try:
                    images = await forming.next(task)
                except TimeoutError:
                    yield KEEPALIVE_COMMENT
                    continue
                if images is None:
                    break
                yield event("progress", await service.convert(pictures.png, images, query.scale), forming.step)
            yield event("done", await picture(asked, query.scale, task.result()), steps, **facts)
        except ClientDisconnect:
            return
        except EXPECTED as error:
            yield _event("error", {"error": answer(error).line})
        finally:
            task.cancel()

    return router


def _event(kind: str, data: dict[str, Any]) -> bytes:
    return format_sse_event(event=kind, data_str=json.dumps(data))


class Forming:
    """The images of a request while they form."""

    def __init__(self, model: Model, work: Work, every: int) -> None:
        """every: number of steps between estimates, 0 for about EVENTS of them in all."""
        each = math.ceil(work.evaluations / work.steps)
        steps = every or max(1, round(work.steps / EVENTS))
        self.work = replace(work, progress=self._add, every=steps * each)
        self.step = 0
        """Number of steps done, on average if the images do not form together."""
        self._images = np.full((work.count, *model.shape[1:], model.shape[0]), 128, np.uint8)  # grey: not begun
        self._estimates = deque[tuple[int, int, NDArray[np.uint8]]]()
        """Those that were not sent yet: step, first image, images."""
        self._added = asyncio.Event()

    def _add(self, start: int, done: int, x_0_hat: NDArray[np.float32]) -> None:
        count, steps, evaluations = self.work.count, self.work.steps, self.work.evaluations
        ends = done == evaluations
        if ends and start + len(x_0_hat) == count:
            return  # the images themselves follow
        if ends or done % self.work.every == 0:
            total = start * evaluations + len(x_0_hat) * done  # they form in order
            # As bytes: x_0_hat would keep the state of its whole batch in memory, twelve times as many for each image.
            self._estimates.append((total * steps // (count * evaluations), start, to_uint8(x_0_hat)))
            while len(self._estimates) > 1 and sum(each.nbytes for *_, each in self._estimates) > MAX_UNSENT:
                self._draw()
            self._added.set()

    def _draw(self) -> None:
        self.step, start, images = self._estimates.popleft()
        self._images[start : start + len(images)] = images

    async def next(self, task: asyncio.Task[Any]) -> NDArray[np.uint8] | None:
        """Wait for the next estimate, and return all images (B, H, W, C); or None once the task has ended.

        Raises TimeoutError after KEEP_ALIVE_SECONDS.
        """
        added = asyncio.create_task(self._added.wait())
        try:
            done, _ = await asyncio.wait({task, added}, timeout=KEEP_ALIVE_SECONDS, return_when=asyncio.FIRST_COMPLETED)
        finally:
            added.cancel()
        if not done:
            raise TimeoutError
        if not self._estimates:
            return None
        self._draw()
        if not self._estimates:
            self._added.clear()
        return self._images.copy()
