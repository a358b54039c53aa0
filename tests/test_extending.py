"""docs/extending.md: each example goes where it says, and all of them together train and sample."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

EXAMPLE = re.compile(
    r"^In `(diffusion/\S+\.py)`.*?```python\n(.*?)```\n\n((?:and in `\w+`\n\n```python\n.*?```\n\n?)+)", re.M | re.S
)
ENTRY = re.compile(r"and in `(\w+)`\n\n```python\n(.*?)```", re.S)
NEW = re.compile(r"^A new file, `(diffusion/\S+\.py)`.*?```python\n(.*?)```", re.M | re.S)
USED = """
import numpy as np
from diffusion import Model, ProcessOptions, TrainOptions, fit, load_images
from pathlib import Path
from diffusion.nn.mlp import MlpOptions

Path("images").mkdir()
for index, pixels in enumerate(np.random.default_rng(0).integers(0, 256, (64, 8, 8), np.uint8)):
    np.save(f"images/{index}.npy", pixels)
images = load_images("images", 8, 8, channels=1)
process = ProcessOptions(schedule="square", parameterization="score", weighting="constant", loss="log-cosh")
model = Model.new(images.shape, MlpOptions(width=16), process)
model = fit(model, images, TrainOptions(steps=2, batch_size=16, timesteps="late"))
restart = {"sampler": {"kind": "restart", "contrast": 0.9}, "spacing": "cubic"}
for options in (restart, {"sampler": "ddpm", "variance": "halfway"}):
    print(model.sample(4, steps=5, **options).shape)
model.save("model")
print(Model.load("model").config.network.width)
"""


def test_the_examples_are_one_file_each_and_work_together(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "diffusion", tmp_path / "diffusion", ignore=shutil.ignore_patterns("__pycache__"))
    examples = EXAMPLE.findall((root / "docs" / "extending.md").read_text(encoding="utf-8"))
    assert len(examples) == 9
    for file, code in NEW.findall((root / "docs" / "extending.md").read_text(encoding="utf-8")):
        (tmp_path / file).write_text(code, encoding="utf-8")
    for file, code, entries in examples:
        path = tmp_path / file
        for registry, entry in ENTRY.findall(entries):
            text = path.read_text(encoding="utf-8")
            (start,) = re.findall(rf"^{registry}: .* = \{{\n", text, flags=re.M)
            path.write_text(text.replace(start, f"{code}\n\n{start}{entry}"), encoding="utf-8")
            code = ""
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", USED], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(4, 1, 8, 8)\n" * 2 + "16\n"
