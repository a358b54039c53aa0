"""Making shards of the same images: by webdataset's writer, litdata's `optimize`, and the stage `shard`.

    python benchmarks/sharding.py --litdata /path/to/python

makes two folders of PNG files, small drawings with alpha and photographs of 256x256, and converts them with each
program, in processes of their own that take turns. litdata is used if the given interpreter has it; this project does
not need it. `--memory` measures the peak memory for growing data instead, and `--small` the time of the own process and
of two workers for few images.

Each program decodes every image to RGB or RGBA. webdataset's loop encodes it as PNG again, as its documentation does;
a second one copies the files' bytes without looking at them. litdata stores the pixels. The stage turns images upright
and to sRGB, counts and compares their pixels, divides them into splits, and encodes them.
"""

import argparse
import importlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import psutil
from PIL import Image, ImageDraw, ImageFilter

LABEL = {"a": 0, "b": 1}


def draw(index: int) -> Image.Image:
    """A drawing of 64x64 pixels with alpha."""
    rng, image = np.random.default_rng(index), Image.new("RGBA", (256, 256))
    pen = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, width, height = rng.integers(0, 128, 4).tolist()
        pen.ellipse((x, y, x + width + 8, y + height + 8), tuple(rng.integers(0, 256, 3).tolist()))
    return image.resize((64, 64))


def photograph(index: int) -> Image.Image:
    """256x256 pixels with structures of all sizes, and grain."""
    rng, pixels = np.random.default_rng(index), np.zeros((256, 256, 3))
    for side in (2, 4, 8, 16, 32, 64, 128):
        coarse = Image.fromarray(rng.integers(0, 256, (side, side, 3), dtype=np.uint8))
        pixels += np.asarray(coarse.resize((256, 256), Image.Resampling.BICUBIC), np.float64) / side
    pixels = 255 * pixels / pixels.max() + rng.normal(0, 2, pixels.shape)
    return Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).filter(ImageFilter.SMOOTH)


KINDS = {"drawings": draw, "photographs": photograph}


def make(folder: Path, kind: str, count: int) -> Path:
    for name in LABEL:
        (folder / name).mkdir(parents=True)
    for index in range(count):
        KINDS[kind](index).save(folder / "ab"[index % 2] / f"{index:06}.png")
    return folder


def files(source: Path) -> list[tuple[str, int]]:
    return [(str(path), LABEL[path.parent.name]) for path in sorted(source.rglob("*.png"))]


def by_webdataset(source: Path, target: Path, workers: int, encode: bool = True) -> None:
    from webdataset import ShardWriter

    assert workers == 1  # its loop is one process
    with ShardWriter(f"{target}/%06d.tar", maxcount=10_000, verbose=0, mtime=0) as writer:
        for path, label in files(source):
            image: Any = Image.open(path) if encode else Path(path).read_bytes()
            writer.write({"__key__": Path(path).stem, "png": image, "json": {"label": label}})


def by_copying(source: Path, target: Path, workers: int) -> None:
    by_webdataset(source, target, workers, encode=False)


def _decoded(item: tuple[str, int]) -> dict[str, Any]:
    path, label = item
    image = Image.open(path)
    image.load()
    return {"image": image.copy(), "label": label}


def by_litdata(source: Path, target: Path, workers: int) -> None:
    from litdata import optimize  # type: ignore[import-not-found]

    optimize(_decoded, files(source), str(target), num_workers=workers, chunk_bytes="64MB", verbose=False)


def by_us(source: Path, target: Path, workers: int) -> None:
    from diffusion.sources.shards import write
    from diffusion.sources.sources import open_source
    from diffusion.sources.splits import Fractions
    from diffusion.storage.executors import OWN_PROCESS
    from diffusion.storage.processes import Processes

    executor = Processes(workers) if workers > 1 else OWN_PROCESS
    write(open_source(source), "images", target, Fractions(0.1, 0.1), 10_000, executor=executor)


MODULES = {
    "webdataset": ["webdataset"],
    "webdataset, bytes copied": ["webdataset"],
    "litdata": ["litdata"],
    "ours": ["diffusion.sources.sources", "webdataset"],
}
"""What a program imports, before its time is taken."""
PROGRAMS: dict[str, Callable[[Path, Path, int], None]] = {
    "webdataset": by_webdataset,
    "webdataset, bytes copied": by_copying,
    "litdata": by_litdata,
    "ours": by_us,
}
TURNS = [("webdataset", 1), ("webdataset, bytes copied", 1), ("litdata", 1), ("litdata", 2), ("ours", 1), ("ours", 2)]


def run(program: str, workers: int, source: Path, python: str) -> dict[str, float]:
    """Seconds of a program without the imports, and the peak memory of its main process and its largest other one."""
    with tempfile.TemporaryDirectory(dir=source.parent) as target:
        command = [python, __file__, "--program", program, "--workers", str(workers), str(source), target]
        most: dict[bool, int] = {True: 0, False: 0}
        with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
            main = psutil.Process(process.pid)
            while process.poll() is None:
                try:
                    for each in (main, *main.children(recursive=True)):
                        most[each == main] = max(most[each == main], each.memory_info().rss)
                except psutil.NoSuchProcess:
                    continue
                time.sleep(0.02)
            out, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(errors[-2000:])
    return {
        "seconds": float(out.splitlines()[-1]),
        "main_mib": round(most[True] / 2**20),
        "worker_mib": round(most[False] / 2**20),
    }


def compare(arguments: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    rows = []
    litdata = subprocess.run([arguments.litdata, "-c", "import litdata"], capture_output=True).returncode == 0
    if not litdata:
        print(f"{arguments.litdata}: has no litdata; it is left out", file=sys.stderr)
    for kind, count in (("drawings", arguments.drawings), ("photographs", arguments.photographs)):
        source = make(directory / kind, kind, count)
        turns = [turn for turn in TURNS if litdata or turn[0] != "litdata"]
        found: dict[tuple[str, int], list[float]] = {turn: [] for turn in turns}
        for _ in range(arguments.rounds):
            for program, workers in turns:
                python = str(arguments.litdata) if program == "litdata" else sys.executable
                found[program, workers].append(count / run(program, workers, source, python)["seconds"])
        for (program, workers), rates in found.items():
            rate, least, largest = round(statistics.median(rates)), round(min(rates)), round(max(rates))
            rows.append(
                {"images": kind, "program": program, "workers": workers, "rate": rate, "range": [least, largest]}
            )
            print(f"| {kind} | {program} | {workers} | {rate:,} | {least:,}, {largest:,} |")
        shutil.rmtree(source)
    return rows


def memory(arguments: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    rows = []
    for times in (1, 4, 16):
        source = make(directory / str(times), "photographs", arguments.photographs // 4 * times)
        for workers in (1, 2):
            found = run("ours", workers, source, sys.executable)
            rows.append({"images": arguments.photographs // 4 * times, "workers": workers, **found})
            print("| {images:,} | {workers} | {main_mib} | {worker_mib} | {seconds:.1f} |".format(**rows[-1]))
        shutil.rmtree(source)
    return rows


def small(arguments: argparse.Namespace, directory: Path) -> list[dict[str, Any]]:
    rows = []
    for kind in KINDS:
        for count in (250, 500, 1000, 2000):
            source = make(directory / f"{kind}{count}", kind, count)
            found: dict[int, list[float]] = {1: [], 2: []}
            for _ in range(arguments.rounds):
                for workers, seconds in found.items():
                    seconds.append(run("ours", workers, source, sys.executable)["seconds"])
            one, two = (statistics.median(found[workers]) for workers in (1, 2))
            rows.append({"images": kind, "count": count, "own_process": round(one, 2), "two_workers": round(two, 2)})
            print("| {images} | {count:,} | {own_process} | {two_workers} |".format(**rows[-1]))
            shutil.rmtree(source)
    return rows


Measure = Callable[[argparse.Namespace, Path], list[dict[str, Any]]]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--litdata", default=sys.executable, help="a Python interpreter that has litdata")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--drawings", type=int, default=4000, help="number of drawings")
    parser.add_argument("--photographs", type=int, default=1000, help="number of photographs")
    parser.add_argument("--memory", action="store_true", help="measure memory instead")
    parser.add_argument("--small", action="store_true", help="measure few images instead")
    parser.add_argument("--program", choices=PROGRAMS, help=argparse.SUPPRESS)
    parser.add_argument("--workers", type=int, help=argparse.SUPPRESS)
    parser.add_argument("paths", type=Path, nargs="*", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.program:
        for module in MODULES[arguments.program]:
            importlib.import_module(module)
        began = time.perf_counter()
        source, target = arguments.paths
        PROGRAMS[arguments.program](source, target, arguments.workers)
        print(time.perf_counter() - began)
        return
    measure: Measure = memory if arguments.memory else small if arguments.small else compare
    with tempfile.TemporaryDirectory() as directory:
        rows = measure(arguments, Path(directory))
    print(json.dumps({"benchmark": "sharding", "what": measure.__name__, "rows": rows}))


if __name__ == "__main__":
    main()
