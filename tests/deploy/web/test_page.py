"""The page in a real browser, compared with the same model in Python."""

from pathlib import Path
from urllib.parse import parse_qs, urlsplit

import numpy as np
import onnx
import pytest
from playwright.sync_api import Page, expect

from diffusion.export import metadata
from tests.deploy.models import write_model
from tests.deploy.web.images import expected, made, model, normal, read, same
from tests.export.test_sampler_graph import parts

pytestmark = pytest.mark.slow


@pytest.mark.parametrize(
    ("sampler", "choice", "y"),
    [
        ("dpm-solver++", None, [0] * 6),
        ("dpm-solver++-sde", None, [0] * 6),
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


def test_impossible_values_in_the_address_are_named_and_replaced(site: Path, page: Page) -> None:
    path = model(site, "heun", True)
    notices = page.locator("#notices li")
    page.goto(f"?model={path.name}&seed=-1&count=1e9&steps=abc&class=zebra&guidance=NaN&service=zebra")
    expect(notices).to_have_text(
        [
            "service=zebra: must be http://HOST:PORT; running a model in this browser instead",
            "seed=-1: must be a whole number from 0 to 4294967295; using 7",
            "count=1e9: must be a whole number from 1 to 64; using 16",
            "steps=abc: must be a whole number from 1 to 50; using 5",
            "class=zebra: the model has no such class; using all in turn",
            "guidance=NaN: must be a number from 0 to 100; using 2.5",
        ]
    )
    same(made(page, 16), expected(path, 7, [number % 3 for number in range(16)]))
    assert parse_qs(urlsplit(page.url).query) == {
        "model": [path.name], "seed": ["7"], "count": ["16"], "steps": ["5"], "class": ["turn"], "guidance": ["2.5"]
    }  # fmt: skip
    page.get_by_label("Images").fill("2")
    page.get_by_role("button", name="Generate").click()
    expect(notices).to_have_count(0)

    page.goto(f"?model={model(site, 'dpm-solver++', False).name}&class=1&count=%E0%A4%A&steps=51&seed=1&=")
    expect(notices).to_have_text(
        [
            "count=\ufffd%A: must be a whole number from 1 to 64; using 16",
            "steps=51: must be a whole number from 1 to 50; using 5",
            "class=1: the model has none; ignored",
        ]
    )
    made(page, 16)
    page.goto("?model=&seed=1")
    expect(notices).to_have_text("model=: must be the address of a sampler.onnx; using sampler.onnx")
    expect(page.locator("#status")).to_contain_text("sampler.onnx: not found (404)")


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
