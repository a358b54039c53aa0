"""Training on few emoji with and without augmentation: held-out error, and samples that copy training images.

    python benchmarks/augmentation.py data/raw/emoji.zip --images 300 500 --out reports/augmentation

writes a grid of samples of each training, and prints a table and a JSON line. The archive is that of `make emoji`.
Pictures with a skin tone are left out: they are near-copies of others, and would be so across training and held-out
images. The held-out images are the same for all trainings; the training images depend on the seed.
"""

import argparse
import json
import math
import re
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

from diffusion.evaluation.memorisation import nearest
from diffusion.model import Model
from diffusion.nn.unet import UNetOptions
from diffusion.pairs.memory import Blocks, Images
from diffusion.pairs.noise import BLOCK
from diffusion.pairs.pairs import Batches
from diffusion.pairs.pixels import Fit, to_x_0
from diffusion.process.parameterization import split
from diffusion.samples import save_grid
from diffusion.sources.sources import open_source
from diffusion.training import loop
from diffusion.training.curves import best
from diffusion.training.options import MuonOptions, TrainOptions
from diffusion.training.state import new_state

SIDE, HELD_OUT, POINTS, SAMPLES = 16, 256, 12, 64
SKIN_TONE = re.compile("1f3f[b-f]")
Row = dict[str, Any]
Pixels = NDArray[np.uint8]
"""(N, C, H, W)"""


def emoji(archive: Path) -> Pixels:
    """All pictures without a skin tone."""
    found = [sample for sample in open_source(archive) if not SKIN_TONE.search(str(sample.file))]
    return np.stack([Fit(3, SIDE, SIDE)(sample.decode().image) for sample in found])


def in_memory(pixels: Pixels, seed: int, num_timesteps: int) -> Blocks:
    return Blocks(Images(pixels, np.full(len(pixels), -1)), seed, num_timesteps)


@torch.inference_mode()
def mse(model: Model, images: Blocks, draws: int = 2) -> float:
    """Noise MSE of unaugmented images, at the same timesteps and noise for every model."""
    total = 0.0
    for draw in range(draws):
        for block in range(math.ceil(images.images / BLOCK)):
            t, eps = (torch.from_numpy(array) for array in images.recipe(block, draw))
            x_t = model.process.schedule.diffuse(torch.from_numpy(to_x_0(images.x_0(block), np.float32)), t, eps)
            out, _ = split(model.net(x_t, t), len(eps[0]))
            error = model.process.parameterization.to_eps(out, x_t, t) - eps
            total += float(error.square().mean(dim=(1, 2, 3)).sum())
    return total / (draws * images.images)


def train(training: Pixels, held_out: Pixels, options: TrainOptions, seed: int) -> tuple[list[Row], Row, Pixels]:
    """Train; returns errors during training, figures at the end, and samples."""
    augment = options.augmentation(len(training))
    model = Model.new((3, SIDE, SIDE), UNetOptions(patch_size=2, channel_multipliers=(1, 2), dropout=0.1), seed=seed)
    state = new_state(model.net.train().requires_grad_(True), options, model.process.schedule, augmented=augment > 0)  # type: ignore[arg-type]
    model = Model(state.average, model.process, model.config)
    T = model.process.schedule.num_timesteps
    seen, unseen = in_memory(training, seed, T), in_memory(held_out, 0, T)
    fetch = Batches(seen, seed, options.batch_size, augment=augment)
    trainer = loop.Trainer(options, seed, model.process.loss, fetch, state.net)
    curve, began = [], time.perf_counter()
    for step in range(1, options.steps + 1):
        loop.step(state, trainer)
        if step % (options.steps // POINTS) == 0:
            curve.append({"step": step, "mse": mse(model, unseen), "training_mse": mse(model, seen)})
    seconds = time.perf_counter() - began
    samples = model.sample(SAMPLES, seed=seed, sampler="dpm-solver++", steps=25)
    distance, usual = (nearest(images, seen).distance for images in (samples, held_out))
    figures = {
        "images": len(training),
        "augment": augment,
        "seed": seed,
        "best_mse": best(curve)["mse"],
        "best_step": best(curve)["step"],
        "mse": curve[-1]["mse"],
        "training_mse": curve[-1]["training_mse"],
        # Samples nearer to a training image than 95 % of the held-out images are.
        "copies": float((distance < np.quantile(usual, 0.05)).mean()),
        "distance": float(np.median(distance) / np.median(usual)),
        "seconds": seconds,
    }
    return curve, figures, samples


def spread(rows: list[Row]) -> Iterator[str]:
    """A Markdown table: mean over seeds, and the lowest and highest."""
    columns = ["best_mse", "mse", "training_mse", "copies", "distance"]
    yield "| images | augment | seeds | " + " | ".join(columns) + " |"
    yield "|---" * (3 + len(columns)) + "|"
    for images, augment in sorted({(row["images"], row["augment"]) for row in rows}):
        found = [row for row in rows if (row["images"], row["augment"]) == (images, augment)]
        cells = []
        for column in columns:
            values = [row[column] for row in found]
            cells.append(f"{np.mean(values):.4f} ({min(values):.4f} to {max(values):.4f})")
        yield f"| {images} | {augment} | {len(found)} | " + " | ".join(cells) + " |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("archive", type=Path, help="emoji.zip, as data/emoji.py writes it")
    parser.add_argument("--images", type=int, nargs="+", default=[300], help="numbers of training images")
    parser.add_argument("--augment", type=float, nargs="+", default=[0.0, 0.12], help="values of train.augment")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], help="seeds")
    parser.add_argument("--steps", type=int, default=3000, help="optimizer steps per training")
    parser.add_argument("--out", type=Path, required=True, help="folder for the grids of samples")
    arguments = parser.parse_args()

    torch.set_num_threads(1)
    pixels = emoji(arguments.archive)
    order = np.random.default_rng(0).permutation(len(pixels))
    held_out, others = pixels[order[:HELD_OUT]], pixels[order[HELD_OUT:]]
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[Row] = []
    cases = [(n, seed, p) for n in arguments.images for seed in arguments.seeds for p in arguments.augment]
    for images, seed, augment in tqdm(cases, disable=None):
        training = others[np.random.default_rng(seed).permutation(len(others))[:images]]
        options = TrainOptions(
            steps=arguments.steps,
            batch_size=32,
            learning_rate=0.004,
            optimizer=MuonOptions(learning_rate=0.02),
            augment=augment,
        )
        curve, figures, samples = train(training, held_out, options, seed)
        rows.append(figures)
        print(json.dumps({"benchmark": "augmentation", **figures, "curve": curve}), flush=True)
        save_grid(samples, arguments.out / f"{images}-images-augment-{augment}-seed-{seed}.png")
    print("\n".join(spread(rows)))


if __name__ == "__main__":
    main()
