"""Every error as {"error": "one line"}, as the Open Inference Protocol defines."""

import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deploy.service import protocol
from deploy.service.batching import QueueFull, RunFailed, Stopping

log = logging.getLogger("ddpm.service")
STATUSES = {
    400: "The request is invalid.",
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
    return {status: {"model": Error, "description": STATUSES[status]} for status in statuses}


def answer_errors(app: FastAPI) -> None:
    """Add the handlers."""

    async def answer(request: Request, error: Exception) -> Response:
        headers: Mapping[str, str] | None = None
        match error:
            case HTTPException(status_code=404, detail="Not Found"):  # Starlette's
                status, line = 404, "no such path; /docs lists those of this service"
            case HTTPException(status_code=405):
                allowed = (error.headers or {}).get("Allow", "")
                status, line, headers = 405, f"{request.method[:20]}: not allowed here; use {allowed}", error.headers
            case HTTPException():
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
        HTTPException,
        protocol.Invalid,
        RequestValidationError,
        ClientDisconnect,
        QueueFull,
        Stopping,
        RunFailed,
    )
    for kind in (*answered, Exception):
        app.add_exception_handler(kind, answer)
