"""The routes and the error responses."""

import asyncio
import logging
import secrets
import time
from collections import Counter
from collections.abc import AsyncGenerator, Callable, Coroutine, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Annotated, Any, TypeVar

from fastapi import Depends, FastAPI, HTTPException, Query, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.service import pictures, protocol
from deploy.service.batching import Batcher, QueueFull, RunFailed, Stopping, Work
from deploy.service.metrics import Metrics
from deploy.service.models import Feeds, Model, Served

T = TypeVar("T")
VERSION = "1"
MAX_DISCARDED = 2**26
"""Up to this size, a body that is too large is read to its end before it is refused."""
log = logging.getLogger("ddpm.service")


@dataclass
class Service:
    """State shared by the routes."""

    name: str
    served: Served
    batcher: Batcher
    metrics: Metrics
    max_images: int = 64
    max_body: int = 16 * 2**20
    body_seconds: float = 10.0
    """Time for the body of a request to arrive."""
    max_seconds: float = 300.0
    """Time to compute a response."""
    max_buffered: int = 128 * 2**20
    """Bytes of bodies at a time, of which a client may use what it leaves to others."""
    draining: bool = False
    """After SIGTERM or SIGINT: readiness checks fail, and each response closes its connection."""
    buffered: Counter[str] = field(default_factory=Counter)
    """Bytes of bodies whose requests are not done, by client."""
    threads: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 2, "conversion"))
    """For JSON and PNG. Few, since each may need several times the memory of what it converts."""

    async def convert(self, call: Callable[..., T], *arguments: Any) -> T:
        """Call a function in one of these threads."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, call, *arguments)


def create(service: Service) -> FastAPI:
    """Create the application."""
    app = FastAPI(title="ddpm", version=VERSION, docs_url=None, redoc_url=None, redirect_slashes=False)
    app.add_middleware(Instrumentation, service=service)
    _answer_errors(app)

    def current(request: Request) -> Model:
        """The model named in the path; the request keeps it even if another one is loaded meanwhile."""
        model, asked = service.served.current, request.path_params
        if asked["name"] != service.name:
            raise HTTPException(404, f"model {asked['name']}: unknown; this service has {service.name}")
        if asked.get("version", model.version) != model.version:
            raise HTTPException(404, f"version {asked['version']}: not served; the current version is {model.version}")
        return model

    Current = Annotated[Model, Depends(current)]
    newest, numbered = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"

    async def compute(request: Request, model: Model, work: Work) -> Feeds:
        """The model's outputs, unless the client leaves or it takes too long; the work then ends."""
        try:
            async with asyncio.timeout(service.max_seconds):
                return await while_connected(request, service.batcher.submit(model.run, work, sender(request)))
        except TimeoutError:
            line = f"not done within {service.max_seconds:g} s; ask for fewer images or steps"
            raise HTTPException(504, line) from None

    @app.get("/v2")
    @app.get("/v2/")
    async def server() -> dict[str, Any]:
        return {"name": "ddpm", "version": VERSION, "extensions": []}

    @app.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @app.get("/v2/health/ready")
    async def ready() -> Response:
        # The specification calls the field "live" here too; "ready" is what clients expect.
        return JSONResponse({"live": True, "ready": not service.draining}, 503 if service.draining else 200)

    @app.get(f"{newest}/ready")
    @app.get(f"{numbered}/ready")
    async def model_ready(_: Current) -> Response:
        body = {"name": service.name, "ready": not service.draining}
        return JSONResponse(body, 503 if service.draining else 200)

    @app.get(newest)
    @app.get(numbered)
    async def metadata(model: Current) -> dict[str, Any]:
        return protocol.metadata(service.name, model)

    @app.post(f"{newest}/infer")
    @app.post(f"{numbered}/infer")
    async def infer(request: Request, model: Current) -> Response:
        service.batcher.check_room(sender(request))
        limit = min(service.max_body, protocol.max_body(model, service.max_images))
        async with received(request, limit, service) as body:
            asked = await service.convert(protocol.parse, body, model, service.max_images)
            body.clear()
            results = await compute(request, model, asked.work)
            answer = await service.convert(protocol.answer, asked, service.name, model, results)
        return Response(answer, media_type="application/json")

    @app.get("/images")
    async def images(request: Request, query: Annotated[pictures.ImageQuery, Query()]) -> Response:
        for name in (given := request.query_params):
            if len(given.getlist(name)) > 1:
                raise protocol.Invalid(f"{name}: given twice; remove one")
        model, seed = service.served.current, query.seed
        headers = {"X-Model-Version": model.version, "Cache-Control": "no-store"}
        if seed is None:
            seed = secrets.randbelow(2**32)
        else:  # unchanged until the model changes, which the ETag tells in one round trip
            headers |= {"Cache-Control": "no-cache", "ETag": pictures.etag(query, model)}
        headers["X-Seed"] = str(seed)
        work = pictures.work(query, seed, model, service.max_images)
        if "ETag" in headers and headers["ETag"] in request.headers.get("If-None-Match", ""):
            return Response(status_code=304, headers=headers)
        results = await compute(request, model, work)
        png = await service.convert(pictures.png, results["images"], query.scale)
        return Response(png, media_type="image/png", headers=headers)

    @app.get("/metrics")
    async def metrics() -> Response:
        service.metrics.waiting.set(service.batcher.waiting)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


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


def _answer_errors(app: FastAPI) -> None:
    """Return every error as {"error": "one line"}, as the protocol defines."""

    async def answer(_: Request, error: Exception) -> Response:
        headers: Mapping[str, str] | None = None
        match error:
            case StarletteHTTPException():
                status, line, headers = error.status_code, error.detail, error.headers
            case protocol.Invalid():
                status, line = 400, str(error)
            case RequestValidationError():
                status, line = 400, protocol.describe(error.errors())
            case ClientDisconnect():
                status, line = 400, "the connection closed before the whole body arrived"
            case QueueFull():
                status, line, headers = 503, str(error), {"Retry-After": f"{error.seconds:.0f}"}
            case Stopping():
                status, line, headers = 503, "the service is shutting down; try again", {"Retry-After": "1"}
            case RunFailed():
                status, line = 500, f"the model failed: {error}"
                log.error("request failed: %s", error)
            case _:  # Starlette raises it again, so that its traceback is logged
                status, line = 500, "internal error; see the log of the service"
        return JSONResponse({"error": line}, status, headers)

    answered = (
        StarletteHTTPException,
        protocol.Invalid,
        RequestValidationError,
        ClientDisconnect,
        QueueFull,
        Stopping,
        RunFailed,
    )
    for kind in (*answered, Exception):
        app.add_exception_handler(kind, answer)


class Instrumentation:
    """Middleware: counts and times responses, answers HEAD, and closes connections while the service drains."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.perf_counter(), 500
        if scope["method"] == "HEAD":  # the server leaves the body out
            scope = {**scope, "method": "GET"}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._service.draining:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            await self._app(scope, receive, answer)
        finally:
            path, metrics = getattr(scope.get("route"), "path", "other"), self._service.metrics
            metrics.requests.labels(path, str(status)).inc()
            metrics.seconds.labels(path).observe(time.perf_counter() - began)
