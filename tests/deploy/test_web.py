"""The page in a real browser, compared with the same model in Python."""

import struct
import threading
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Browser, Page, expect, sync_playwright
from sklearn.utils import murmurhash3_32  # an independent implementation; installed with mlflow

from diffusion.export import metadata
from tests.deploy.models import write_model
from tests.export.test_sampler_graph import SHAPE, parts
from tests.machine import program

pytestmark = pytest.mark.slow

STEPS = 5
FEW = 2
"""Exported steps of a model whose images follow the form."""
OFF_BY_ONE = 0.001
"""Fraction of values allowed to differ by one: WebAssembly sums in another order, which can change the rounding."""
CHROMIUM = ("chromium", "chromium", "chromium-browser", "google-chrome")
expect.set_options(timeout=60_000)
QUIET = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update"]
READ = """canvases => canvases.map(canvas => {
    const { width, height, data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return [height, width, [...data]];
})"""


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
    """An empty page. Afterwards, asserts that it contacted no other host and logged no error."""
    hosts, errors = set[str](), list[str]()
    with browser.new_context(base_url=address) as context, context.new_page() as opened:
        context.on("request", lambda request: hosts.add(urlsplit(request.url).netloc))
        opened.on("console", lambda message: errors.append(message.text) if message.type == "error" else None)
        opened.on("pageerror", lambda error: errors.append(str(error)))
        yield opened
    assert hosts - {""} == {urlsplit(address).netloc}  # data: URLs have no host
    assert [error for error in errors if "status of 404" not in error] == []


def model(site: Path, sampler: str, classes: bool) -> Path:
    path = site / f"{sampler.replace('+', '')}-{'classes' if classes else 'plain'}.onnx"  # a + in a URL means a space
    return path if path.exists() else write_model(path, sampler, classes, STEPS)


def made(page: Page, count: int) -> NDArray[np.uint8]:
    """Wait until `count` images are ready; returns them, uint8 (B, H, W, 3)."""
    expect(page.locator("#status")).to_contain_text(f"{count} of {count}, ")
    expect(page.locator("#gallery [data-made=true]")).to_have_count(count)
    return read(page, "#gallery canvas")


def read(page: Page, canvases: str) -> NDArray[np.uint8]:
    read = [np.array(data, np.uint8).reshape(*sides, 4) for *sides, data in page.locator(canvases).evaluate_all(READ)]
    images = np.stack(read)
    assert (images[..., 3] == 255).all()
    return images[..., :3]


def normal(seed: int, number: int, step: int) -> NDArray[np.float32]:
    """Noise (C, H, W) as deploy/web/README.md defines it."""
    keys = [struct.pack("<III", number, step, k) for k in range(2 * int(np.prod(SHAPE)))]
    words = np.array([murmurhash3_32(key, seed=seed, positive=True) for key in keys], np.float64)
    u, v = (words[0::2] + 1) / 2**32, words[1::2] / 2**32
    return (np.sqrt(-2 * np.log(u)) * np.cos(2 * np.pi * v)).astype(np.float32).reshape(SHAPE)


def expected(
    path: Path, seed: int, y: list[int], steps: int = STEPS, guidance: float = 2.5, first: int = 0
) -> NDArray[np.uint8]:
    """The images from number `first` on, computed by ONNX Runtime in Python."""
    session = ort.InferenceSession(path, providers=["CPUExecutionProvider"])
    numbers = range(first, first + len(y))
    given = {
        "noise": np.stack([normal(seed, number, 0) for number in numbers]),
        "steps_noise": np.array([[normal(seed, number, step + 1) for number in numbers] for step in range(steps)]),
        "steps": np.array([steps]),
        "y": np.array(y),
        "guidance": np.array([guidance], np.float32),
    }
    images: NDArray[np.uint8] = session.run(
        ["images"], {value.name: given[value.name] for value in session.get_inputs()}
    )[0]
    return images


def same(found: NDArray[np.uint8], images: NDArray[np.uint8]) -> None:
    assert found.shape == images.shape
    off = np.abs(found.astype(int) - images)
    assert off.max() <= 1
    assert (off > 0).sum() <= 1 + OFF_BY_ONE * off.size
    assert (off.reshape(len(off), -1).max(1) == 0).mean() > 0.5  # most images are identical


@pytest.mark.parametrize(
    ("sampler", "choice", "y"),
    [
        ("dpm-solver++", None, [0] * 6),
        ("dpm-solver++-sde", None, [0] * 6),
        ("heun", "2", [2] * 6),
        ("heun", "turn", [0, 1, 2, 0, 1, 2]),
        ("ddpm", "-1", [-1] * 6),
    ],
)
def test_the_page_matches_python(site: Path, page: Page, sampler: str, choice: str | None, y: list[int]) -> None:
    path = model(site, sampler, choice is not None)
    page.goto(f"?model={path.name}&count=1")
    made(page, 1)
    page.get_by_label("Seed").fill("4000000000")
    page.get_by_label("Images").fill("6")
    for label in ("Class", "Guidance"):
        expect(page.get_by_label(label)).to_be_visible(visible=choice is not None)
    if choice is not None:
        page.get_by_label("Class").select_option(choice)
        page.get_by_label("Guidance").fill("1.5")
    page.get_by_role("button", name="Generate").click()
    found = made(page, 6)
    assert len(found) == 6
    same(found, expected(path, 4_000_000_000, y, guidance=1.5))


def test_a_link_shows_the_same_images(site: Path, page: Page) -> None:
    path = model(site, "heun", True)
    page.goto(f"?model={path.name}&seed=3&count=4&steps=2&class=1")
    found = made(page, 4)
    same(found, expected(path, 3, [1] * 4, steps=2))
    query = parse_qs(urlsplit(page.url).query)
    assert query == {
        "model": [path.name], "seed": ["3"], "count": ["4"], "steps": ["2"], "class": ["1"], "guidance": ["2.5"]
    }  # fmt: skip
    page.reload()
    assert np.array_equal(made(page, 4), found)
    expect(page.locator("#facts")).to_have_text(
        "7 × 10, RGB · 3 classes · heun, 5 steps · 0.500 noise MSE on test pairs · weights aaaaaaaaaaaa"
    )


def test_a_link_with_an_invalid_value_generates_nothing(site: Path, page: Page) -> None:
    path = model(site, "heun", True)
    for choice in ("count=65", "seed=-1", "steps=51", "class=3", "guidance=x"):
        page.goto(f"?model={path.name}&{choice}")
        expect(page.get_by_label("Seed")).to_be_visible()
        assert page.locator("#form :invalid").get_attribute("name") == choice.split("=")[0]
        expect(page.locator("canvas")).to_have_count(0)


def test_the_exported_number_of_steps_may_exceed_the_limit(site: Path, page: Page) -> None:
    path = write_model(site / "long.onnx", "dpm-solver++", False, steps=60)
    page.goto(f"?model={path.name}&count=2&seed=1")
    same(made(page, 2), expected(path, 1, [0, 0], steps=60))
    steps = page.get_by_role("spinbutton", name="Steps")
    for asked, fits in ((50, True), (51, False), (60, True), (61, False)):
        steps.fill(str(asked))
        assert steps.evaluate("field => field.validity.valid") is fits


def test_a_click_shows_an_image_with_fewer_steps(site: Path, page: Page) -> None:
    path = model(site, "dpm-solver++", False)
    page.goto(f"?model={path.name}&seed=5&count=3")
    images = made(page, 3)
    page.locator("#gallery button").nth(1).press("Enter")
    expect(page.locator("#steps-dialog figcaption")).to_have_text(["1 step", "2 steps", "3 steps", "5 steps"])
    expect(page.locator("#steps-dialog [data-made=true]")).to_have_count(4)
    fewer = read(page, "#steps-dialog canvas")
    assert np.array_equal(fewer[-1], images[1])
    same(fewer, np.concatenate([expected(path, 5, [0], steps=steps, first=1) for steps in (1, 2, 3, 5)]))
    page.keyboard.press("Escape")
    expect(page.locator("#steps-dialog")).to_be_hidden()
    page.goto(f"?model={model(site, 'ddpm', False).name}&count=1")
    made(page, 1)
    expect(page.locator("#gallery button")).to_have_count(0)


def few_steps(site: Path, classes: bool = True) -> Path:
    """A model with the sampler of distilled ones."""
    return write_model(site / f"few-{classes}.onnx", "consistency", classes, FEW)


def settled(page: Page, images: NDArray[np.uint8]) -> None:
    """Wait until the page shows `images`, and nothing else afterwards."""
    page.wait_for_function("document.getElementById('stop').disabled")
    same(read(page, "#gallery canvas"), images)
    expect(page.locator("#gallery [data-made=true]")).to_have_count(len(images))


def test_images_of_a_model_with_few_steps_follow_the_form(site: Path, page: Page) -> None:
    path = few_steps(site)
    page.goto(f"?model={path.name}&count=3&class=0&seed=1")
    settled(page, expected(path, 1, [0] * 3, steps=FEW))
    page.get_by_label("Seed").fill("2")
    settled(page, expected(path, 2, [0] * 3, steps=FEW))
    page.get_by_role("spinbutton", name="Steps").fill("3")
    settled(page, expected(path, 2, [0] * 3, steps=3))
    page.get_by_label("Class").select_option("turn")
    settled(page, expected(path, 2, [0, 1, 2], steps=3))
    expect(page.locator("#gallery canvas").last).to_have_attribute("title", "Image 3, z")
    page.get_by_label("Guidance").fill("1")
    settled(page, expected(path, 2, [0, 1, 2], steps=3, guidance=1))
    for count in (5, 2):
        page.get_by_label("Images").fill(str(count))
        settled(page, expected(path, 2, [0, 1, 2, 0, 1][:count], steps=3, guidance=1))
    page.wait_for_url("**&count=2&**")
    assert parse_qs(urlsplit(page.url).query) == {
        "model": [path.name], "seed": ["2"], "count": ["2"], "steps": ["3"], "class": ["turn"], "guidance": ["1"]
    }  # fmt: skip
    page.get_by_label("Seed").fill("-1")  # shows what was valid last
    settled(page, expected(path, 2, [0, 1], steps=3, guidance=1))


def test_the_last_value_wins_and_no_tile_returns_to_noise(site: Path, page: Page) -> None:
    path = few_steps(site, classes=False)
    page.goto(f"?model={path.name}&count=4&seed=1")
    made(page, 4)
    drawn = page.evaluate("""async () => {
        const [field, gallery] = [document.forms[0].elements.seed, document.getElementById("gallery")];
        const { port1, port2 } = new MessageChannel();
        const later = () => new Promise(resolve => { port1.onmessage = resolve; port2.postMessage(0); });
        let [drawn, blank] = [0, 0];
        const watch = new MutationObserver(changes => {
            drawn += changes.filter(({ addedNodes }) => addedNodes.length).length;
            blank += gallery.querySelectorAll("[data-made=false]").length;
        });
        watch.observe(gallery, { childList: true, subtree: true });
        for (let seed = 2; seed <= 200; seed++) {
            field.value = seed;
            field.dispatchEvent(new Event("input", { bubbles: true }));
            await later();
        }
        while (!document.getElementById("stop").disabled) await later();
        watch.disconnect();
        return [drawn, blank];
    }""")
    settled(page, expected(path, 200, [0] * 4, steps=FEW))
    assert drawn[1] == 0
    assert drawn[0] < 199 * 4 / 2  # superseded settings are left out


def test_a_model_with_many_steps_waits_for_the_button(site: Path, page: Page) -> None:
    path = model(site, "heun", True)
    page.goto(f"?model={path.name}&count=2&class=1&seed=4")
    images = made(page, 2)
    url = page.url
    page.get_by_label("Seed").fill("5")
    page.get_by_label("Class").select_option("2")
    page.wait_for_timeout(1000)
    assert np.array_equal(read(page, "#gallery canvas"), images)
    assert page.url == url
    page.get_by_label("Seed").press("Enter")
    settled(page, expected(path, 5, [2, 2]))


def test_a_click_shows_an_image_of_a_distilled_model_in_1_to_4_steps(site: Path, page: Page) -> None:
    path = few_steps(site, classes=False)
    page.goto(f"?model={path.name}&seed=5&count=1")
    made(page, 1)
    expect(page.locator("#hint")).to_have_text("Click an image to see it with 1 to 4 steps.")
    page.locator("#gallery button").click()
    expect(page.locator("#steps-dialog figcaption")).to_have_text(["1 step", "2 steps", "3 steps", "4 steps"])
    expect(page.locator("#steps-dialog [data-made=true]")).to_have_count(4)
    counts = range(1, 5)
    same(read(page, "#steps-dialog canvas"), np.concatenate([expected(path, 5, [0], steps=n) for n in counts]))


def test_stop(site: Path, page: Page) -> None:
    page.goto(f"?model={model(site, 'heun', True).name}&count=64&steps=50")
    expect(page.locator("#gallery [data-made=true]").first).to_be_visible()
    page.get_by_role("button", name="Stop").click()
    expect(page.locator("#status")).to_contain_text("stopped")
    page.get_by_role("spinbutton", name="Steps").fill("1")
    finished = page.locator("#gallery [data-made=true]").count()
    assert 0 < finished < 64
    expect(page.locator("#gallery canvas")).to_have_count(64)  # the others still show their noise
    noise = normal(7, 63, 0).astype(np.float64).transpose(1, 2, 0)
    assert np.array_equal(read(page, "#gallery canvas")[-1], np.rint(np.clip((noise + 1) * 127.5, 0, 255)))
    page.get_by_label("Images").fill("2")
    page.get_by_role("button", name="Generate").click()
    made(page, 2)


def test_an_unusable_file_gives_a_one_line_message(site: Path, page: Page, tmp_path: Path) -> None:
    whole = model(site, "dpm-solver++", False).read_bytes()
    bare = onnx.ModelProto.FromString(whole)
    del bare.metadata_props[:]
    later = onnx.ModelProto.FromString(whole)
    next(fact for fact in later.metadata_props if fact.key == "ddpm.version").value = "99"
    denoiser = onnx.ModelProto.FromString(parts(False)[1].SerializeToString())
    metadata.describe(denoiser, metadata.of_model(parts(False)[0], "analytic", "weights", "data", {}))
    broken = onnx.ModelProto.FromString(whole)
    broken.graph.node[0].op_type = "Nonsense"
    page.goto("")
    line = page.locator("#status")
    expect(line).to_have_text("sampler.onnx: not found (404); copy it next to this page, or choose a file")
    for name, content, says in (
        ("text", b"Dear model,", "not an ONNX file, or incomplete"),
        ("empty", b"", "not an ONNX file, or incomplete"),
        ("half", whole[: len(whole) // 2], "not an ONNX file, or incomplete"),
        ("bare", bare.SerializeToString(), "not written by ddpm export: it has no ddpm metadata"),
        ("later", later.SerializeToString(), "metadata version 99, but this page supports 2; export it again"),
        ("denoiser", denoiser.SerializeToString(), "this is the denoiser; choose sampler.onnx, which generates images"),
    ):
        (tmp_path / f"{name}.onnx").write_bytes(content)
        page.locator("#file").set_input_files(tmp_path / f"{name}.onnx")
        expect(line).to_have_text(f"{name}.onnx: {says}")
        expect(page.locator("#form")).to_be_hidden()
    (tmp_path / "broken.onnx").write_bytes(broken.SerializeToString())
    page.locator("#file").set_input_files(tmp_path / "broken.onnx")
    expect(line).to_contain_text("broken.onnx: cannot be loaded: ")


def test_another_model_can_be_chosen(site: Path, page: Page) -> None:
    page.goto(f"?model={model(site, 'heun', True).name}&count=2&class=2&steps=2&seed=9")
    made(page, 2)
    path = model(site, "dpm-solver++", False)
    page.locator("#file").set_input_files(path)
    expect(page.locator("#facts")).to_contain_text("dpm-solver++, 5 steps")
    same(made(page, 2), expected(path, 9, [0, 0]))
    assert parse_qs(urlsplit(page.url).query) == {"seed": ["9"], "count": ["2"], "steps": ["5"]}
