"""The application: its routes, error responses and middleware."""

import time

from fastapi import FastAPI, Response
from prometheus_client import CONTENT_TYPE_LATEST
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from deploy.service import images, inference, page
from deploy.service.errors import answer_errors
from deploy.service.openapi import document
from deploy.service.state import Service


def create(service: Service) -> FastAPI:
    """Create the application."""
    app = FastAPI(
        title="ddpm",
        description="Images from a diffusion model, and the Open Inference Protocol, version 2.",
        version=inference.VERSION,
        docs_url=None,  # it would load files from elsewhere
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_middleware(Instrumentation, service=service)
    answer_errors(app)
    app.include_router(inference.routes(service))
    app.include_router(images.routes(service))
    app.include_router(page.routes())

    document(app, service)

    @app.get("/metrics", response_class=Response, responses={200: {"content": {"text/plain": {}}}})
    async def metrics() -> Response:
        """Metrics in the text format of Prometheus."""
        service.metrics.waiting.set(service.batcher.waiting)
        return Response(service.metrics.text(), media_type=CONTENT_TYPE_LATEST)

    return app


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
