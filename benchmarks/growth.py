"""What images, files, runs and points cost, for the tables of docs/growth.md.

    python benchmarks/growth.py          # measures, writes benchmarks/results/growth.json and the tables of the page
    python benchmarks/growth.py --page   # only the tables

Each measurement has a process of its own. Processor time is that of the process, the median of three; commands of DVC,
and what the servers' databases do, are timed once by the clock. `--rehearse` measures everything in miniature and
prints it.
"""

import argparse
import json
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1]))  # in case the project is not installed

from growing import images, page, services
from growing.isolated import isolated, median

from diffusion.storage.files import write_atomic

ROOT = Path(__file__).parents[1]
RESULTS, PAGE = ROOT / "benchmarks" / "results" / "growth.json", ROOT / "docs" / "growth.md"
PRESET = "cifar10"
FULL = {"images": 4000, "shards": 300, "files": 10_000, "manifest": 10**9, "rejected": 100_000, "hashes": 300_000,
        "folders": (100, 1000, 10_000), "points": 30_000, "runs": 100, "flows": 10, "lines": 200}  # fmt: skip
SMALL = {"images": 1000, "shards": 2, "files": 100, "manifest": 10**6, "rejected": 100, "hashes": 2000,
         "folders": (1, 10), "points": 1000, "runs": 2, "flows": 1, "lines": 2}  # fmt: skip


def measure(directory: Path, size: dict[str, Any], rounds: int) -> dict[str, Any]:
    results: dict[str, Any] = {"processor": processor(), "images": size["images"]}
    tars = isolated(images.make_tars, directory / "tars", size["images"])
    for name, workers in (("one_process", 1), ("two_workers", 2)):
        results[name] = median(images.stages, tars, directory / name, workers, rounds=rounds)
        said(name, results[name])
    steps: dict[str, Callable[[], Any]] = {
        "reader": lambda: reader(directory, size["shards"], rounds),
        "digests": lambda: median(images.digests, 2**28, rounds=rounds),
        "manifest": lambda: manifest(directory, size["manifest"], page.PER_TAR, 0, rounds),
        "large_tars": lambda: manifest(directory, size["manifest"], 10 * page.PER_TAR, 0, rounds),
        "rejected": lambda: manifest(directory, 10**7, page.PER_TAR, size["rejected"], rounds),
        "memory": lambda: (
            median(images.copies_and_neighbours, size["hashes"], page.HELDOUT, rounds=rounds)
            | {"images": size["hashes"]}
        ),
        "listing": lambda: listing(directory, size["files"], rounds),
        "files": lambda: [isolated(services.dvc, directory / str(count), count) for count in size["folders"]],
        "points": lambda: isolated(services.mlflow_points, directory / "points", size["points"]),
        "runs": lambda: isolated(services.mlflow_runs, directory / "runs", size["runs"]),
        "prefect": lambda: isolated(services.prefect, directory / "prefect", size["flows"], size["lines"]),
        "training": lambda: services.points_of_a_training(PRESET),
    }
    for name, step in steps.items():
        results[name] = step()
        said(name, results[name])
    return results


def reader(directory: Path, shards: int, rounds: int) -> dict[str, Any]:
    folder = directory / "links"
    folder.mkdir()
    contents = images.link_shards(folder, directory / "one_process", shards)
    return median(images.open_images, folder, contents, rounds=rounds)


def manifest(directory: Path, count: int, per_tar: int, rejected: int, rounds: int) -> dict[str, Any]:
    folder = directory / "manifest"
    folder.mkdir(exist_ok=True)
    made = isolated(images.manifest, folder, count, per_tar, rejected)
    facts = {"images": count, "tars": count // per_tar, "rejected": rejected}
    return facts | made | median(images.read_manifest, folder, rounds=rounds)


def listing(directory: Path, count: int, rounds: int) -> dict[str, Any]:
    folder = isolated(images.make_files, directory / "files", count)
    return median(images.listing, folder, rounds=rounds)


def processor() -> str:
    from portable import processor

    return processor()


def said(name: str, found: object) -> None:
    print(f"{name}: {json.dumps(found)}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--page", action="store_true", help="only write the tables of docs/growth.md from the results")
    parser.add_argument("--rehearse", action="store_true", help="measure everything in miniature and write nothing")
    arguments = parser.parse_args()
    if not arguments.page:
        with tempfile.TemporaryDirectory() as directory:
            results = measure(Path(directory), SMALL if arguments.rehearse else FULL, 1 if arguments.rehearse else 3)
        if arguments.rehearse:
            print(page.fill(PAGE.read_text(encoding="utf-8"), results))
            return
        write_atomic(RESULTS, (json.dumps(results, indent=1) + "\n").encode())
    text = page.fill(PAGE.read_text(encoding="utf-8"), json.loads(RESULTS.read_text(encoding="utf-8")))
    write_atomic(PAGE, text.encode())


if __name__ == "__main__":
    main()
