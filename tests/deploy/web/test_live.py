"""Models with few steps, as distilled ones have: their images follow the form."""

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import pytest
from numpy.typing import NDArray
from playwright.sync_api import Page, expect

from tests.deploy.models import write_model
from tests.deploy.web.images import expected, made, model, read, same

pytestmark = pytest.mark.slow

FEW = 2


def few_steps(site: Path, classes: bool = True) -> Path:
    """A model with the sampler of distilled ones."""
    return write_model(site / f"few-{classes}.onnx", "consistency", classes, FEW)


def settled(page: Page, images: NDArray[np.uint8]) -> None:
    """Wait until the page has made all it was asked for, and compare it with `images`."""
    expect(page.locator("#gallery [data-made=true]")).to_have_count(len(images))
    expect(page.get_by_role("button", name="Stop")).to_be_disabled()
    same(read(page, "#gallery canvas"), images)


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
    expect(page.locator("#gallery canvas").last).to_have_attribute("title", "Image 3, 2")
    expect(page.get_by_label("Guidance")).to_be_hidden()  # it is built in
    for count in (5, 2):
        page.get_by_label("Images").fill(str(count))
        settled(page, expected(path, 2, [0, 1, 2, 0, 1][:count], steps=3))
    page.wait_for_url("**&count=2&**")
    assert parse_qs(urlsplit(page.url).query) == {
        "model": [path.name], "seed": ["2"], "count": ["2"], "steps": ["3"], "class": ["turn"]
    }  # fmt: skip
    page.get_by_label("Seed").fill("-1")  # shows what was valid last
    settled(page, expected(path, 2, [0, 1], steps=3))


def test_the_last_value_wins_and_no_tile_returns_to_noise(site: Path, page: Page) -> None:
    path = few_steps(site, classes=False)
    page.goto(f"?model={path.name}&count=4&seed=1")
    made(page, 4)
    runs, shown, blank = page.evaluate("""async () => {
        const [form, gallery] = ["form", "gallery"].map((id) => document.getElementById(id));
        let [runs, shown, blank] = [0, 0, 0];
        const post = Worker.prototype.postMessage;
        Worker.prototype.postMessage = function (message, ...rest) {
            runs += message.type === "run";
            return post.call(this, message, ...rest);
        };
        const watch = new MutationObserver((changes) => {
            shown += changes.filter(({ addedNodes }) => addedNodes.length).length;
            blank += gallery.querySelectorAll("[data-made=false]").length;
        });
        watch.observe(gallery, { childList: true, subtree: true });
        const later = (ms) => new Promise((resolve) => setTimeout(resolve, ms));
        for (let seed = 2; seed <= 200; seed++) {
            form.elements.seed.value = seed;
            form.elements.seed.dispatchEvent(new Event("input", { bubbles: true }));
            if (seed === 100) await later(0); // the first image is being computed
        }
        while (!document.getElementById("stop").disabled) await later(10);
        Worker.prototype.postMessage = post;
        watch.disconnect();
        return [runs, shown, blank];
    }""")
    settled(page, expected(path, 200, [0] * 4, steps=FEW))
    assert blank == 0
    assert 4 < runs <= 8  # those of seeds 100 and 200
    assert shown >= 4


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
