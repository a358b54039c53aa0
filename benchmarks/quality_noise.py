"""How many samples tell which difference: the figures of evaluate for many sets of samples, by the size of the sets.

Run it in a working tree with data/pairs and models/ddpm (see `ddpm apply`):

    python benchmarks/quality_noise.py --out reports/quality_noise.csv

The sets are drawn with the sampler in params.yaml, in its number of steps and in fewer. Sets of the same setting differ
by chance alone, which is the noise of the measurement; those of fewer steps have a true difference, which a figure
either shows or not. All sets are compared with the same training images. A setting counts as told apart from the first
in the share of pairs of sets whose difference exceeds 1.96 standard deviations of such a difference by chance.
"""

import argparse
import csv
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # in case the project is not installed

from diffusion.errors import UserError
from diffusion.evaluation import distances, sets
from diffusion.evaluation.features import Features, trained_features
from diffusion.evaluation.quality import MAX_REFERENCE
from diffusion.model import load_model
from diffusion.pairs.pairs import Pairs
from flows import params as parameters
from flows.paths import Paths

Array = NDArray[np.float64]
Row = dict[str, Any]
Z = 1.96
METRICS = ("frechet_distance", "kid", "precision", "recall", "density", "coverage")


def figures(x: Array, y: Array) -> Mapping[str, float]:
    """The figures of a set of features, compared with those of training images."""
    found = {"frechet_distance": distances.frechet(x, y), "kid": distances.kid(x, y)}
    return {name: float(values.mean()) for name, values in (found | distances.neighbours(x, y)._asdict()).items()}


def summarize(measured: Mapping[int, Mapping[int, list[Mapping[str, float]]]]) -> list[Row]:
    """A row for each figure, size of the sets and number of steps.

    measured: the figures of each set, by size and number of steps; the first number is what others are told apart from.
    """
    rows = []
    for size, by_steps in measured.items():
        first = next(iter(by_steps))
        for metric in METRICS:
            base = np.array([each[metric] for each in by_steps[first]])
            for steps, found in by_steps.items():
                values = np.array([each[metric] for each in found])
                sd = float(np.sqrt((base.var(ddof=1) + values.var(ddof=1)) / 2))
                apart = np.abs(values[:, None] - base) > Z * np.sqrt(2) * sd
                rows.append(
                    {
                        "metric": metric,
                        "images": size,
                        "steps": steps,
                        "sets": len(values),
                        "mean": float(values.mean()),
                        "sd": float(values.std(ddof=1)),
                        "told_apart": float(apart.mean()) if steps != first else "",
                    }
                )
    return rows


def table(rows: list[Row]) -> str:
    """Markdown: mean ± standard deviation over sets, and the share of sets told apart from the first setting."""
    steps = list(dict.fromkeys(row["steps"] for row in rows))
    lines = [
        "| figure | images | " + " | ".join(f"{number} steps" for number in steps) + " |",
        "|---|---|" + "---|" * len(steps),
    ]
    for metric in METRICS:
        for size in dict.fromkeys(row["images"] for row in rows):
            cells = [
                f"{row['mean']:.3f} ± {row['sd']:.3f}"
                + (f" ({row['told_apart']:.0%})" if row["told_apart"] != "" else "")
                for row in rows
                if (row["metric"], row["images"]) == (metric, size)
            ]
            lines.append(f"| {metric} | {size} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, nargs="+", default=[64, 128, 256, 512], help="sizes of the sets")
    parser.add_argument("--steps", type=int, nargs="+", default=[50, 20, 10, 5], help="numbers of sampling steps")
    parser.add_argument("--sets", type=int, default=10, help="number of sets of each size (default %(default)s)")
    parser.add_argument("--out", type=Path, required=True, help="CSV file to write")
    arguments = parser.parse_args()
    try:
        rows = measure(Paths(Path()), arguments.images, arguments.steps, arguments.sets)
    except UserError as error:
        print(f"quality_noise.py: error: {error}", file=sys.stderr)
        return 1
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    with arguments.out.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0], lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(table(rows))
    print(json.dumps({"benchmark": "quality_noise", "rows": rows}))
    return 0


def measure(paths: Paths, sizes: list[int], steps: list[int], count: int) -> list[Row]:
    """Draw the sets and compare them; sets of a size are parts of the same samples."""
    params, device = parameters.load(paths.params), torch.device("cpu")
    model, train = load_model(paths.model, device), Pairs(paths.pairs, "train")
    features: Features = trained_features(train, paths.features)
    real = sets.chosen([train], MAX_REFERENCE)
    y = features(real.pixels)
    labels = np.resize(real.labels, count * max(sizes))
    measured: dict[int, dict[int, list[Mapping[str, float]]]] = {size: {} for size in sizes}
    for number in steps:
        options = params.sample.model_copy(update={"steps": number})
        with tqdm(total=sets.batches(len(labels)) * number, desc=f"{number} steps", disable=None) as bar:
            samples = sets.samples(model, options, params.seed, device, labels, lambda: bar.update() and None)
        x = features(samples.pixels)
        for size in sizes:
            measured[size][number] = [figures(part, y) for part in np.split(x[: count * size], count)]
    return summarize(measured)


if __name__ == "__main__":
    sys.exit(main())
