"""What the routes have in common: receiving a body, and computing while the client stays connected."""

import asyncio
import re
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from dataclasses import replace
from typing import Any

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect, HTTPConnection

from deploy.service import compression
from deploy.service.models import Model
from deploy.service.served import UnknownModel
from deploy.service.state import Service
from deploy.service.work import Feeds, Work

MAX_DISCARDED = 2**26
"""Up to this size, a body that is too large is read to its end before it is refused."""


def find(service: Service, name: str, version: str | None = None) -> Model:
    """The model with a name, and an alias or version, by default the first with the name; raises HTTPException 404.

    A request keeps it even if another is loaded meanwhile.
    """
    try:
        return service.models.find(name, version)
    except UnknownModel as error:
        raise HTTPException(404, str(error)) from None


def chosen(service: Service, text: str | None) -> Model:
    """The model of a query, as NAME, NAME@ALIAS or NAME/VERSION, by default the first; raises HTTPException 404."""
    return service.models.first if text is None else find(service, *re.split("[@/]", text, maxsplit=1))


async def compute(service: Service, request: Request, model: Model, work: Work) -> Feeds:
    """The model's outputs, unless the client leaves or it takes too long; the work then ends."""
    if service.observe:
        work = replace(work, observe=service.observe(model.name, model.version))
    try:
        async with asyncio.timeout(service.max_seconds):
            results = await while_connected(request, service.batcher.submit(model.run, work, sender(request)))
    except TimeoutError:
        line = f"not done within {service.max_seconds:g} s; ask for fewer images or steps"
        raise HTTPException(504, line) from None
    service.metrics.images.labels(model.name).inc(work.count)
    return results


async def while_connected(request: Request, work: Coroutine[Any, Any, Feeds]) -> Feeds:
    """Await some work; if the client disconnects, cancel it and raise ClientDisconnect."""

    async def disconnected() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    doing, gone = asyncio.create_task(work), asyncio.create_task(disconnected())
    try:
        await asyncio.wait({doing, gone}, return_when=asyncio.FIRST_COMPLETED)
        if doing.done():
            return doing.result()
        raise ClientDisconnect
    finally:
        doing.cancel()
        gone.cancel()


def sender(request: HTTPConnection) -> str:
    """Who shares the service with others: the name of the client's key or, without keys, its address."""
    user = request.scope.get("user")
    if user is not None and user.is_authenticated:
        return str(user.display_name)
    return request.client.host if request.client else ""


def unchanged(request: Request, etag: str) -> bool:
    """Whether the client has what an ETag names: a list of them, or *, compared weakly (RFC 9110, section 13.1.2)."""
    given = ",".join(request.headers.getlist("If-None-Match")).split(",")
    return any(each.strip().removeprefix("W/") in ("*", etag.removeprefix("W/")) for each in given)


@asynccontextmanager
async def received(request: Request, limit: int, service: Service) -> AsyncGenerator[bytearray]:
    """The body of a request, decompressed, which counts as buffered until the context ends, when the request is done.

    Raises HTTPException 413 as soon as it exceeds `limit` bytes, compressed or not, 408 if it arrives too slowly, 415
    if its encoding is unknown, and 503 if all bodies and those of this client together exceed the service's limit;
    Invalid if it cannot be decompressed.
    """
    if {"content-length", "transfer-encoding"} <= set(request.headers.keys()):
        raise HTTPException(400, "both Content-Length and Transfer-Encoding are given", {"Connection": "close"})
    body, size, declared = bytearray(), 0, int(request.headers.get("Content-Length", "0"))
    counted, buffered, client = 0, service.buffered, sender(request)

    def add(chunk: bytes) -> None:
        nonlocal counted
        if buffered.total() + buffered[client] + 2 * len(chunk) > service.max_buffered:
            line = "too many bytes of requests are being processed; try again in 1 s"
            raise HTTPException(503, line, {"Retry-After": "1", "Connection": "close"})
        buffered[client] += len(chunk)
        counted += len(chunk)
        body.extend(chunk)

    try:
        async with asyncio.timeout(service.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    add(chunk)
                elif not limit < declared <= MAX_DISCARDED:  # else the client would not read the response
                    break
        if size > limit:
            raise HTTPException(413, f"the request body exceeds {limit} bytes; send fewer images per request")
        if encoding := compression.sent(request.headers):
            sent, body = body, bytearray()
            pieces = compression.pieces(sent, encoding)
            while (piece := await service.convert(next, pieces, None)) is not None:
                if len(body) + len(piece) > limit:
                    line = f"the request body exceeds {limit} bytes when decompressed; send fewer images per request"
                    raise HTTPException(413, line)
                add(piece)
            buffered[client] -= size
            counted -= size
            sent.clear()
        yield body
    except TimeoutError:
        line = f"the request body did not arrive within {service.body_seconds:g} s"
        raise HTTPException(408, line, {"Connection": "close"}) from None
    finally:
        buffered[client] -= counted
        buffered += Counter()  # forget those without any
