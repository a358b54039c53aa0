"""What the routes have in common: receiving a body, and computing while the client stays connected."""

import asyncio
from collections import Counter
from collections.abc import AsyncGenerator, Coroutine
from contextlib import asynccontextmanager
from typing import Any

from fastapi import HTTPException, Request
from starlette.requests import ClientDisconnect

from deploy.service.models import Model
from deploy.service.state import Service
from deploy.service.work import Feeds, Work

MAX_DISCARDED = 2**26
"""Up to this size, a body that is too large is read to its end before it is refused."""


def find(service: Service, name: str, version: str | None = None) -> Model:
    """The model with a name; raises HTTPException 404. A request keeps it even if another is loaded meanwhile."""
    model = service.served.current
    if name != service.name:
        raise HTTPException(404, f"model {name}: unknown; this service has {service.name}")
    if version not in (None, model.version):
        raise HTTPException(404, f"version {version}: not served; the current version is {model.version}")
    return model


async def compute(service: Service, request: Request, model: Model, work: Work) -> Feeds:
    """The model's outputs, unless the client leaves or it takes too long; the work then ends."""
    try:
        async with asyncio.timeout(service.max_seconds):
            return await while_connected(request, service.batcher.submit(model.run, work, sender(request)))
    except TimeoutError:
        line = f"not done within {service.max_seconds:g} s; ask for fewer images or steps"
        raise HTTPException(504, line) from None


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


def sender(request: Request) -> str:
    """Who shares the service with others: the address of the client."""
    return request.client.host if request.client else ""


@asynccontextmanager
async def received(request: Request, limit: int, service: Service) -> AsyncGenerator[bytearray]:
    """The body of a request, which counts as buffered until the context ends, when the request is done.

    Raises HTTPException 413 as soon as it exceeds `limit` bytes, 408 if it arrives too slowly, and 503 if all bodies
    and those of this client together exceed the service's limit.
    """
    if {"content-length", "transfer-encoding"} <= set(request.headers.keys()):
        raise HTTPException(400, "both Content-Length and Transfer-Encoding are given", {"Connection": "close"})
    body, size, declared = bytearray(), 0, int(request.headers.get("Content-Length", "0"))
    counted, buffered, client = 0, service.buffered, sender(request)
    try:
        async with asyncio.timeout(service.body_seconds):
            async for chunk in request.stream():
                size += len(chunk)
                if size <= limit:
                    if buffered.total() + buffered[client] + 2 * len(chunk) > service.max_buffered:
                        line = "too many bytes of requests are being processed; try again in 1 s"
                        raise HTTPException(503, line, {"Retry-After": "1", "Connection": "close"})
                    buffered[client] += len(chunk)
                    counted += len(chunk)
                    body += chunk
                elif not limit < declared <= MAX_DISCARDED:  # else the client would not read the response
                    break
        if size > limit:
            raise HTTPException(413, f"the request body exceeds {limit} bytes; send fewer images per request")
        yield body
    except TimeoutError:
        line = f"the request body did not arrive within {service.body_seconds:g} s"
        raise HTTPException(408, line, {"Connection": "close"}) from None
    finally:
        buffered[client] -= counted
        buffered += Counter()  # forget those without any
