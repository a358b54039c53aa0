"""Reading stored images in a shuffled order: by memory map, by tarfile, and by webdataset's pipeline with a buffer.

    python benchmarks/reading.py

makes shards and pairs of random images by the real stages and reads epochs of each, in processes of their own that take
turns: the images of data/shards (PNG and label) one by one, and the blocks of data/pairs (x_0 and labels). The table
has images/s; CPU time per image; peak private memory, without pages of mapped files, which the system can drop; seconds
to open the files and read the first item; seconds to the item in the middle of an epoch, where a resumed training goes
on; and the mean distance on disk between items read in succession, relative to that in a random permutation.
"""

import argparse
import importlib
import io
import json
import os
import random
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import psutil

from diffusion.pairs.noise import BLOCK
from diffusion.pairs.pairs import Pairs
from diffusion.sources.convert import decode
from diffusion.sources.shards import MANIFEST, Images, Manifest

PRESET = Path(__file__).parents[1] / "presets" / "fashion-mnist.yaml"
SIDE = 32
WATCH_EVERY = 50
"""Number of items between two measurements of the memory."""
Members = dict[str, bytes]
"""Contents of a sample by extension."""


class Kind(NamedTuple):
    """What is read."""

    folder: str
    extensions: tuple[str, str]
    images: int
    """Number of images in an item."""
    parse: Callable[[Members], object]
    """What a reader of tar members has to do with them."""


def _parse_shard(sample: Members) -> object:
    image = decode(sample["png"])
    image.load()  # type: ignore[union-attr]
    return image, json.loads(sample["json"])["label"]


def _parse_pairs(sample: Members) -> object:
    return [np.load(io.BytesIO(sample[extension])) for extension in KINDS["pairs"].extensions]


KINDS = {
    "shards": Kind("data/shards", ("png", "json"), 1, _parse_shard),
    "pairs": Kind("data/pairs", ("x_0.npy", "y.npy"), BLOCK, _parse_pairs),
}
Epoch = Callable[[int], Iterator[int]]
"""Reads an epoch from its item `first` on; gives the position on disk of each."""


def by_map(kind: str, tree: Path, _buffer: int) -> Epoch:
    """Read as the stages do."""
    folder = tree / KINDS[kind].folder
    if kind == "pairs":
        pairs = Pairs(folder, "train")

        def read(block: int) -> object:
            return pairs.x_0(block), pairs.labels(block)

        return lambda first: (block for block in order(pairs.blocks)[first:] if read(block))
    images = Images(folder, Manifest.read(folder / MANIFEST).splits["train"])

    def load(index: int) -> object:
        image, label = images[index]
        image.load()  # type: ignore[union-attr]
        return image, label

    return lambda first: (index for index in order(len(images))[first:] if load(index))


def by_tarfile(kind: str, tree: Path, _buffer: int) -> Epoch:
    _, extensions, _, parse = KINDS[kind]
    found: dict[str, dict[str, tuple[tarfile.TarFile, tarfile.TarInfo]]] = defaultdict(dict)
    for path in tars(kind, tree):
        tar = tarfile.open(path, "r:")  # noqa: SIM115 (open as long as it is read)
        for member in tar:
            key, _, extension = member.name.partition(".")
            found[key][extension] = (tar, member)
    samples = list(found.values())

    def read(number: int) -> object:
        members = {extension: samples[number][extension] for extension in extensions}
        return parse({name: tar.extractfile(member).read() for name, (tar, member) in members.items()})  # type: ignore[union-attr]

    return lambda first: (number for number in order(len(samples))[first:] if read(number))


def by_webdataset(kind: str, tree: Path, buffer: int) -> Epoch:
    """Read with a buffer of so many images; what is before the first item is read, but not parsed."""
    from webdataset import WebDataset

    _, extensions, images, parse = KINDS[kind]
    paths, size = [str(path) for path in tars(kind, tree)], -(-buffer // images)
    samples = WebDataset(paths, shardshuffle=len(paths), seed=0, select_files=lambda name: name.endswith(extensions))
    numbered = samples.compose(lambda items: ({"number": number} | item for number, item in enumerate(items)))
    shuffled = numbered.shuffle(size, initial=size, rng=random.Random(0))
    return lambda first: (sample["number"] for sample in islice(shuffled, first, None) if parse(sample))


PROGRAMS: dict[str, Callable[[str, Path, int], Epoch]] = {
    "memory map": by_map, "tarfile": by_tarfile, "webdataset": by_webdataset,
}  # fmt: skip


def order(items: int) -> list[int]:
    """A permutation."""
    return list(map(int, np.random.default_rng(0).permutation(items)))


def tars(kind: str, tree: Path) -> list[Path]:
    return sorted((tree / KINDS[kind].folder).glob("train-*.tar"))


def count(kind: str, tree: Path) -> tuple[int, int]:
    """Number of training images, and of the items that hold them."""
    manifest = json.loads((tree / KINDS[kind].folder / "manifest.json").read_text())["splits"]["train"]
    return manifest["samples" if kind == "shards" else "images"], manifest.get("blocks", manifest.get("samples"))


def measure(kind: str, program: str, buffer: int, tree: Path, least: float) -> dict[str, float]:
    """Read epochs for at least `least` seconds, in this process."""
    importlib.import_module("webdataset")
    (images, items), process = count(kind, tree), psutil.Process()

    def private() -> int:
        memory = process.memory_info()
        return int(memory.rss - memory.shared)

    before, most, epochs = private(), 0, 0
    began = time.perf_counter()
    epoch = PROGRAMS[program](kind, tree, buffer)
    next(epoch(0))
    opened = time.perf_counter()
    next(epoch(items // 2))
    resumed = time.perf_counter()
    cpu = time.process_time()
    while time.perf_counter() - resumed < least:
        read = []
        for item in epoch(0):
            read.append(item)
            if len(read) % WATCH_EVERY == 0:
                most = max(most, private())
        assert sorted(read) == list(range(items)), "not each item once"
        epochs += 1
    seconds, cpu = time.perf_counter() - resumed, time.process_time() - cpu
    return {
        "images_per_s": epochs * images / seconds,
        "cpu_us": cpu / (epochs * images) * 1e6,
        "mib": max(0, most - before) / 2**20,
        "open_s": opened - began,
        "middle_s": resumed - opened,
        "distance": float(np.abs(np.diff(read)).mean() / (items / 3)),
    }


def make(tree: Path, images: int) -> None:
    """The shards and pairs of random images, by the real stages."""
    from flows import presets  # which the processes that read do not need

    params = presets.load(PRESET).model_dump(mode="json")
    params["shard"] |= {"source": "images.npz", "samples_per_shard": max(1, images // 8)}
    params["pairs"] |= {"channels": 3, "height": SIDE, "width": SIDE}
    (tree / "params.yaml").write_text(json.dumps(params))  # JSON is YAML
    pixels = np.random.default_rng(0).integers(0, 256, (images, SIDE, SIDE, 3), dtype=np.uint8)
    np.savez(tree / "images.npz", images=pixels, labels=np.arange(images) % 10)
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tree}/mlflow.db"}
    for stage in ("shard", "pairs"):
        subprocess.run([sys.executable, "-m", "flows", stage], cwd=tree, env=environment, check=True)


def shown(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def compare(arguments: argparse.Namespace, tree: Path) -> list[dict[str, Any]]:
    make(tree, arguments.images)
    turns = [("memory map", 0), ("tarfile", 0), ("webdataset", arguments.buffer), ("webdataset", arguments.images)]
    rows = []
    for kind in KINDS:
        found: dict[tuple[str, int], list[dict[str, float]]] = {turn: [] for turn in turns}
        for _ in range(arguments.rounds):
            for program, buffer in turns:
                command = [sys.executable, __file__, "--seconds", str(arguments.seconds)]
                command += ["--measure", kind, program, str(buffer), str(tree)]
                done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
                found[program, buffer].append(json.loads(done.stdout))
        for (program, buffer), measured in found.items():
            spread = {}
            for name in measured[0]:
                values = [float(f"{each[name]:.3g}") for each in measured]
                spread[name] = [statistics.median(values), min(values), max(values)]
            rows.append({"data": kind, "program": program, "buffer": buffer, **spread})
            cells = ("{} ({} to {})".format(*map(shown, values)) for values in spread.values())
            print(f"| {kind} | {program}{f', buffer of {buffer:,}' if buffer else ''} | {' | '.join(cells)} |")
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", type=int, default=20_000, help="number of images")
    parser.add_argument("--buffer", type=int, default=2_000, help="number of images in webdataset's buffer")
    parser.add_argument("--rounds", type=int, default=5, help="number of turns")
    parser.add_argument("--seconds", type=float, default=1.0, help="minimum time of reading in each turn")
    parser.add_argument("--measure", nargs=4, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.measure:
        kind, program, buffer, tree = arguments.measure
        print(json.dumps(measure(kind, program, int(buffer), Path(tree), arguments.seconds)))
        return
    with tempfile.TemporaryDirectory() as directory:
        rows = compare(arguments, Path(directory))
    print(json.dumps({"benchmark": "reading", "rows": rows}))


if __name__ == "__main__":
    main()
