"""docs/extending.md: each example goes where it says, and all of them together train and sample."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

EXAMPLE = re.compile(
    r"^In `(diffusion/\S+\.py)`.*?```python\n(.*?)```\n\nand in `([A-Z]+)`\n\n```python\n(.*?)```", re.M | re.S
)
USED = """
import numpy as np
from diffusion import Model, ProcessOptions, TrainOptions, UNetOptions, fit
from diffusion.data.memory import Images

pixels = np.random.default_rng(0).integers(0, 256, (64, 1, 8, 8), np.uint8)
images = Images(pixels, np.zeros(64, np.int64))
process = ProcessOptions(schedule="square", parameterization="score", weighting="constant", loss="log-cosh")
network = UNetOptions(base_channels=8, channel_multipliers=(1,), attention_levels=())
model = Model.new((1, 8, 8), network, process)
model = fit(model, images, TrainOptions(steps=2, batch_size=16, timesteps="late"))
for options in ({"sampler": "restart", "spacing": "cubic"}, {"sampler": "ddpm", "variance": "halfway"}):
    print(model.sample(4, steps=5, **options).shape)
"""


def test_the_examples_are_one_file_each_and_work_together(root: Path, tmp_path: Path) -> None:
    shutil.copytree(root / "diffusion", tmp_path / "diffusion", ignore=shutil.ignore_patterns("__pycache__"))
    examples = EXAMPLE.findall((root / "docs" / "extending.md").read_text(encoding="utf-8"))
    assert len(examples) == 8
    for file, code, registry, entry in examples:
        path = tmp_path / file
        text = path.read_text(encoding="utf-8")
        (start,) = re.findall(rf"^{registry}: .* = \{{\n", text, flags=re.M)
        path.write_text(text.replace(start, f"{code}\n\n{start}{entry}"), encoding="utf-8")
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", USED], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout == "(4, 1, 8, 8)\n" * 2
