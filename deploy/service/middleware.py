"""What every request passes before it reaches a route."""

import logging
import re
import time

from asgi_correlation_id import CorrelationIdMiddleware
from fastapi import FastAPI, Response
from fastapi.responses import JSONResponse
from starlette.authentication import AuthenticationError
from starlette.datastructures import Headers
from starlette.middleware.authentication import AuthenticationMiddleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import HTTPConnection
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.service import logs
from deploy.service.errors import UNEXPECTED
from deploy.service.keys import UnknownKey
from deploy.service.requests import sender
from deploy.service.state import Service

log = logging.getLogger("ddpm.service")
REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
"""Ids of requests that clients may choose: they cannot forge a line of the log."""
ASKED = (
    "Authorization",
    "Content-Encoding",
    "Content-Type",
    "If-None-Match",
    "Inference-Header-Content-Length",
    "Traceparent",
    "Tracestate",
    "X-Request-ID",
)
"""Headers that pages of other origins may send."""
SHOWN = ("ETag", "Inference-Header-Content-Length", "Retry-After", "X-Model-Version", "X-Request-ID", "X-Seed")
"""Headers that they may read."""


def add(app: FastAPI, service: Service) -> None:
    """Add the middleware to an application. From the outside to the routes:

    1. telemetry, if on: everything below is within the span of the request
    2. the id of the request, which is a header of every response, and in every line of the log
    3. counting, timing and logging
    4. CORS: answers preflights, which have no key, and lets pages read errors too
    5. keys: refuses before the body is read; then the client has a name
    6. errors that nothing else answers
    """
    app.add_middleware(Unexpected)
    if service.keys:

        def refuse(_: HTTPConnection, error: AuthenticationError) -> Response:
            unknown = isinstance(error, UnknownKey)
            service.metrics.keys.labels("unknown" if unknown else "missing").inc()
            kind = 'Bearer error="invalid_token"' if unknown else "Bearer"
            return JSONResponse({"error": str(error)}, 401, {"WWW-Authenticate": kind})

        app.add_middleware(AuthenticationMiddleware, backend=service.keys, on_error=refuse)
    if service.cors:
        app.add_middleware(Cors, service.cors, ("GET", "POST"), ASKED, expose_headers=SHOWN)
    app.add_middleware(Instrumentation, service=service)
    app.add_middleware(CorrelationIdMiddleware, validator=lambda given: bool(REQUEST_ID.fullmatch(given)))


class Cors(CORSMiddleware):
    """CORS with errors in JSON."""

    def preflight_response(self, request_headers: Headers) -> Response:
        answer = super().preflight_response(request_headers)
        if answer.status_code == 200:
            return answer
        headers = {name: value for name, value in answer.headers.items() if not name.startswith("content-")}
        return JSONResponse({"error": f"{bytes(answer.body).decode()}; --cors lists the origins"}, 400, headers)


class Instrumentation:
    """Counts, times and logs responses, answers HEAD, and closes connections while the service drains."""

    def __init__(self, app: ASGIApp, service: Service) -> None:
        self._app, self._service = app, service

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began, status = time.perf_counter(), 500
        asked = {**scope, "method": "GET"} if scope["method"] == "HEAD" else scope  # the server leaves the body out

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                if self._service.draining:
                    message["headers"] = [*message["headers"], (b"connection", b"close")]
            await send(message)

        try:
            await self._app(asked, receive, answer)
        finally:
            seconds = time.perf_counter() - began
            path, metrics = getattr(asked.get("route"), "path", "other"), self._service.metrics
            metrics.requests.labels(path, str(status)).inc()
            metrics.seconds.labels(path).observe(seconds)
            if self._service.log_requests:
                logs.request({**asked, "method": scope["method"]}, sender(HTTPConnection(asked)), status, seconds)


class Unexpected:
    """Answers errors that no handler expects, and logs their traceback. Starlette would do so outside of all others."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        began = False

        async def answer(message: Message) -> None:
            nonlocal began
            began = True
            await send(message)

        try:
            await self._app(scope, receive, answer)
        except Exception:
            if began:  # the server logs it, and closes the connection
                raise
            log.exception("internal error")
            await JSONResponse({"error": UNEXPECTED.line}, UNEXPECTED.status)(scope, receive, send)
