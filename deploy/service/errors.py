"""Every error as {"error": "one line"}, as the Open Inference Protocol defines."""

import logging
from collections.abc import Mapping

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect

from deploy.service import protocol
from deploy.service.batching import QueueFull, RunFailed, Stopping

log = logging.getLogger("ddpm.service")
UNEXPECTED = "internal error; see the log of the service"


def answer_errors(app: FastAPI) -> None:
    """Add the handlers."""

    async def answer(_: Request, error: Exception) -> Response:
        headers: Mapping[str, str] | None = None
        match error:
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
            case _:  # of middleware; Starlette raises it again, so that its traceback is logged
                status, line = 500, UNEXPECTED
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
