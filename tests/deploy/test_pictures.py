"""GET /images, tested in this process."""

import io
from pathlib import Path

import httpx
import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from deploy.service.pictures import STEPS_NOISE, png
from deploy.service.state import Service
from diffusion.export import golden
from tests.deploy.models import write_model
from tests.deploy.services import ask, direct, get, same, service, shared
from tests.export.test_sampler_graph import SHAPE

pytestmark = pytest.mark.slow


def cells(answer: httpx.Response, scale: int, columns: int, count: int) -> NDArray[np.uint8]:
    """Cut a grid into its images (B, H, W, C)."""
    assert (answer.status_code, answer.headers["Content-Type"]) == (200, "image/png"), answer.text
    grid = np.array(Image.open(io.BytesIO(answer.content)))
    height, width = (side * scale + 1 for side in SHAPE[1:])
    places = [(index // columns * height + 1, index % columns * width + 1) for index in range(count)]
    return np.stack([grid[top : top + height - 1 : scale, left : left + width - 1 : scale] for top, left in places])


def test_images(classes: Service) -> None:
    normal = np.stack([golden.normal(7, index, SHAPE) for index in range(5)])
    five, three = ask(
        classes,
        get("/images?n=5&seed=7&class=2&steps=3&guidance=1.5&scale=2"),
        get("/images?n=3&seed=7&class=2&steps=3&guidance=1.5"),
    )
    found = cells(five, 2, 3, 5)
    same(found, direct(classes, noise=normal, steps=[3], y=[2] * 5, guidance=np.float32([1.5]))["images"])
    same(cells(three, 4, 2, 3), found[:3])
    assert (five.headers["X-Seed"], five.headers["X-Model-Version"]) == ("7", "a" * 12)


def test_images_of_a_stochastic_sampler(stochastic: Service) -> None:
    normal = np.stack([golden.normal(7, index, SHAPE) for index in range(3)])
    steps = np.stack([golden.normal(7, STEPS_NOISE + index, (4, *SHAPE)) for index in range(3)], axis=1)
    one, three = ask(stochastic, get("/images?n=1&seed=7"), get("/images?n=3&seed=7"))
    same(cells(three, 4, 2, 3), direct(stochastic, noise=normal, steps_noise=steps)["images"])
    same(cells(one, 4, 1, 1), cells(three, 4, 2, 3)[:1])


def test_caching(classes: Service) -> None:
    first, other, random = ask(classes, get("/images?seed=1"), get("/images?seed=2"), get("/images"))
    assert first.headers["Cache-Control"] == "no-cache"
    assert first.headers["ETag"] != other.headers["ETag"]
    assert (random.headers["Cache-Control"], "ETag" in random.headers) == ("no-store", False)
    again = get(f"/images?seed={random.headers['X-Seed']}")
    known = get("/images?seed=1", **{"If-None-Match": first.headers["ETag"]})
    same_seed, unchanged = ask(classes, again, known)
    same(cells(same_seed, 4, 4, 16), cells(random, 4, 4, 16))
    assert (unchanged.status_code, unchanged.content) == (304, b"")


def test_the_etag_depends_on_the_export_settings(tmp_path: Path) -> None:
    made = [service(write_model(tmp_path / f"{steps}.onnx", "dpm-solver++", False, steps)) for steps in (2, 3)]
    (two,), (three,) = (ask(each, get("/images?seed=1")) for each in made)
    assert two.headers["X-Model-Version"] == three.headers["X-Model-Version"]
    assert two.headers["ETag"] != three.headers["ETag"]


@pytest.mark.parametrize(
    ("query", "line"),
    [
        ("n=0", "n: input should be greater than or equal to 1 (got 0)"),
        ("n=17", "n: must be at most 16 (got 17)"),
        ("n=many", "n: input should be a valid integer"),
        ("seed=-1", "seed: input should be greater than or equal to 0"),
        (f"seed={2**64}", "seed: input should be less than"),
        ("class=3", "class: must be a name (0, 1, 2), a number below 3, or turn (got 3)"),
        ("class=cat", "class: must be a name"),
        (f"class={'9' * 5000}", "class: must be a name"),
        ("steps=51", "steps: must be 1 to 50, or 0 for 4 (got 51)"),
        ("guidance=nan", "guidance: must be from -1000 to 1000 (got nan)"),
        ("guidance=-inf", "guidance: must be from -1000 to 1000 (got -inf)"),
        ("guidance=1e300", "guidance: must be from -1000 to 1000 (got 1e+300)"),
        ("scale=17", "scale: input should be less than or equal to 16"),
        ("step=3", "step: unknown field; remove it"),
    ],
)
def test_invalid_queries(classes: Service, query: str, line: str) -> None:
    (answer,) = ask(classes, get(f"/images?{query}"))
    assert answer.status_code == 400
    assert answer.json()["error"].startswith(line)


def test_class_options_need_a_model_with_classes(stochastic: Service) -> None:
    for query in ("class=1", "guidance=2"):
        (answer,) = ask(stochastic, get(f"/images?{query}"))
        assert (answer.status_code, "the model has no classes" in answer.text) == (400, True)


def test_a_distilled_model_takes_no_guidance() -> None:
    student = shared("consistency", True)
    refused, drawn = ask(student, get("/images?guidance=1"), get("/images?n=2&seed=7&class=2&steps=2"))
    assert (refused.status_code, refused.json()["error"]) == (
        400,
        "guidance: the model is distilled, with guidance built in; omit it",
    )
    normal = np.stack([golden.normal(7, index, SHAPE) for index in range(2)])
    same(cells(drawn, 4, 2, 2), direct(student, noise=normal, steps=[2], y=[2, 2])["images"])


def test_the_size_of_a_grid_is_limited(classes: Service, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("deploy.service.pictures.MAX_SIDE", 100)
    (answer,) = ask(classes, get("/images?n=16&scale=8"))
    assert (answer.status_code, "lower n or scale" in answer.text) == (400, True)


@pytest.mark.parametrize(("channels", "mode"), [(1, "L"), (2, "L"), (3, "RGB"), (4, "RGBA"), (6, "RGB")])
def test_grids_of_any_number_of_channels(channels: int, mode: str) -> None:
    images = np.random.default_rng(0).integers(0, 256, (1, 2, 3, channels), dtype=np.uint8)
    grid = Image.open(io.BytesIO(png(images, 1)))
    assert grid.mode == mode
    shown = images[0, ..., : len(mode)]
    np.testing.assert_array_equal(np.asarray(grid)[1:3, 1:4].reshape(shown.shape), shown)


def test_etags_that_a_client_has(classes: Service) -> None:
    """A list, in one header or several, * and strong ones, as a proxy may make of a weak one."""
    (first,) = ask(classes, get("/images?n=1&seed=1"))
    tag = first.headers["ETag"]
    given = [f'"a", {tag}', tag.removeprefix("W/"), "*", "", f'W/"{tag[3:-1]}0"', f"x{tag}", "x"]
    requests = [get("/images?n=1&seed=1", **{"If-None-Match": each}) for each in given]
    requests.append(httpx.Request("GET", requests[0].url, headers=[("If-None-Match", '"a"'), ("If-None-Match", tag)]))
    assert [each.status_code for each in ask(classes, *requests)] == [304, 304, 304, 200, 200, 200, 200, 304]
