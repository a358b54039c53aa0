"""Requests to the services, for commands that must also work where nothing answers, or another program does."""

from typing import Any

import httpx


def answers(url: str) -> bool:
    """Whether an address answers with success."""
    return _response(url, None) is not None


def json(url: str, body: Any = None) -> Any:
    """The JSON at an address, None where there is none; a request with a body is a POST."""
    response = _response(url, body)
    try:
        return response and response.json()
    except ValueError:
        return None


def _response(url: str, body: Any) -> httpx.Response | None:
    try:
        return httpx.request("GET" if body is None else "POST", url, json=body, timeout=5).raise_for_status()
    except httpx.HTTPError:
        return None
