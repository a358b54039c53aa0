"""Whether perceptual hashes tell copies of images from similar ones, by image size, as a table and one JSON line.

    python benchmarks/near_duplicates.py PATH --size 64 32 28 24 16

takes images at random, resizes them to each size, and compares the hashes of all pairs, and those of each image and its
changed copies. "pairs" is the number of pairs of different images that count as near-duplicates, with the share of them
that differ by more than 20 grey levels (root mean square); the other columns are shares of copies that are recognized.
"""

import argparse
import io
import json
from collections.abc import Iterator
from pathlib import Path
from time import process_time
from typing import Any

import numpy as np
from PIL import Image

from diffusion.sources import duplicates
from diffusion.sources.sources import open_source

LANCZOS = Image.Resampling.LANCZOS


def changed(image: Image.Image) -> Iterator[tuple[str, Image.Image]]:
    """Copies of an image that a person would call the same."""
    width, height = image.size
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=80)
    yield "JPEG (quality 80)", Image.open(buffer)
    yield "10 % darker", image.point(lambda value: int(value * 0.9))
    yield "3/4 size and back", image.resize((width * 3 // 4, height * 3 // 4), LANCZOS).resize(image.size, LANCZOS)
    yield "2 % cropped", image.crop((margin := max(1, width // 50), margin, width - margin, height - margin))


def bits(image: Image.Image) -> Any:
    found = duplicates.perceptual_hash(image)
    assert found is not None
    return np.frombuffer(found, np.uint64)


def measure(images: list[Image.Image], size: int) -> dict[str, float]:
    """A row of the table."""
    resized = [image if image.size == (size, size) else image.resize((size, size), LANCZOS) for image in images]
    began = process_time()
    hashes = np.stack([bits(image) for image in resized])
    found: dict[str, float] = {"size": size, "us": round((process_time() - began) / len(images) * 1e6)}
    pixels, rms = np.stack([np.asarray(image, np.float32).ravel() for image in resized]), []
    for index, own in enumerate(hashes):
        distance = np.bitwise_count(hashes[index + 1 :] ^ own).sum(axis=1)
        near = index + 1 + np.flatnonzero(distance <= duplicates.MAX_BITS)
        rms += np.sqrt(np.square(pixels[near] - pixels[index]).mean(axis=1)).tolist()
    found |= {"pairs": len(rms), "of them, different": round(float(np.mean(np.array(rms or [0.0]) > 20)), 2)}
    hits: dict[str, list[bool]] = {}
    for image, own in zip(resized, hashes, strict=True):
        for name, copy in changed(image):
            same = np.bitwise_count(bits(copy.resize((size, size), LANCZOS)) ^ own).sum() <= duplicates.MAX_BITS
            hits.setdefault(name, []).append(bool(same))
    return found | {name: round(float(np.mean(values)), 2) for name, values in hits.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("path", type=Path, help="images in any format that can be imported")
    parser.add_argument("--size", type=int, nargs="+", default=[64, 32, 28, 24, 16], help="sides to resize them to")
    parser.add_argument("--images", type=int, default=1500, help="number of images (default 1500)")
    arguments = parser.parse_args()
    duplicates.MIN_SIDE = 1  # measures below it, too
    duplicates.perceptual_hash(Image.new("L", (32, 32)))  # imports its library
    source = open_source(arguments.path)
    chosen = set(np.random.default_rng(0).permutation(len(source))[: arguments.images].tolist())
    images = []
    for index, sample in enumerate(source):
        if index in chosen:
            image = sample.decode().image
            assert isinstance(image, Image.Image)
            image = image.convert("RGBA")
            images.append(Image.alpha_composite(Image.new("RGBA", image.size, "white"), image).convert("L"))
    rows = [measure(images, size) for size in arguments.size]
    print(f"| {' | '.join(rows[0])} |\n|{'---|' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(map(str, row.values()))} |")
    print(json.dumps({"benchmark": "near_duplicates", "path": str(arguments.path), "rows": rows}))


if __name__ == "__main__":
    main()
