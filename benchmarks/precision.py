"""Whether samples in lower precision are worse: sampler.onnx and its variants, from the same noise.

Run it in a working tree whose models/onnx has variants (`export.variants`):

    python benchmarks/precision.py

Several sets of images are made in each precision. The same noise gives other images in another precision; their mean
difference is that of their grey levels, and says nothing about which are better. Quality is the Fréchet distance and
the kernel distance of each set to training images, in the features that `evaluate` uses, and their difference from
those of float32 with the same noise: mean and standard deviation over the sets.
"""

import argparse
import json
from pathlib import Path
from typing import Any

import numpy as np
from frechet import Frechet, Images
from numpy.typing import NDArray

from diffusion.export import golden, runtime
from diffusion.progress import Progress
from flows.paths import Paths

BATCH = 64


def sampled(path: Path, count: int, seed: int) -> Images:
    """Images (count, C, H, W) of a sampler, whose noise depends on the seed alone; the classes take turns."""
    session, parts = runtime.session(path.read_bytes(), None), []
    facts = session.get_modelmeta().custom_metadata_map
    for number, first in enumerate(range(0, count, BATCH)):
        size = min(BATCH, count - first)
        feed = golden.inputs(golden.names(session), facts, 10_000 * seed + number, size)
        parts.append(session.run(["images"], feed)[0].transpose(0, 3, 1, 2))
    return np.concatenate(parts)


def spread(values: NDArray[np.float64]) -> str:
    return f"{values.mean():.3f} ± {values.std(ddof=1):.3f}"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--tree", type=Path, default=Path(), help="working tree with data, models and features")
    parser.add_argument("--count", type=int, default=512, help="images of a set (default %(default)s)")
    parser.add_argument("--sets", type=int, default=5, help="sets, at least 2 (default %(default)s)")
    arguments = parser.parse_args()

    paths = Paths(arguments.tree)
    distance_of = Frechet(paths, arguments.count)
    files = sorted(paths.onnx.glob("sampler*.onnx"))  # sampler.onnx is the first
    rows = list[dict[str, Any]]()
    with Progress("precision", arguments.sets * len(files), "sets") as progress:
        for seed in range(arguments.sets):
            for file in files:
                images = sampled(file, arguments.count, seed)
                if file == files[0]:
                    exact = images.astype(int)
                distances = {"frechet": distance_of(images), "kid": distance_of.kid(images)}
                rows.append(
                    {"file": file.name, "seed": seed, "apart": float(np.abs(images - exact).mean())} | distances
                )
                progress.advance(1)
    print(f"Real images: Fréchet distance {distance_of.real:.3f} ({distance_of.description})\n")
    print("| | grey levels apart | Fréchet | more than float32 | KID | more than float32 |\n|---|---|---|---|---|---|")
    for file in files:
        of = {
            name: np.array([row[name] for row in rows if row["file"] == file.name])
            for name in ("apart", "frechet", "kid")
        }
        first = {
            name: np.array([row[name] for row in rows if row["file"] == files[0].name]) for name in ("frechet", "kid")
        }
        cells = [cell for name in first for cell in (spread(of[name]), spread(of[name] - first[name]))]
        print(f"| {file.name} | {of['apart'].mean():.1f} | {' | '.join(cells)} |")
    print(json.dumps({"benchmark": "precision", "rows": rows}))


if __name__ == "__main__":
    main()
