"""Sample quality of each sampler by number of function evaluations (NFE): a table, a figure and a JSON line.

Run it in a working tree with data/pairs and models/ddpm, written by `dvc repro` (or `ddpm shard`, `pairs` and `train`):

    python benchmarks/sampling_quality.py --count 1000 --out reports/samplers

Quality is the Fréchet distance to training images in the features of a small network trained on them, as in
reports/evaluation/quality.csv. It decreases with the number of images, so that of as many other training images is
shown for comparison. Heun needs two evaluations per step, so it takes half as many steps.
"""

import argparse
import csv
import json
import sys
import time
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import torch
from frechet import Frechet, Images
from PIL import Image
from tqdm import tqdm

from diffusion.model import Model, load_model
from diffusion.samples import draw_samples, grid_png
from diffusion.sampling.build import SampleOptions
from flows.paths import Paths

BATCH = 64
SPACINGS = ("linspace", "quadratic", "log-snr")
SAMPLERS = {
    "ddpm, fixed-small": {"sampler": "ddpm", "variance": "fixed-small"},
    "ddpm, fixed-large": {"sampler": "ddpm", "variance": "fixed-large"},
    "ddpm, analytic": {"sampler": "ddpm", "variance": "analytic"},
    "ddim": {"sampler": "ddim"},
    "dpm-solver++": {"sampler": "dpm-solver++"},
    "dpm-solver++-sde": {"sampler": "dpm-solver++-sde"},
    "heun": {"sampler": "heun"},
}


@dataclass(frozen=True)
class Setting:
    """One cell of the table."""

    name: str
    spacing: str
    evaluations: int
    """Network evaluations per image."""

    def options(self, count: int) -> SampleOptions:
        return SampleOptions.model_validate(
            {
                "spacing": self.spacing,
                "steps": max(self.evaluations // 2, 1) if self.name == "heun" else self.evaluations,
                "variance": "fixed-small",
                "threshold": "clip",
                "guidance": 1.0,
                "count": count,
            }
            | SAMPLERS[self.name]
        )


def draw(model: Model, setting: Setting, count: int, device: torch.device) -> Images:
    parts = [
        draw_samples(model, setting.options(min(BATCH, count - first)), 0, device, first=first)
        for first in range(0, count, BATCH)
    ]
    return np.concatenate(parts)


def settings(evaluations: list[int], samplers: list[str], num_timesteps: int) -> list[Setting]:
    """All combinations; only one spacing if there are as many steps as timesteps, since all spacings then coincide."""
    return [
        Setting(name, spacing, n)
        for n in evaluations
        for name in samplers
        for spacing in (SPACINGS if n < num_timesteps else SPACINGS[:1])
    ]


def picture(best: dict[tuple[str, int], Images], samplers: list[str], evaluations: list[int], path: Path) -> None:
    """Plot nine images of each cell."""
    figure, axes = plt.subplots(
        len(samplers),
        len(evaluations),
        figsize=(2.0 * len(evaluations) + 1.6, 2.05 * len(samplers)),
        squeeze=False,
        dpi=80,
    )
    for row, name in enumerate(samplers):
        for column, n in enumerate(evaluations):
            axis = axes[row][column]
            axis.imshow(Image.open(BytesIO(grid_png(best[name, n][:9], side=150))), cmap="gray")
            axis.set_xticks([])
            axis.set_yticks([])
            if row == 0:
                axis.set_title(f"{n} evaluations")
            if column == 0:
                axis.set_ylabel(name)
    figure.tight_layout()
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, metadata={"Software": None})


def table(rows: list[dict[str, Any]], samplers: list[str], evaluations: list[int], real: float) -> str:
    """Markdown table of the best spacing for each sampler and number of evaluations."""
    lines = [
        f"| sampler | {' | '.join(f'{n} evaluations' for n in evaluations)} |",
        f"|---|{'---|' * len(evaluations)}",
    ]
    for name in samplers:
        cells = []
        for n in evaluations:
            best = min(
                (row for row in rows if row["sampler"] == name and row["evaluations"] == n), key=lambda r: r["frechet"]
            )
            cells.append(f"{best['frechet']:.2f}" + (f" ({best['spacing']})" if n < evaluations[-1] else ""))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    lines.append(f"| *as many training images* | {' | '.join([f'{real:.2f}'] * len(evaluations))} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tree", type=Path, default=Path(), help="working tree with data/pairs and models/ddpm")
    parser.add_argument("--count", type=int, default=1000, help="images per setting")
    parser.add_argument(
        "--evaluations", type=int, nargs="+", default=[10, 20, 50, 1000], help="numbers of network evaluations"
    )
    parser.add_argument("--samplers", nargs="+", choices=SAMPLERS, default=list(SAMPLERS), help="samplers to compare")
    parser.add_argument("--out", type=Path, required=True, help="where to write OUT.csv and OUT.png")
    arguments = parser.parse_args()

    paths, device = Paths(arguments.tree), torch.device("cpu")
    model, distance_of = load_model(paths.model, device), Frechet(paths, arguments.count)
    rows: list[dict[str, Any]] = []
    best: dict[tuple[str, int], Images] = {}
    progress = tqdm(settings(arguments.evaluations, arguments.samplers, model.process.schedule.num_timesteps))
    for setting in progress:
        began = time.perf_counter()
        images = draw(model, setting, arguments.count, device)
        seconds, distance = time.perf_counter() - began, distance_of(images)
        progress.write(
            f"{setting.evaluations:5} evaluations, {setting.name}, {setting.spacing}: {distance:.2f}", sys.stderr
        )
        cell = [
            row["frechet"]
            for row in rows
            if (row["sampler"], row["evaluations"]) == (setting.name, setting.evaluations)
        ]
        if not cell or distance < min(cell):
            best[setting.name, setting.evaluations] = images
        rows.append(
            {
                "sampler": setting.name,
                "spacing": setting.spacing,
                "evaluations": setting.evaluations,
                "frechet": distance,
                "images_per_second": arguments.count / seconds,
            }
        )
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.with_suffix(".csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    picture(best, arguments.samplers, arguments.evaluations, arguments.out.with_suffix(".png"))
    print(table(rows, arguments.samplers, arguments.evaluations, distance_of.real))
    print(f"\n{distance_of.description}")
    facts = {"count": arguments.count, "real": distance_of.real, "features": distance_of.description, "rows": rows}
    print(json.dumps({"benchmark": "sampling_quality", **facts}))


if __name__ == "__main__":
    main()
