"""Every error as {"error": "one line"}, as the Open Inference Protocol defines."""

import logging
from collections.abc import Mapping
from typing import Any, NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deploy.service import protocol
from deploy.service.batching import QueueFull, RunFailed, Stopping

log = logging.getLogger("ddpm.service")
EXPECTED = HTTPException, protocol.Invalid, RequestValidationError, ClientDisconnect, QueueFull, Stopping, RunFailed
"""Errors with a response of their own."""
STATUSES = {
    400: "The request is invalid.",
    401: "The key is missing or unknown.",
    404: "The model or its version is unknown.",
    408: "The body did not arrive in time.",
    413: "The body is too large, or becomes so when decompressed.",
    415: "The encoding of the body is unknown.",
    500: "The model failed.",
    503: "The service is busy, or shuts down; Retry-After has seconds.",
    504: "It took too long.",
}


class Error(BaseModel):
    error: str


def described(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The errors of a route, for its OpenAPI document."""
    content = {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}}  # whatever the route returns
    return {status: {"description": STATUSES[status], "content": content} for status in statuses}


class Answer(NamedTuple):
    """What a client is told of an error."""

    status: int
    line: str
    headers: Mapping[str, str] | None = None


UNEXPECTED = Answer(500, "internal error; see the log of the service")


def answer(error: Exception) -> Answer:
    """The answer to an error; what is the service's fault is logged."""
    match error:
        case HTTPException(status_code=404, detail="Not Found"):  # Starlette's
            return Answer(404, "no such path; /docs lists those of this service")
        case HTTPException(status_code=405, headers={"Allow": allowed}):
            return Answer(405, f"this path does not have the method; use {allowed}", error.headers)
        case HTTPException():
            return Answer(error.status_code, _line(error.detail), error.headers)
        case protocol.Invalid():
            return Answer(400, _line(str(error)))
        case RequestValidationError():
            return Answer(400, _line(protocol.describe(error.errors())))
        case ClientDisconnect():
            return Answer(400, "the connection closed before the whole body arrived")
        case QueueFull():
            return Answer(503, str(error), {"Retry-After": f"{error.seconds:.0f}"})
        case Stopping():
            return Answer(503, "the service is shutting down; try again", {"Retry-After": "1"})
        case RunFailed():
            log.error("request failed: %s", error)
            return Answer(500, f"the model failed: {error}")
    return UNEXPECTED


def _line(text: str) -> str:
    """A text as one line, of which a client may have written parts."""
    return " ".join(text.split())[:500]


def answer_errors(app: FastAPI) -> None:
    """Add the handlers."""

    async def respond(_: Request, error: Exception) -> Response:
        status, line, headers = answer(error)
        return JSONResponse({"error": line}, status, headers)

    for kind in (*EXPECTED, Exception):  # Starlette raises other errors again, so that their traceback is logged
        app.add_exception_handler(kind, respond)
