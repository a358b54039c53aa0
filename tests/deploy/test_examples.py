"""The example programs, run as a user runs them."""

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

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


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "sampler.onnx", "dpm-solver++", False)


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


def expected(model: Path, noise: NDArray[np.float32]) -> NDArray[np.uint8]:
    """The sampler's own output for `noise`."""
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    images: NDArray[np.uint8] = session.run(["images"], {"noise": noise, "steps": np.array([0])})[0]
    assert images.std() > 1
    assert len({image.tobytes() for image in images}) == 16
    return images


def as_grey(noise: NDArray[np.float32]) -> NDArray[np.uint8]:
    """What the graph of `grey` computes."""
    return np.clip(noise * np.float32(50) + 128, 0, 255).astype(np.uint8).reshape(16, 7, 10, 1)


def test_python(root: Path, model: Path, tmp_path: Path) -> None:
    example, out = root / "deploy" / "examples" / "sample.py", tmp_path / "images.png"
    done = subprocess.run([sys.executable, example, model, out], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    noise = np.random.default_rng(7).standard_normal((16, *SHAPE), np.float32)
    assert np.array_equal(cells(out), expected(model, noise))


def test_python_with_grey_images(root: Path, grey: Path, tmp_path: Path) -> None:
    example, out = root / "deploy" / "examples" / "sample.py", tmp_path / "images.png"
    done = subprocess.run([sys.executable, example, grey, out], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    noise = np.random.default_rng(7).standard_normal((16, 1, 7, 10), np.float32)
    assert np.array_equal(cells(out, "L"), as_grey(noise))


def test_python_with_wrong_arguments(root: Path) -> None:
    example = root / "deploy" / "examples" / "sample.py"
    done = subprocess.run([sys.executable, example, "sampler.onnx"], capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "usage: python sample.py sampler.onnx images.png\n")


def test_python_needs_only_three_packages(root: Path) -> None:
    imported = set[str]()
    for node in ast.walk(ast.parse((root / "deploy" / "examples" / "sample.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime", "PIL"}


def normal(shape: tuple[int, ...]) -> NDArray[np.float32]:
    """The noise (16, C, H, W) of sample.mjs with the random numbers of PARK_MILLER."""
    states = [1]
    for _ in range(2 * 16 * int(np.prod(shape))):
        states.append(states[-1] * 16807 % (2**31 - 1))
    u, v = np.array(states[1:]).reshape(-1, 2).T / (2**31 - 1)
    return (np.sqrt(-2 * np.log(1 - u)) * np.cos(2 * np.pi * v)).astype(np.float32).reshape(16, *shape)


def test_javascript(model: Path, grey: Path, tmp_path: Path, installed: Callable[[str], Path]) -> None:
    node, out = program("nodejs", "node"), tmp_path / "images.png"
    command: list[str | Path] = [node, "--import", PARK_MILLER, installed("examples") / "sample.mjs", model]
    done = subprocess.run([*command, out], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    same(cells(out), expected(model, normal(SHAPE)))
    done = subprocess.run([*command[:-1], grey, out], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    same(cells(out, "L"), as_grey(normal((1, *SHAPE[1:]))))
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (1, "usage: node sample.mjs sampler.onnx images.png\n")
