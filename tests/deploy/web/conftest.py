"""The page in headless Chromium, served from a folder of its own."""

import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from tests.machine import program

CHROMIUM = ("chromium", "chromium", "chromium-browser", "google-chrome")
expect.set_options(timeout=60_000)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]


class Quiet(SimpleHTTPRequestHandler):
    """A file server without a log."""

    def log_message(self, format: str, *args: Any) -> None:
        """Log nothing."""


@pytest.fixture(scope="module")
def site(installed: Callable[[str], Path]) -> Path:
    """The folder of the page with its packages installed; tests add models to it."""
    program(*CHROMIUM)
    return installed("web")


@pytest.fixture(scope="module")
def address(site: Path) -> Iterator[str]:
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=site)) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()
        thread.join()


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    found = program(*CHROMIUM)
    with sync_playwright() as playwright, playwright.chromium.launch(executable_path=found, args=QUIET) as started:
        yield started


@pytest.fixture
def page(browser: Browser, address: str) -> Iterator[Page]:
    """An empty page. Afterwards, asserts that it contacted no other host and logged no error but those of requests."""
    hosts, errors = set[str](), list[str]()
    with browser.new_context(base_url=address) as context, context.new_page() as opened:
        context.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: errors.append(str(error)))
        yield opened
    assert hosts - {""} == {urlsplit(address).netloc}  # data: URLs have no host
    assert [error for error in errors if not error.startswith("Failed to load resource")] == []
