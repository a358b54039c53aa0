"""GET /images: grids of images as PNG."""

import secrets
from typing import Annotated, Any

from fastapi import APIRouter, Query, Request, Response

from deploy.service import pictures, protocol
from deploy.service.errors import described
from deploy.service.requests import compute
from deploy.service.state import Service

PICTURE: dict[int | str, dict[str, Any]] = {
    200: {"content": {"image/png": {}}, "description": "A PNG; X-Seed and X-Model-Version tell what made it."},
    304: {"description": "The picture is that of If-None-Match."},
    **described(400, 500, 503, 504),
}


def routes(service: Service) -> APIRouter:
    """Create the routes."""
    router = APIRouter()

    @router.get("/images", response_class=Response, responses=PICTURE)
    async def images(request: Request, query: Annotated[pictures.ImageQuery, Query()]) -> Response:
        """A grid of generated images."""
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
        results = await compute(service, request, model, work)
        png = await service.convert(pictures.png, results["images"], query.scale)
        return Response(png, media_type="image/png", headers=headers)

    return router
