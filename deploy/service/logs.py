"""The log, as text or JSON, with the id of the request that a line is about."""

import logging
from collections.abc import Callable
from urllib.parse import quote

from asgi_correlation_id import correlation_id
from pythonjsonlogger.core import RESERVED_ATTRS
from pythonjsonlogger.json import JsonFormatter
from starlette.types import Scope

log = logging.getLogger("ddpm.service")
PROBES = ("/v2/health/", "/metrics")
"""Asked every few seconds, and therefore logged only if they fail."""


class Text(logging.Formatter):
    """One line of text, which ends with the id of the request, if any."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 logging's
        found = getattr(record, "request_id", None)
        return super().formatMessage(record) + (f" [{found}]" if found else "")


class Ids(logging.Filter):
    """Adds `request_id`, and `trace_id` if there is one, to the records of a request."""

    def __init__(self, trace_id: Callable[[], str]) -> None:
        super().__init__()
        self._trace_id = trace_id

    def filter(self, record: logging.LogRecord) -> bool:
        for name, value in (("request_id", correlation_id.get()), ("trace_id", self._trace_id())):
            if value:
                setattr(record, name, value)
        return True


def handler(form: str, trace_id: Callable[[], str] = str) -> logging.Handler:
    """A handler that writes to the standard error.

    Args:
        form: `text` or `json`: an object per line.
        trace_id: returns the id of the current trace; empty if there is none.
    """
    made = logging.StreamHandler()
    made.addFilter(Ids(trace_id))
    if form == "json":
        names, others = {"levelname": "level", "name": "logger"}, [*RESERVED_ATTRS, "color_message"]
        fields = ["levelname", "name", "message"]
        made.setFormatter(JsonFormatter(fields, rename_fields=names, timestamp="time", reserved_attrs=others))
    else:
        made.setFormatter(Text("%(asctime)s %(levelname)s %(message)s"))
    return made


def configure(form: str, trace_id: Callable[[], str] = str) -> None:
    """Log to the standard error, in this form, what this service, its libraries and Python's warnings have to say."""
    logging.basicConfig(handlers=[handler(form, trace_id)], level=logging.INFO)
    logging.captureWarnings(form == "json")
    for name, level in {
        "alembic": logging.WARNING,
        "urllib3": logging.ERROR,  # hide its retries
        "asgi_correlation_id": logging.ERROR,  # ids of clients that are replaced
    }.items():
        logging.getLogger(name).setLevel(level)


def request(scope: Scope, client: str, status: int, seconds: float) -> None:
    """Log a request that was answered; neither its query nor its headers, which may have secrets."""
    path = scope["path"]
    if path.startswith(PROBES) and status < 400:
        return
    path, client = quote(path)[:200], quote(client, ":@%")[:64]  # no control characters
    fields = {"method": scope["method"], "path": path, "status": status, "seconds": round(seconds, 4), "client": client}
    log.info("%s %s %s %d %.3f s", client, scope["method"], path, status, seconds, extra=fields)
