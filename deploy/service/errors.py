"""Every error as {"error": "one line"}, as the Open Inference Protocol defines."""

import logging
from collections.abc import Mapping
from typing import NamedTuple

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deploy.service import protocol
from deploy.service.batching import QueueFull, RunFailed, Stopping

log = logging.getLogger("ddpm.service")
EXPECTED = HTTPException, protocol.Invalid, RequestValidationError, ClientDisconnect, QueueFull, Stopping, RunFailed
"""Errors with a response of their own."""


class Answer(NamedTuple):
    """What a client is told of an error."""

    status: int
    line: str
    headers: Mapping[str, str] | None = None


def answer(error: Exception) -> Answer:
    """The answer to an error; what is the service's fault is logged."""
    match error:
        case HTTPException():
            return Answer(error.status_code, error.detail, error.headers)
        case protocol.Invalid():
            return Answer(400, str(error))
        case RequestValidationError():
            return Answer(400, protocol.describe(error.errors()))
        case ClientDisconnect():
            return Answer(400, "the connection closed before the whole body arrived")
        case QueueFull():
            return Answer(503, str(error), {"Retry-After": f"{error.seconds:.0f}"})
        case Stopping():
            return Answer(503, "the service is shutting down; try again", {"Retry-After": "1"})
        case RunFailed():
            log.error("request failed: %s", error)
            return Answer(500, f"the model failed: {error}")
    return Answer(500, "internal error; see the log of the service")


def answer_errors(app: FastAPI) -> None:
    """Add the handlers."""

    async def respond(_: Request, error: Exception) -> Response:
        status, line, headers = answer(error)
        return JSONResponse({"error": line}, status, headers)

    for kind in (*EXPECTED, Exception):  # Starlette raises other errors again, so that their traceback is logged
        app.add_exception_handler(kind, respond)
