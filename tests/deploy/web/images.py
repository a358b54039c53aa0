"""Small models for the page, the images it shows, and those that ONNX Runtime computes in Python."""

import struct
from pathlib import Path

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray
from playwright.sync_api import Page, expect
from sklearn.utils import murmurhash3_32  # an independent implementation; installed with mlflow

from tests.deploy.models import write_model
from tests.export.test_sampler_graph import SHAPE

STEPS = 5
"""More than those of a model whose images follow the form."""
OFF_BY_ONE = 0.001
"""Fraction of values allowed to differ by one: WebAssembly sums in another order, which can change the rounding."""
READ = """canvases => canvases.map(canvas => {
    const { width, height, data } = canvas.getContext("2d").getImageData(0, 0, canvas.width, canvas.height);
    return [height, width, [...data]];
})"""


def model(site: Path, sampler: str, classes: bool) -> Path:
    path = site / f"{sampler.replace('+', '')}-{'classes' if classes else 'plain'}.onnx"  # a + in a URL means a space
    return path if path.exists() else write_model(path, sampler, classes, STEPS)


def made(page: Page, count: int, line: str = "") -> NDArray[np.uint8]:
    """Wait until `count` images are ready, and the status has `line`; returns them, uint8 (B, H, W, 3)."""
    expect(page.locator("#status")).to_contain_text(line or f"{count} of {count}, ")
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
