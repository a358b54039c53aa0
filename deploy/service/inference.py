"""The routes of the Open Inference Protocol, version 2."""

from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request, Response
from fastapi.responses import JSONResponse
from pydantic import BaseModel

from deploy.service import compression, inputs, outputs, protocol
from deploy.service.errors import STATUSES, described
from deploy.service.models import Model
from deploy.service.requests import compute, find, received, sender
from deploy.service.state import Service

VERSION = "1"
JSON_LENGTH: dict[str, Any] = {
    "description": "The bytes of JSON that a body with binary data begins with, before any compression.",
    "schema": {"type": "integer"},
}
INFERENCE: dict[int | str, dict[str, Any]] = {
    200: {
        "model": protocol.InferenceResponse,
        "content": {"application/octet-stream": {}},
        "headers": {protocol.JSON_LENGTH: JSON_LENGTH},
        "description": "The outputs; as application/octet-stream if one is binary: the JSON, then the binary data.",
    },
    **described(*STATUSES),
}
BODY: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "JSON, or the JSON and then binary data.",
        "content": {
            "application/json": {"schema": {"$ref": "#/components/schemas/InferenceRequest"}},
            "application/octet-stream": {},
        },
    },
    "parameters": [
        {"name": protocol.JSON_LENGTH, "in": "header", **JSON_LENGTH},
        {
            "name": "Content-Encoding",
            "in": "header",
            "description": "How the body is compressed.",
            "schema": {"enum": list(compression.WINDOW_BITS), "type": "string"},
        },
        {
            "name": "Accept-Encoding",
            "in": "header",
            "description": "How the response may be compressed: gzip or deflate.",
            "schema": {"type": "string"},
        },
    ],
}


def readiness(body: type[BaseModel]) -> dict[int | str, dict[str, Any]]:
    """The responses of a route that tells whether something is ready."""
    return {200: {"model": body}, 503: {"model": body, "description": "Not ready."}}


def routes(service: Service) -> APIRouter:
    """Create the routes."""
    router = APIRouter()

    def current(request: Request) -> Model:
        """The model in the path."""
        return find(service, request.path_params["name"], request.path_params.get("version"))

    Current = Annotated[Model, Depends(current)]
    newest, numbered = "/v2/models/{name}", "/v2/models/{name}/versions/{version}"

    @router.get("/v2", response_model=protocol.ServerFacts)
    @router.get("/v2/", include_in_schema=False)
    async def server() -> dict[str, Any]:
        """The name of the service, and the extensions of the protocol that it has."""
        return {"name": "ddpm", "version": VERSION, "extensions": protocol.EXTENSIONS}

    @router.get("/v2/health/live", response_model=protocol.Live)
    async def live() -> dict[str, bool]:
        """Whether the service answers."""
        return {"live": True}

    @router.get("/v2/health/ready", responses=readiness(protocol.Ready))
    async def ready() -> Response:
        """Whether the service should get requests: not once it shuts down."""
        # The specification calls the field "live" here too; "ready" is what clients expect.
        return JSONResponse({"live": True, "ready": not service.draining}, 503 if service.draining else 200)

    @router.get("/v2/models", response_model=list[protocol.IndexedModel])
    async def index() -> list[dict[str, Any]]:
        """The models of this service."""
        return service.models.index(not service.draining)

    @router.get(f"{newest}/ready", responses=readiness(protocol.ModelReady) | described(404))
    @router.get(f"{numbered}/ready", responses=readiness(protocol.ModelReady) | described(404))
    async def model_ready(model: Current) -> Response:
        """Whether a model should get requests."""
        body = {"name": model.name, "ready": not service.draining}
        return JSONResponse(body, 503 if service.draining else 200)

    @router.get(newest, response_model=protocol.ModelFacts, responses=described(404))
    @router.get(numbered, response_model=protocol.ModelFacts, responses=described(404))
    async def metadata(model: Current) -> dict[str, Any]:
        """The inputs and outputs of a model, its classes, defaults and limits."""
        return protocol.metadata(model, service.models.versions(model.name), service.max_images)

    @router.post(f"{newest}/infer", responses=INFERENCE, openapi_extra=BODY)
    @router.post(f"{numbered}/infer", responses=INFERENCE, openapi_extra=BODY)
    async def infer(request: Request, model: Current) -> Response:
        """Run a model on tensors in JSON or, with the extension of the protocol, binary data."""
        service.batcher.check_room(sender(request))
        limit = min(service.max_body, inputs.max_body(model, service.max_images))
        json_length, encoding = request.headers.get(protocol.JSON_LENGTH), compression.accepted(request.headers)
        async with received(request, limit, service) as body:
            asked = await service.convert(inputs.parse, body, json_length, model, service.max_images)
            body.clear()
            results = await compute(service, request, model, asked.work)
            answer = await service.convert(outputs.answer, asked, model.name, model, results, encoding)
        return Response(answer.body, media_type=answer.media_type, headers=answer.headers)

    return router
