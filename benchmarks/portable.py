"""Cost and success of bit-identical training across processors: training time, and digest of the weights.

    python benchmarks/portable.py --steps 300 --turns 3

The stage's own command trains on the digits with each setting in turn. To see whether processors agree, compare the
digests of a setting between machines; every line names its processor.
"""

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from diffusion.storage.files import sha256
from flows import yaml_files

ROOT = Path(__file__).parents[1]
SETTINGS = {
    "as the processor allows": {},
    "AVX2": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "AVX2"},
    "AVX2, MKL compatible": {"ATEN_CPU_CAPABILITY": "avx2", "ONEDNN_MAX_CPU_ISA": "AVX2", "MKL_CBWR": "COMPATIBLE"},
}
"""Variables that torch's own kernels, oneDNN and MKL read at load time. On processors not made by Intel, MKL
guarantees the same results only with COMPATIBLE."""


def processor() -> str:
    """Name and widest vector instructions of the processor."""
    text = Path("/proc/cpuinfo").read_text()
    name = next(line.split(":", 1)[1].strip() for line in text.splitlines() if line.startswith("model name"))
    return f"{name}, {next((isa for isa in ('avx512f', 'avx2') if isa in text.split()), 'no avx2')}"


def stage(tree: Path, name: str, environment: dict[str, str]) -> float:
    """Run a stage in `tree`; returns its duration in seconds."""
    began = time.perf_counter()
    command = [sys.executable, "-m", "flows", name]
    done = subprocess.run(command, cwd=tree, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    if done.returncode:
        raise SystemExit(done.stderr.decode())
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--steps", type=int, default=300, help="steps of each training run (default 300)")
    parser.add_argument("--turns", type=int, default=3, help="training runs with each setting (default 3)")
    parser.add_argument("--threads", type=int, default=2, help="threads; the same on every machine (default 2)")
    arguments = parser.parse_args()
    common = os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": str(arguments.threads)}
    seconds: dict[str, list[float]] = {name: [] for name in SETTINGS}
    digests: dict[str, set[str]] = {name: set() for name in SETTINGS}
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        shutil.copytree(ROOT / "data" / "raw", tree / "data" / "raw")
        document = yaml_files.read_yaml(ROOT / "params.yaml")
        changes = {"train": {"steps": arguments.steps, "preview_every": arguments.steps}}
        yaml_files.write_yaml(tree / "params.yaml", yaml_files.overlay(document, changes))
        common["MLFLOW_TRACKING_URI"] = f"sqlite:///{tree}/mlflow.db"
        for name in ("shard", "pairs"):
            stage(tree, name, common)
        for _ in range(arguments.turns):
            for name, variables in SETTINGS.items():
                seconds[name].append(stage(tree, "train", common | variables))
                digests[name].add(sha256(tree / "models" / "ddpm" / "model.safetensors"))
    for name in SETTINGS:
        facts = {
            "setting": name,
            "processor": processor(),
            "threads": arguments.threads,
            "steps": arguments.steps,
            "seconds": [round(value, 1) for value in seconds[name]],
            "median_s": round(statistics.median(seconds[name]), 1),
            "weights": sorted(digest[:16] for digest in digests[name]),
        }
        print(json.dumps({"benchmark": "portable", **facts}))


if __name__ == "__main__":
    main()
