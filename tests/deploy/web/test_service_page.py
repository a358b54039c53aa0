"""The page of the service, with pictures as they form."""

import base64
import json
import re
import threading
import time
from collections.abc import Iterator
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Page, Route, expect

from deploy.service import protocol, server
from deploy.service.__main__ import listen
from deploy.service.app import create
from deploy.service.pictures import png
from deploy.service.state import Service
from diffusion.export import golden
from tests.deploy.models import write_model
from tests.deploy.services import direct, service
from tests.deploy.web.images import made, read, same
from tests.export.test_sampler_graph import SHAPE

pytestmark = pytest.mark.slow

STREAM = "**/images/stream?*"


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Service:
    """At most 16 images of 4 steps, of 3 classes."""
    return service(write_model(tmp_path_factory.mktemp("served") / "sampler.onnx", "dpm-solver++", True))


@pytest.fixture(scope="module")
def address(served: Service) -> Iterator[str]:
    """Where the service runs; replaces the folder of the page, which it serves itself."""
    listener = listen("127.0.0.1", 0)
    running = server.Server(create(served), served, 0.0)
    thread = threading.Thread(target=running.run, args=([listener],))
    thread.start()
    while not running.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{listener.getsockname()[1]}/"
    running.should_exit = True
    thread.join(20)


def images(served: Service, seed: int, y: list[int], **others: Any) -> NDArray[np.uint8]:
    """The images that the service defines for a seed, uint8 (B, H, W, C)."""
    noise = np.stack([golden.normal(seed, number, SHAPE) for number in range(len(y))])
    given = {"steps": [0], "guidance": np.array([2.5], np.float32), **others}
    found: NDArray[np.uint8] = direct(served, noise=noise, y=y, **given)["images"]
    return found


def event(kind: str, step: int, pixels: NDArray[np.uint8]) -> str:
    image = base64.b64encode(png(pixels, 1)).decode()
    return f"event: {kind}\ndata: {json.dumps({'step': step, 'steps': 4, 'image': image})}\n\n"


def test_pictures_form_and_a_link_shows_the_same(served: Service, page: Page) -> None:
    asked = list[str]()
    page.on("request", lambda request: asked.append(request.url) if "/stream?" in request.url else None)
    page.add_init_script("""addEventListener("DOMContentLoaded", () => {
        window.lines = [];
        const status = document.getElementById("status");
        new MutationObserver(() => window.lines.push(status.textContent)).observe(status, { childList: true });
    })""")
    page.goto("?seed=9&count=5&steps=40&class=1&service=http://elsewhere.example&model=zebra")
    expect(page.locator("#status")).to_contain_text("Step 40 of 40, 5 images in ")
    expect(page.locator("#facts")).to_have_text("7 × 10, RGB · 3 classes · 4 steps · ddpm, version aaaaaaaaaaaa")
    expect(page.locator("#notices li")).to_have_text(
        [
            "service=http://elsewhere.example: this page shows the models of its own service; ignored",
            "model=zebra: the service has no such model; using ddpm",
        ]
    )
    found = made(page, 5, "Step 40 of 40, ")
    same(found, images(served, 9, [1] * 5, steps=[40]))
    steps = [int(step) for step in re.findall(r"Step (\d+) of 40(?!,)", " ".join(page.evaluate("window.lines")))]
    assert steps
    assert steps == sorted(set(steps) & set(range(4, 40, 4)))
    for label in ("Class", "Guidance"):
        expect(page.get_by_label(label)).to_be_visible()
    expect(page.locator("#gallery canvas").last).to_have_attribute("title", "Image 5, 1")
    page.reload()
    assert np.array_equal(made(page, 5, "Step 40 of 40, "), found)
    query = {"seed": ["9"], "steps": ["40"], "class": ["1"], "guidance": ["2.5"]}
    assert parse_qs(urlsplit(page.url).query) == {**query, "count": ["5"]}
    assert [parse_qs(urlsplit(url).query) for url in asked] == [{**query, "n": ["5"], "scale": ["1"]}] * 2


def test_errors_of_the_service_are_shown(served: Service, page: Page) -> None:
    def stream(route: Route) -> None:
        sent = {"content_type": "text/event-stream"}
        match fault:
            case "full":
                refusal = {"error": "no room in the queue"}
                route.fulfill(status=503, headers={"Retry-After": "17"}, json=refusal)
            case "proxy":
                route.fulfill(status=502, body="<h1>Bad gateway</h1>")
            case "failed":
                route.fulfill(body='event: error\ndata: {"error": "the model failed: out of memory"}\n\n', **sent)
            case "cut":
                route.fulfill(body=f": still here\n\n{event('progress', 2, estimate)}event: do", **sent)
            case "gone":
                route.abort()

    page.route(STREAM, stream)
    lines = {
        "full": "no room in the queue; try again in 17 s",
        "proxy": "502 Bad Gateway",
        "failed": "the model failed: out of memory",
        "cut": "the service went away after step 2 of 4; generate again",
        "gone": "the service does not answer; check that it runs, and allows this page by --cors",
    }
    estimate = 255 - images(served, 7, [0])
    fault = "full"
    page.goto("?count=1")
    for fault, line in lines.items():
        page.get_by_role("button", name="Generate").click()
        expect(page.locator("#status")).to_have_text(line)
        expect(page.get_by_role("button", name="Stop")).to_be_disabled()
        expect(page.locator("[data-made=false]")).to_have_count(1)
        if fault == "cut":
            assert np.array_equal(read(page, "#gallery canvas"), estimate)
    expect(page.get_by_label("Images")).to_have_attribute("max", "16")
    fault = "waiting"
    page.get_by_role("button", name="Generate").click()
    with page.expect_event("requestfailed") as failed:
        page.get_by_role("button", name="Stop").click()
    assert failed.value.failure == "net::ERR_ABORTED"
    expect(page.locator("#status")).to_have_text("Waiting for the first image ... (stopped)")


def test_a_key_is_asked_for_and_a_model_chosen(served: Service, page: Page) -> None:
    """The key stays in this tab, and out of the address."""
    wanted, asked = "Bearer s3cret", list[dict[str, list[str]]]()

    def check(route: Route) -> None:
        path, query = urlsplit(route.request.url).path, parse_qs(urlsplit(route.request.url).query)
        if route.request.headers.get("authorization") != wanted:
            route.fulfill(status=401, json={"error": "a key is needed"})
        elif path == "/v2/models":
            champion = {"name": "ddpm", "version": "2", "alias": "champion", "state": "READY"}
            old = {"name": "ddpm", "version": "1", "alias": None, "state": "READY"}
            route.fulfill(json=[champion, old, {"name": "digits", "version": "7", "alias": None, "state": "READY"}])
        elif path == "/images/stream":
            asked.append(query)
            body = event("done", 4, images(served, 7, [0] * int(query["n"][0])))
            route.fulfill(body=body, content_type="text/event-stream")
        else:
            assert path in ("/v2/models/ddpm/versions/champion", "/v2/models/digits")
            route.fulfill(json=protocol.metadata(served.models.first, ["2", "1"], 16))

    page.route("**/v2/**", check)
    page.route(STREAM, check)
    page.goto("?count=2")
    expect(page.locator("#status")).to_contain_text(": a key is needed")
    for key in ("wrong", "s3cret"):
        expect(page.get_by_label("Key")).to_be_visible()
        expect(page.get_by_label("Key")).to_have_value("")
        page.get_by_label("Key").fill(key)
        page.get_by_label("Key").press("Enter")
    made(page, 2, "Step 4 of 4, ")
    expect(page.get_by_label("Key")).to_be_hidden()
    expect(page.locator("#facts")).to_contain_text("4 steps · ddpm@champion, version 2")
    choice = page.get_by_role("combobox", name="Model")
    expect(choice.locator("option")).to_have_text(
        ["ddpm@champion (version 2)", "ddpm/1 (version 1)", "digits (version 7)"]
    )
    choice.select_option("digits")
    page.wait_for_url("**model=digits**")
    page.reload()
    made(page, 2, "Step 4 of 4, ")
    expect(choice).to_have_value("digits")
    assert [query["model"] for query in asked] == [["ddpm@champion"], ["digits"], ["digits"]]
    assert "s3cret" not in page.url + json.dumps(asked)
