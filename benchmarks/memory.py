"""Memory that training needs for a small and a large dataset, as one JSON line.

    python benchmarks/memory.py

creates two datasets of random images, one many times larger than the other, and runs the real stages on both. It
reports the peak private memory of each process; pages of mapped files are excluded, since the system can drop them.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import psutil

from flows import presets

PRESET = Path(__file__).parents[1] / "presets" / "fashion-mnist.yaml"


def own_memory(command: list[str], tree: Path) -> int:
    """Peak private memory of a command, in bytes."""
    most = 0
    environment = os.environ | {"MLFLOW_TRACKING_URI": f"sqlite:///{tree}/mlflow.db"}
    with subprocess.Popen(command, cwd=tree, env=environment, stderr=subprocess.PIPE, text=True) as process:
        watched = psutil.Process(process.pid)
        while process.poll() is None:
            try:
                memory = watched.memory_info()
            except psutil.NoSuchProcess:
                break
            most = max(most, memory.rss - memory.shared)
            time.sleep(0.02)
        error = process.stderr.read() if process.stderr else ""
    if process.returncode:
        sys.exit(error)
    return most


def measure(images: int, steps: int) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as directory:
        tree, rng = Path(directory), np.random.default_rng(0)
        params = presets.load(PRESET).model_dump(mode="json")
        params["shard"] |= {"source": "images.npz", "val_fraction": 200 / images, "test_fraction": 200 / images}
        params["train"] |= {"steps": steps, "preview_every": steps, "log_every": 10, "warmup_steps": 1}
        (tree / "params.yaml").write_text(json.dumps(params))  # JSON is YAML
        np.savez(tree / "images.npz", images=rng.integers(0, 256, (images, 28, 28), dtype=np.uint8))
        found: dict[str, Any] = {"images": images}
        for stage in ("shard", "pairs", "train"):
            found[f"{stage}_mib"] = round(own_memory([sys.executable, "-m", "flows", stage], tree) / 2**20)
        found["pairs_on_disk_mib"] = round(sum(file.stat().st_size for file in tree.glob("data/pairs/*")) / 2**20)
        return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--small", type=int, default=10_000, help="images in the small dataset")
    parser.add_argument("--times", type=int, default=10, help="size of the large dataset relative to the small one")
    parser.add_argument("--steps", type=int, default=30, help="training steps")
    arguments = parser.parse_args()
    sizes = (arguments.small, arguments.small * arguments.times)
    rows = [measure(images, arguments.steps) for images in sizes]
    print(json.dumps({"benchmark": "memory", "rows": rows}))


if __name__ == "__main__":
    main()
