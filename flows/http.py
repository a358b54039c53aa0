"""Requests to the services, for commands that must also work if nothing answers, or another program does."""

import time
from typing import Any

import httpx

TRIES, PAUSE = 10, 1.0
"""Prefect's server answers 503 while another request locks its SQLite database; attempts, and seconds between them."""


def answers(url: str) -> bool:
    """Whether an address answers with success."""
    return _response(url, None) is not None


def json(url: str, body: Any = None) -> Any:
    """The JSON at an address, or None; a request with a body is a POST. If the server is busy (503), it is retried."""
    response = _response(url, body, TRIES)
    try:
        return response and response.json()
    except ValueError:
        return None


def _response(url: str, body: Any, tries: int = 1) -> httpx.Response | None:
    try:
        response = httpx.request("GET" if body is None else "POST", url, json=body, timeout=5)
        if response.status_code == httpx.codes.SERVICE_UNAVAILABLE and tries > 1:
            time.sleep(PAUSE)
            return _response(url, body, tries - 1)
        return response.raise_for_status()
    except httpx.HTTPError:
        return None
