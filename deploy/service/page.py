"""The browser page, deploy/web, at /."""

import hashlib
from collections.abc import Awaitable, Callable
from pathlib import Path

from fastapi import APIRouter, Request, Response

from deploy.service.requests import unchanged

FOLDER = Path(__file__).parents[1] / "web"
FILES = {
    "index.html": "text/html; charset=utf-8",
    "style.css": "text/css; charset=utf-8",
    **dict.fromkeys(("main.js", "model.js", "service.js"), "text/javascript; charset=utf-8"),
}
"""What the page needs if the service computes the images, with media types."""
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; connect-src 'self'; img-src data:; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
HEADERS = {
    "Cache-Control": "no-cache",  # browsers ask each time; the ETag saves the download
    "Content-Security-Policy": POLICY,
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
ELSEWHERE, HERE = '<meta name="service" content="" />', '<meta name="service" content="." />'
"""How the page knows that the service it comes from computes its images."""


def routes(folder: Path = FOLDER) -> APIRouter:
    """Create the routes; none if the page is not installed."""
    router = APIRouter(include_in_schema=False)
    if not folder.is_dir():
        return router
    for name, media_type in FILES.items():
        content = (folder / name).read_bytes()
        if name == "index.html":
            content = content.replace(ELSEWHERE.encode(), HERE.encode())
        router.add_api_route("/" if name == "index.html" else f"/{name}", _answer(content, media_type))
    return router


def _answer(content: bytes, media_type: str) -> Callable[[Request], Awaitable[Response]]:
    """Answer with a file."""
    headers = {**HEADERS, "ETag": f'"{hashlib.sha256(content).hexdigest()[:32]}"'}

    async def answer(request: Request) -> Response:
        if unchanged(request, headers["ETag"]):
            return Response(status_code=304, headers=headers)
        return Response(content, media_type=media_type, headers=headers)

    return answer
