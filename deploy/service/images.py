"""GET /images: grids of images as PNG."""

import secrets
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from deploy.service import pictures, protocol
from deploy.service.requests import chosen, compute
from deploy.service.state import Service


def routes(service: Service) -> APIRouter:
    """Create the routes."""
    router = APIRouter()

    @router.get("/images")
    async def images(request: Request, query: Annotated[pictures.ImageQuery, Query()]) -> Response:
        for name in (given := request.query_params):
            if len(given.getlist(name)) > 1:
                raise protocol.Invalid(f"{name}: given twice; remove one")
        model, seed = chosen(service, query.model), query.seed
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
