"""The application: its routes, error responses and middleware."""

from fastapi import FastAPI, Response, Security
from fastapi.security import HTTPBearer
from prometheus_client import CONTENT_TYPE_LATEST

from deploy.service import images, inference, middleware, page
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
        dependencies=[Security(HTTPBearer(auto_error=False))] if service.keys else None,  # for the description alone
        telemetry={"tracing": False, "metrics": False, "logs": False},  # FastAPI's own; telemetry.py has ours
    )
    middleware.add(app, service)
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
