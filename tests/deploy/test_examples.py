"""The example programs, as a user runs them."""

import ast
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from tests.deploy.models import write_model
from tests.export.test_sampler_graph import SHAPE
from tests.machine import program

pytestmark = pytest.mark.slow

IMAGES = (16, *SHAPE[1:], SHAPE[0])


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("model") / "sampler.onnx", "dpm-solver++", False)


def test_python(root: Path, model: Path, tmp_path: Path) -> None:
    example, out = root / "deploy" / "examples" / "sample.py", tmp_path / "pictures.npy"
    done = subprocess.run([sys.executable, example, model, out], cwd=tmp_path, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")
    images = np.load(out)
    assert (images.dtype, images.shape) == (np.uint8, IMAGES)
    assert images.std() > 1
    noise = np.random.default_rng(7).standard_normal((16, *SHAPE), np.float32)
    session = ort.InferenceSession(model, providers=["CPUExecutionProvider"])
    assert np.array_equal(images, session.run(["images"], {"noise": noise, "steps": np.array([0])})[0])


def test_python_needs_numpy_and_onnxruntime_alone(root: Path) -> None:
    imported = set[str]()
    for node in ast.walk(ast.parse((root / "deploy" / "examples" / "sample.py").read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            imported |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add((node.module or "").split(".")[0])
    assert imported - sys.stdlib_module_names == {"numpy", "onnxruntime"}


def test_javascript(model: Path, tmp_path: Path, installed: Callable[[str], Path]) -> None:
    node, out = program("nodejs", "node"), tmp_path / "pictures.bin"
    example = installed("examples") / "sample.mjs"
    done = subprocess.run([node, example, model, out], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["[", *(f"{side}," for side in IMAGES[:-1]), str(IMAGES[-1]), "]"]
    images = np.fromfile(out, np.uint8)
    assert images.size == np.prod(IMAGES)
    assert images.std() > 1
    assert len({image.tobytes() for image in images.reshape(IMAGES)}) == 16
