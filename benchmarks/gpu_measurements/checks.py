"""Correctness on a GPU, and the time that the stages' own commands need to reach a given quality."""

import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path

from flows import presets, yaml_files
from flows.changes import lay_over
from gpu_measurements.bench import NO_TIME, ROOT, Bench, Facts

SMALL: Facts = {
    "device": "cpu",
    "pairs": {"draws": 1, "heldout_draws": 1},
    "process": {"num_timesteps": 50},
    "network": {"base_channels": 8, "patch_size": 2, "attention_levels": []},
    "train": {"steps": 6, "batch_size": 16, "warmup_steps": 2, "log_every": 2, "preview_every": 3},
    "sample": {"steps": 2, "count": 4},
    "evaluate": {"resamples": 100, "likelihood_images": 4, "exact_likelihood_images": 2, "quality_samples": 0},
}
"""Changes to the parameters of the digits for a rehearsal."""
TESTS_TIMEOUT_SECONDS = 180
"""Timeout for the tests; three times as long in a rehearsal, which shares the CPU with others."""
HELDOUT = re.compile(r"^train: step (\d+): held-out MSE ([\d.]+)")


def gpu_tests(bench: Bench) -> Iterator[Facts]:
    """The tests in tests/gpu: correctness of training and sampling on the GPU."""
    importlib.import_module("pytest")
    command = [sys.executable, "-m", "pytest", "-q", "-rs", "-p", "no:cacheprovider", "--confcutdir", "tests/gpu"]
    command += ["-W", "default", "tests/gpu"]  # pyproject.toml configures plugins that may be missing
    command += ["-k", "not True"] if bench.rehearse else []
    timeout = TESTS_TIMEOUT_SECONDS * (3 if bench.rehearse else 1)
    try:
        done = subprocess.run(command, cwd=ROOT, env=_environment(bench), capture_output=True, timeout=timeout)
    except subprocess.TimeoutExpired as expired:
        output = (expired.stdout or b"").decode(errors="replace").splitlines()
        yield {"passed": False, "error": [f"timed out after {timeout} s", *output[-20:]]}
        return
    lines = done.stdout.decode(errors="replace").splitlines()
    facts: Facts = {"passed": done.returncode == 0, "summary": (lines or ["no output"])[-1]}
    if skipped := [line for line in lines if line.startswith("SKIPPED")]:
        facts["skipped_tests"] = skipped
    if done.returncode:
        failed = [line for line in lines if line.startswith(("FAILED", "ERROR", "E  "))]
        facts["error"] = failed or done.stderr.decode(errors="replace")[-1500:]
    yield facts


def time_to_quality(bench: Bench) -> Iterator[Facts]:
    """The preset fashion-mnist, run by the stages' commands: held-out error over training time."""
    preset, source = ("digits", ROOT / "data/raw/digits.npz") if bench.rehearse else ("fashion-mnist", bench.images)
    if not source.exists():
        yield {"skipped": f"{source}: not found; set --fashion-mnist to the folder with its four idx files"}
        return
    for package in ("cyclopts", "braceexpand", "fsspec", "imagehash", "jinja2"):  # needed by the commands
        importlib.import_module(package)
    params = presets.load(ROOT / "presets" / f"{preset}.yaml").model_dump(mode="json")
    with tempfile.TemporaryDirectory() as directory:
        tree = Path(directory)
        raw = tree / params["shard"]["source"]
        raw.parent.mkdir(parents=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, raw)
        yaml_files.write_yaml(tree / "params.yaml", lay_over(params, SMALL) if bench.rehearse else params)
        for stage in ("shard", "pairs", "train", "evaluate"):
            if stage == "evaluate":
                importlib.import_module("matplotlib")  # needed by the stage for plots
            began = time.perf_counter()
            if not (yield from _stage(bench, tree, stage)):
                yield {"stage": stage, "skipped": f"ended early: {NO_TIME}"}
                return
            seconds = round(time.perf_counter() - began, 1)
            yield {"stage": stage, "seconds": seconds} | _report(tree, stage)


def _stage(bench: Bench, tree: Path, stage: str) -> Generator[Facts, None, bool]:
    """Run a stage and yield the held-out errors that it logs, with the seconds since its start.

    Returns whether the stage finished; it is terminated when no time is left. Raises RuntimeError with the last line of
    its log if it fails.
    """
    began, output = time.perf_counter(), list[str]()
    command = [sys.executable, "-m", "flows", stage]
    with subprocess.Popen(command, cwd=tree, env=_environment(bench), stderr=subprocess.PIPE, text=True) as process:
        assert process.stderr
        deadline = threading.Timer(max(bench.left(), 0), process.terminate)
        deadline.start()
        try:
            for line in process.stderr:
                output.append(line)
                if found := HELDOUT.match(line):
                    seconds = round(time.perf_counter() - began, 2)
                    yield {"step": int(found[1]), "heldout_mse": float(found[2]), "seconds": seconds}
        finally:
            deadline.cancel()
    if process.returncode and bench.left() >= 0:
        sys.stderr.writelines(output)
        raise RuntimeError(f"{stage}: {(output or ['no output'])[-1].strip()}")
    return not process.returncode


def _report(tree: Path, stage: str) -> Facts:
    """The error metrics in the report of a stage."""
    path = tree / "reports" / f"{stage}.json"
    report = json.loads(path.read_text()) if path.exists() else {}
    return {
        name: report[name] for name in ("images", "heldout_mse", "val_mse", "mse", "bits_per_dim") if name in report
    }


def _environment(bench: Bench) -> dict[str, str]:
    """Environment for the commands of this repository, with an unreachable MLflow server."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    ours = {"PYTHONPATH": path, "MLFLOW_TRACKING_URI": "http://127.0.0.1:9"}
    rehearsal = {"DDPM_WORKERS": "1"} if bench.rehearse else {}  # a few images need no worker processes
    return os.environ | ours | rehearsal | {"REHEARSE_GPU_TESTS": str(int(bench.rehearse))}
