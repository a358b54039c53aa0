"""Correctness and speed of training and sampling on a GPU.

    python benchmarks/gpu.py                       # writes benchmarks/results/gpu-CARD-COMMIT.jsonl
    python benchmarks/gpu.py --rehearse            # everything in miniature, on the CPU
    python benchmarks/gpu.py --page                # writes benchmarks/results/gpu.md from these files

Measurements are printed and written as JSON lines as soon as they are available, the most important ones first; a table
follows at the end. No measurement starts after --minutes, and the run may be interrupted at any time. Required: torch
(2.11 or later), numpy, pydantic, ruamel.yaml, pillow, safetensors and tqdm. Optional: pytest to run tests/gpu,
diffusers for comparison, onnx, onnxscript and ONNX Runtime for sampler.onnx; for `time_to_quality`, cyclopts,
braceexpand, fsspec, imagehash and jinja2, and matplotlib for its stage `evaluate`. A line says what is skipped because
a package is missing. Networks are trained on random pixels in memory, except in `time_to_quality`, which runs the
stages' commands.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # in case the project is not installed
try:
    import torch
    from gpu_measurements import page
    from gpu_measurements.bench import NO_TIME, ROOT, Bench, Facts
    from gpu_measurements.checks import gpu_tests, time_to_quality
    from gpu_measurements.profile import profile
    from gpu_measurements.sampling import sampling
    from gpu_measurements.training import ceilings, memory, pairs, settings, throughput
    from gpu_measurements.turns import first_line

    from diffusion.errors import UserError
    from diffusion.storage.files import write_atomic
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks/gpu.py: no module named {error.name}; the docstring of this file lists the requirements")

MEASUREMENTS: list[Callable[[Bench], Iterator[Facts]]] = [
    gpu_tests, ceilings, throughput, profile, time_to_quality, sampling, memory, settings, pairs,
]  # fmt: skip
"""The most important ones first."""
RESULTS = ROOT / "benchmarks" / "results"
NO_GPU = "no GPU found: rehearsing on the CPU; results are not GPU measurements"


def machine(bench: Bench, commit: str | None) -> Facts:
    """The hardware and software versions."""
    return {
        "device": bench.card if bench.cuda else page.REHEARSAL,
        "commit": commit,
        "driver": _output("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if bench.cuda else None,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if bench.cuda else None,
        "onnxruntime": _version("onnxruntime-gpu") or _version("onnxruntime"),
        "diffusers": _version("diffusers"),
        "numpy": _version("numpy"),
        "cores": len(os.sched_getaffinity(0)),
    }


def _output(*command: str) -> str | None:
    """The first line of a program's output; None if it fails or is not installed."""
    try:
        lines = subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        return None
    return lines[0] if lines else None


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


class Lines:
    """The lines of a run, printed and written to a file as soon as they are added.

    Raises UserError if the file exists or cannot be written.
    """

    def __init__(self, path: Path | None) -> None:
        self.all: list[Facts] = []
        self._path = path
        if path and path.exists():
            raise UserError(f"{path}: already exists; move it, or choose another file with --out")

    def add(self, line: Facts) -> None:
        self.all.append(line)
        if self._path:
            write_atomic(self._path, "".join(f"{json.dumps(each)}\n" for each in self.all).encode())
        say(json.dumps(line))


def say(text: str) -> None:
    """Print a text; if standard output is closed or full, stop printing."""
    try:
        print(text, flush=True)
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def measured(bench: Bench, names: Iterable[str]) -> Iterator[Facts]:
    """Run the named measurements and yield their lines; failures and skipped ones give a line, too."""
    for measurement in MEASUREMENTS:
        named = {"measurement": measurement.__name__}
        if measurement.__name__ not in names:
            continue
        if bench.left() < 0:
            yield named | {"skipped": NO_TIME}
            continue
        bench.empty_cache()
        try:
            for facts in measurement(bench):
                yield named | facts
        except ModuleNotFoundError as error:
            yield named | {"skipped": f"no module named {error.name}"}
        except Exception as error:  # a failure must not prevent the other measurements
            with suppress(OSError):  # standard error may be closed
                traceback.print_exc()
            yield named | {"error": first_line(error)}


def run(rehearse: bool, minutes: float, images: Path, out: Path | None, commit: str | None, names: list[str]) -> int:
    """Run the measurements; returns the exit status.

    Raises UserError if the output file exists or cannot be written.
    """
    status = 0
    with Bench(rehearse, minutes, images) as bench:
        short = re.sub(r"([0-9a-f]{7})[0-9a-f]{33}", r"\1", f"{bench.card.removeprefix('NVIDIA ')}-{commit}")
        name = re.sub(r"\W+", "-", short).strip("-")
        lines = Lines(out or (None if rehearse else RESULTS / f"gpu-{name}.jsonl"))
        rehearsal = {"not_rehearsed": "torch.compile: networks to be compiled run uncompiled"} if rehearse else {}
        lines.add({"measurement": "machine"} | machine(bench, commit) | rehearsal)
        try:
            for line in measured(bench, names):
                lines.add(line)
        except KeyboardInterrupt:
            status = 130
    say(page.tables(lines.all))
    return status or int(any("error" in line for line in lines.all))


def minutes(text: str) -> float:
    value = float(text)
    if not 0 <= value <= 24 * 60:  # also rejects NaN
        raise argparse.ArgumentTypeError(f"{text} is not a number of minutes from 0 to 1440")
    return value


def main() -> int:
    described = {each.__name__: (each.__doc__ or "").strip().partition("\n")[0] for each in MEASUREMENTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=minutes, default=8.0, help="start no measurement after this time (default 8)")
    parser.add_argument("--out", type=Path, help="file to write; without it, a rehearsal writes none")
    parser.add_argument("--only", default=",".join(described), help=f"comma-separated subset of {', '.join(described)}")
    parser.add_argument("--commit", help="commit of the code, if git cannot tell (default: DDPM_COMMIT)")
    parser.add_argument(
        "--fashion-mnist",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder with its four idx files (default %(default)s)",
    )
    parser.add_argument("--rehearse", action="store_true", help="run everything in miniature on the CPU")
    parser.add_argument("--page", action="store_true", help="only write the page of all results")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := sorted(set(names) - described.keys()):
        parser.error(f"--only: unknown measurement {unknown[0]!r}; available: {', '.join(described)}")
    rehearse = arguments.rehearse or not torch.cuda.is_available()
    commit = arguments.commit or os.environ.get("DDPM_COMMIT")
    commit = commit or _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40")
    if not (commit or rehearse or arguments.page):
        parser.error("--commit: required, since git cannot determine the commit of this code")
    try:
        if arguments.page:
            print(page.write(RESULTS, described))
            return 0
        if rehearse and not arguments.rehearse:
            print(NO_GPU, file=sys.stderr)
        return run(rehearse, arguments.minutes, arguments.fashion_mnist, arguments.out, commit, names)
    except UserError as error:
        print(f"benchmarks/gpu.py: {error}", file=sys.stderr)
        return 1


if __name__ == "__main__":
    sys.exit(main())
