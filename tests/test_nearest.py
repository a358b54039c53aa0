"""benchmarks/nearest.py: the nearest training image of each sample."""

import subprocess
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from diffusion.pairs.pairs import Pairs

ROOT = Path(__file__).parents[1]


def test_the_nearest_training_image(pairs_tree: Path, tmp_path: Path) -> None:
    train = Pairs(pairs_tree / "data/pairs", "train")
    images = np.concatenate([train.x_0(block) for block in range(train.blocks)]).astype(int)
    samples = np.random.default_rng(0).integers(0, 256, (3, *train.shape))
    samples[1] = images[5]
    distances = np.sqrt(((samples[:, None] - images) ** 2).mean(axis=(2, 3, 4)))  # (samples, images)
    np.savez(tmp_path / "s.npz", images=samples.astype(np.uint8).transpose(0, 2, 3, 1))
    command = [sys.executable, ROOT / "benchmarks/nearest.py", tmp_path / "s.npz", "--pairs", pairs_tree / "data/pairs"]
    done = subprocess.run([*command, "--out", tmp_path / "n.png"], capture_output=True, text=True, check=True)
    ours, held_out = done.stdout.splitlines()
    expected = ", ".join(f"{value:.1f}" for value in np.quantile(distances.min(axis=1), [0, 0.25, 0.5, 0.75, 1]))
    assert ours == f"3 samples: distance to the nearest training image, quartiles {expected}"
    assert expected.startswith("0.0, ")
    assert held_out.startswith(f"{Pairs(pairs_tree / 'data/pairs', 'test').images} test images: ")
    scale, (_, height, width) = 512 // (3 * 8), train.shape
    grid = np.asarray(Image.open(tmp_path / "n.png"))
    cells = [grid[1 + row * (height * scale + 1) :: scale, 1 : width * scale : scale][:height] for row in range(2)]
    np.testing.assert_array_equal(cells[0], samples[0, 0])
    np.testing.assert_array_equal(cells[1], images[distances[0].argmin(), 0])


def test_what_cannot_be_compared_is_named(pairs_tree: Path, tmp_path: Path) -> None:
    np.savez(tmp_path / "s.npz", images=np.zeros((1, 9, 9, 1), np.uint8))
    command = [sys.executable, ROOT / "benchmarks/nearest.py", tmp_path / "s.npz", "--pairs", pairs_tree / "data/pairs"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "images (1, 9, 9), but the pairs have (1, 8, 8)" in done.stderr
