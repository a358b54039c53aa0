"""The routes of the Open Inference Protocol, version 2."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse

from deploy.service import protocol
from deploy.service.models import Model
from deploy.service.requests import compute, find, received, sender
from deploy.service.state import Service

VERSION = "1"


def routes(service: Service) -> APIRouter:
    """Create the routes."""
    router = APIRouter()

    def current(request: Request) -> Model:
        """The model named in the path."""
        return find(service, request.path_params["name"], request.path_params.get("version"))

    Current = Annotated[Model, Depends(current)]
    newest, numbered = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"

    @router.get("/v2")
    @router.get("/v2/")
    async def server() -> dict[str, Any]:
        return {"name": "ddpm", "version": VERSION, "extensions": []}

    @router.get("/v2/health/live")
    async def live() -> dict[str, bool]:
        return {"live": True}

    @router.get("/v2/health/ready")
    async def ready() -> Response:
        # The specification calls the field "live" here too; "ready" is what clients expect.
        return JSONResponse({"live": True, "ready": not service.draining}, 503 if service.draining else 200)

    @router.get(f"{newest}/ready")
    @router.get(f"{numbered}/ready")
    async def model_ready(_: Current) -> Response:
        body = {"name": service.name, "ready": not service.draining}
        return JSONResponse(body, 503 if service.draining else 200)

    @router.get(newest)
    @router.get(numbered)
    async def metadata(model: Current) -> dict[str, Any]:
        return protocol.metadata(service.name, model, service.max_images)

    @router.post(f"{newest}/infer")
    @router.post(f"{numbered}/infer")
    async def infer(request: Request, model: Current) -> Response:
        service.batcher.check_room(sender(request))
        limit = min(service.max_body, protocol.max_body(model, service.max_images))
        async with received(request, limit, service) as body:
            asked = await service.convert(protocol.parse, body, model, service.max_images)
            body.clear()
            results = await compute(service, request, model, asked.work)
            answer = await service.convert(protocol.answer, asked, service.name, model, results)
        return Response(answer, media_type="application/json")

    return router
