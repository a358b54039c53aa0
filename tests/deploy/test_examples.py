"""The example programs, run as a user runs them."""

import ast
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx.parser
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from PIL import Image

from tests.deploy.models import write_model
from tests.deploy.services import same
from tests.export.test_sampler_graph import SHAPE
from tests.machine import program

pytestmark = pytest.mark.slow

SCALE = 128 // SHAPE[2]
PARK_MILLER = (
    "data:text/javascript,let state = 1; Math.random = () => (state = (state * 16807) %25 2147483647) / 2147483647"
)
"""Replaces JavaScript's random numbers, which cannot be seeded, by a generator that is easily computed elsewhere."""
CLASSES = ["2", "cat", "0"]
"""Two of them have the number of another as their name."""
KINDS: dict[str, tuple[list[str], dict[str, Any]]] = {
    "dpm-solver++": (["--class", "cat"], {"y": 1, "guidance": 2.5}),
    "ddpm": (["--class=1", "--guidance=-1.5"], {"y": 1, "guidance": -1.5}),
    "consistency": (["--class", "0"], {"y": 2}),
}
"""Options, by sampler, for a model with CLASSES, and the inputs that they mean. Distilled models take no guidance."""
REFUSED = {
    ("--class", "3"): "--class: must be one of 2, cat, 0, or a number below 3 (got 3)",
    ("--guidance", "3"): "--guidance: the model does not take it",
}
"""Options of the distilled model, and what is said."""


@pytest.fixture(scope="module", params=KINDS)
def kind(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, Path]:
    """A sampler, and a model with classes that samples by it."""
    path = write_model(tmp_path_factory.mktemp("kind") / "sampler.onnx", request.param, True)
    graph = onnx.load(path)
    facts = {entry.key: entry.value for entry in graph.metadata_props} | {"ddpm.classes": json.dumps(CLASSES)}
    onnx.helper.set_model_props(graph, facts)
    onnx.save(graph, path)
    return request.param, path


@pytest.fixture(scope="module")
def grey(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A graph with the inputs and outputs of a sampler, whose images are 50 times the noise around 128."""
    path = tmp_path_factory.mktemp("grey") / "sampler.onnx"
    onnx.save(
        onnx.parser.parse_model("""<ir_version: 9, opset_import: ["" : 20]>
            sampler (float[B, 1, 7, 10] noise, int64[1] steps) => (uint8[B, 7, 10, 1] images) {
                scale = Constant <value_float = 50.0> ()
                middle = Constant <value_float = 128.0> ()
                low = Constant <value_float = 0.0> ()
                high = Constant <value_float = 255.0> ()
                scaled = Mul (noise, scale)
                values = Add (scaled, middle)
                clipped = Clip (values, low, high)
                rows = Transpose <perm = [0, 2, 3, 1]> (clipped)
                images = Cast <to = 2> (rows)
            }"""),
        path,
    )
    return path


def cells(path: Path, mode: str = "RGB") -> NDArray[np.uint8]:
    """The 16 images (16, H, W, C) in a PNG; each of their pixels must be a square of SCALE x SCALE."""
    height, width = (side * SCALE for side in SHAPE[1:])
    with Image.open(path) as png:
        assert (png.format, png.mode, png.size) == ("PNG", mode, (4 * width, 4 * height))
        grid = np.array(png).reshape(4 * height, 4 * width, -1)
    tops, lefts = np.divmod(np.arange(16), 4)
    large = np.stack([grid[y : y + height, x : x + width] for y, x in zip(height * tops, width * lefts, strict=True)])
    small = large[:, ::SCALE, ::SCALE]
    assert np.array_equal(large, np.kron(small, np.ones((1, SCALE, SCALE, 1), np.uint8)))
    return small


def expected(model: Path, noise: NDArray[np.float32], **further: Any) -> NDArray[np.uint8]:
    """The sampler's own output for `noise`."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    given = {"noise": noise, "steps": np.array([0])} | further
    images: NDArray[np.uint8] = session.run(["images"], {each.name: given[each.name] for each in session.get_inputs()})[
        0
    ]
    assert images.std() > 1
    assert len({image.tobytes() for image in images}) == 16
    return images


def meant(inputs: dict[str, Any]) -> dict[str, Any]:
    return {"y": np.full(16, inputs["y"]), "guidance": np.array([inputs.get("guidance")], np.float32)}


def as_grey(noise: NDArray[np.float32]) -> NDArray[np.uint8]:
    """What the graph of `grey` computes."""
    return np.clip(noise * np.float32(50) + 128, 0, 255).astype(np.uint8).reshape(16, 7, 10, 1)


def test_python_with_grey_images_and_no_classes(root: Path, grey: Path, tmp_path: Path) -> None:
    example, out = root / "deploy" / "examples" / "sample.py", tmp_path / "images.png"
    done = subprocess.run([sys.executable, example, grey, out], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    noise = np.random.default_rng(7).standard_normal((16, 1, 7, 10), np.float32)
    assert np.array_equal(cells(out, "L"), as_grey(noise))


def test_python_with_every_kind_of_model(root: Path, kind: tuple[str, Path], tmp_path: Path) -> None:
    (sampler, model), out = kind, tmp_path / "images.png"
    command: list[str | Path] = [sys.executable, root / "deploy" / "examples" / "sample.py", model, out]
    options, inputs = KINDS[sampler]
    done = subprocess.run([*command, *options], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    normal = np.random.default_rng(7).standard_normal
    noise, steps_noise = normal((16, *SHAPE), np.float32), normal((4, 16, *SHAPE), np.float32)
    assert np.array_equal(cells(out), expected(model, noise, steps_noise=steps_noise, **meant(inputs)))
    if sampler == "consistency":
        for wrong, words in REFUSED.items():
            refused(words, *command, *wrong)
        assert np.array_equal(cells(out), expected(model, noise, **meant(inputs)))
        subprocess.run(command, check=True)
        assert np.array_equal(cells(out), expected(model, noise, **meant({"y": -1})))


def refused(words: str, *command: str | Path) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    (line,) = done.stderr.splitlines()
    assert words in line
    assert done.returncode == 1


def test_python_with_wrong_arguments(root: Path, grey: Path, tmp_path: Path) -> None:
    example = root / "deploy" / "examples" / "sample.py"
    refused("required: images.png", sys.executable, example, "sampler.onnx")
    refused("nowhere.onnx", sys.executable, example, tmp_path / "nowhere.onnx", tmp_path / "images.png")
    refused("--class: the model has no classes", sys.executable, example, grey, tmp_path / "i.png", "--class=0")
    assert not list(tmp_path.iterdir())


def test_python_needs_only_three_packages(root: Path) -> None:
    imported = set[str]()
    for node in ast.walk(ast.parse((root / "deploy" / "examples" / "sample.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime", "PIL"}


def normal(shape: tuple[int, ...], draws: int = 1) -> NDArray[np.float32]:
    """The noise (draws, 16, C, H, W) of sample.mjs with the random numbers of PARK_MILLER."""
    states = [1]
    for _ in range(2 * 16 * draws * int(np.prod(shape))):
        states.append(states[-1] * 16807 % (2**31 - 1))
    u, v = np.array(states[1:]).reshape(-1, 2).T / (2**31 - 1)
    return (np.sqrt(-2 * np.log(1 - u)) * np.cos(2 * np.pi * v)).astype(np.float32).reshape(draws, 16, *shape)


@pytest.fixture(scope="module")
def javascript(installed: Callable[[str], Path]) -> list[str | Path]:
    return [program("nodejs", "node"), "--import", PARK_MILLER, installed("examples") / "sample.mjs"]


def test_javascript(grey: Path, tmp_path: Path, javascript: list[str | Path]) -> None:
    out = tmp_path / "images.png"
    done = subprocess.run([*javascript, grey, out], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    same(cells(out, "L"), as_grey(normal((1, *SHAPE[1:]))[0]))
    refused("usage: node sample.mjs sampler.onnx images.png", *javascript, grey)
    refused("nowhere.onnx", *javascript, tmp_path / "nowhere.onnx", tmp_path / "images.png")
    refused("--class: the model has no classes", *javascript, grey, tmp_path / "i.png", "--class=0")
    refused("ambiguous", *javascript, grey, tmp_path / "i.png", "--guidance", "-1")
    assert list(tmp_path.iterdir()) == [out]


def test_javascript_with_every_kind_of_model(
    kind: tuple[str, Path], tmp_path: Path, javascript: list[str | Path]
) -> None:
    (sampler, model), out = kind, tmp_path / "images.png"
    options, inputs = KINDS[sampler]
    done = subprocess.run([*javascript, model, out, *options], capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    noise, *steps_noise = normal(SHAPE, 5)
    same(cells(out), expected(model, noise, steps_noise=np.stack(steps_noise), **meant(inputs)))
    if sampler == "consistency":
        for wrong, words in REFUSED.items():
            refused(words, *javascript, model, out, *wrong)
        subprocess.run([*javascript, model, out], check=True)
        same(cells(out), expected(model, noise, **meant({"y": -1})))
