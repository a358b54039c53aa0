"""What the stages `shard` and `pairs`, their files and the readers of these cost per image."""

import hashlib
import io
import os
import shutil
import tarfile
import tracemalloc
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from diffusion.sources import duplicates, shards
from diffusion.sources.sources import open_source
from diffusion.sources.splits import Fractions, Splitter
from diffusion.storage.executors import OWN_PROCESS
from diffusion.storage.files import write_json, write_sums
from diffusion.storage.processes import Processes
from diffusion.storage.tar import SPLITS
from growing.isolated import cost

SIDE = 32
Row = dict[str, Any]


def picture(index: int) -> bytes:
    """A small picture with structure and grain, as PNG."""
    rng = np.random.default_rng(index)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 5, 3), dtype=np.uint8))
    smooth = np.asarray(coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC), np.float64)
    pixels = smooth + rng.normal(0, 3, (SIDE, SIDE, 3))
    file = io.BytesIO()
    Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(file, "PNG")
    return file.getvalue()


def make_tars(folder: Path, images: int, per_tar: int = 1000) -> Path:
    """Webdataset shards of pictures in ten classes."""
    folder.mkdir()
    for first in range(0, images, per_tar):
        with tarfile.open(folder / f"{first // per_tar:05d}.tar", "w") as tar:
            for index in range(first, first + per_tar):
                for extension, content in (("png", picture(index)), ("cls", b"%d" % (index % 10))):
                    member = tarfile.TarInfo(f"{index:09d}.{extension}")
                    member.size = len(content)
                    tar.addfile(member, io.BytesIO(content))
    return folder


def make_files(folder: Path, images: int) -> Path:
    """A folder with a file for each picture, in ten classes."""
    for name in range(10):
        (folder / str(name)).mkdir(parents=True)
    content = picture(0)
    for index in range(images):
        (folder / str(index % 10) / f"{index:09d}.png").write_bytes(content)
    return folder


def stages(source: Path, folder: Path, workers: int) -> Row:
    """Time of the stages' main process per image, in µs, and bytes per image."""
    from diffusion.evaluation import sets  # torch takes seconds to import, for each process
    from diffusion.pairs import pairs

    executor = Processes(workers) if workers > 1 else OWN_PROCESS
    shutil.rmtree(folder, ignore_errors=True)  # of the round before
    target, fractions, alpha_bar = folder / "pairs", Fractions(0.02, 0.02), np.linspace(0.9999, 0.0001, 1000)
    folder.mkdir()
    opened, listing = cost(lambda: open_source(source))
    manifest, sharding = cost(lambda: shards.write(opened, "tars", folder, fractions, 10_000, executor=executor))
    images = {split: shards.Images(folder, contents) for split, contents in manifest.splits.items()}
    settings = pairs.Settings(
        channels=3, height=SIDE, width=SIDE, seed=0, schedule="cosine", num_timesteps=1000, draws=8, heldout_draws=8,
        classes=manifest.classes, shards_sha256="0",
    )  # fmt: skip
    target.mkdir()
    written, pairing = cost(lambda: pairs.write(target, images, settings, alpha_bar, executor=executor))
    made, n = written.splits, len(opened)
    heldout = made["val"].images + made["test"].images
    _, choosing = cost(lambda: sets.chosen([pairs.Pairs(target, "train")], 256))
    tars = [tar for contents in manifest.splits.values() for tar in contents.shards]
    return {
        "list_us": 1e6 * listing.cpu_s / n,
        "shard_us": 1e6 * sharding.cpu_s / n,
        "shard_wall_us": 1e6 * sharding.wall_s / n,
        "pairs_us": 1e6 * pairing.cpu_s / n,
        "pairs_wall_us": 1e6 * pairing.wall_s / n,
        "choose_us": 1e6 * choosing.cpu_s / made["train"].images,
        "shard_bytes": sum(tar.bytes for tar in tars) / n,
        "train_bytes": sum(tar.bytes for tar in made["train"].tars) / made["train"].images,
        "heldout_bytes": sum(tar.bytes for split in ("val", "test") for tar in made[split].tars) / heldout,
    }


def manifest(folder: Path, images: int, per_shard: int, rejected: int) -> Row:
    """Size of a manifest of the shards, and what reading it needs."""
    tars = [
        {"name": f"train-{n:06d}.tar", "samples": per_shard, "bytes": 3000 * per_shard, "sha256": _sha256(n)}
        for n in range(images // per_shard)
    ]
    train = {"samples": images, "per_class": [images // 10] * 10, "shards": tars}
    none: Row = {"samples": 0, "per_class": [0] * 10, "shards": []}
    remarks = [{"file": f"class/{n:09d}.json", "reason": "not an image"} for n in range(rejected)]
    facts = {
        "source": "data/raw/x", "classes": list("abcdefghij"), "splits": {"train": train, "val": none, "test": none},
        "statistics": {}, "smallest": [32, 32], "largest": [32, 32], "own_splits": {}, "rejected": remarks,
        "warnings": [], "copies": 0, "multipage": 0,
    }  # fmt: skip
    write_json(folder / shards.MANIFEST, facts)
    write_sums(folder)
    return {"bytes": (folder / shards.MANIFEST).stat().st_size}


def read_manifest(folder: Path) -> Row:
    return cost(lambda: shards.Manifest.read(folder / shards.MANIFEST))[1]._asdict()


def digests(size: int) -> Row:
    """Bytes/s of the digests of the manifests, and of DVC's."""
    content = bytes(size)
    sha256, md5 = (cost(partial(hashlib.new, name, content))[1] for name in ("sha256", "md5"))
    return {"sha256_per_s": size / sha256.cpu_s, "md5_per_s": size / md5.cpu_s}


def _sha256(number: int) -> str:
    return hashlib.sha256(b"%d" % number).hexdigest()


def link_shards(folder: Path, one: Path, count: int) -> shards.Contents:
    """A split of `count` shards that are all the same file."""
    found = shards.Manifest.read(one / shards.MANIFEST).splits["train"].shards[0]
    tars = [found.model_copy(update={"name": f"train-{n:06d}.tar"}) for n in range(count)]
    for tar in tars:
        os.link(one / found.name, folder / tar.name)
    return shards.Contents(samples=count * found.samples, per_class=(), shards=tuple(tars))


def open_images(folder: Path, contents: shards.Contents) -> Row:
    """Opening shards for random access, unverified, and reading an image of one that is not open."""
    images, opening = cost(lambda: shards.Images(folder, contents, verify=False))
    per_shard = len(images) // len(contents.shards)
    chosen = [per_shard * (index % len(contents.shards)) for index in range(2000)]  # each from another shard
    _, reading = cost(lambda: [images.reader(index) for index in chosen])
    tracemalloc.start()
    again = shards.Images(folder, contents.model_copy(update={"shards": contents.shards[:4]}), verify=False)
    kept, _ = tracemalloc.get_traced_memory()
    return {
        "images": len(images),
        "open_us": 1e6 * opening.cpu_s / len(images),
        "read_us": 1e6 * reading.cpu_s / len(chosen),
        "bytes": kept / len(again),
    }


def copies_and_neighbours(images: int, heldout: int) -> Row:
    """Memory of the stage `shard`, in bytes per image, and the time of its search for near-duplicates."""
    rng = np.random.default_rng(0)
    splitter, hashes = Splitter({}, Fractions(0, 0)), {split: duplicates.Hashes() for split in SPLITS}
    held, numbers = {"val": heldout, "test": heldout, "train": images}, rng.integers(2**63, size=images).tolist()

    def add() -> None:
        for number in numbers:
            splitter(None, number)
        for split in SPLITS:
            for bits in rng.integers(256, size=(held[split], 32), dtype=np.uint8):
                hashes[split].add(bits.tobytes())
        splitter.seen.copies()

    _, added = cost(add)
    _, search = cost(lambda: duplicates.search(hashes))
    return {
        "kept_bytes": 2**20 * added.mib / images,
        "search_bytes": 2**20 * search.mib / images,
        "search_us": 1e6 * search.cpu_s / images,
    }


def listing(folder: Path) -> Row:
    """Listing a folder with a file for each image."""
    source, needed = cost(lambda: open_source(folder))
    _, again = cost(lambda: sum(1 for _ in source))
    n = len(source)
    tracemalloc.start()
    open_source(folder)
    _, peak = tracemalloc.get_traced_memory()
    return {"files": n, "open_us": 1e6 * needed.cpu_s / n, "iterate_us": 1e6 * again.cpu_s / n, "bytes": peak / n}
