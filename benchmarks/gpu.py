"""Training and sampling on a GPU: whether they are right, and how fast they are.

    python benchmarks/gpu.py                       # writes benchmarks/results/gpu-CARD.jsonl
    python benchmarks/gpu.py --rehearse            # all of it, tiny, on the CPU
    python benchmarks/gpu.py --page                # benchmarks/results/gpu.md of these files

Each measurement gives JSON lines, printed and written as soon as they are known, the most important ones first; at the
end comes a table. No measurement begins after --minutes, so that a run may be cut off at any time. It needs torch (2.11
or later), numpy, pydantic, ruamel.yaml, pillow, safetensors and tqdm; with pytest it runs tests/gpu, with diffusers it
compares, with onnx, onnxscript and ONNX Runtime it runs sampler.onnx, with matplotlib the stage `evaluate`. A line says
what is skipped because a package is missing. Networks are trained on random pixels in memory, except in
`time_to_quality`, which runs the stages' commands.
"""

import argparse
import json
import os
import platform
import re
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # where the project is not installed
try:
    import torch
    from gpu_measurements import page
    from gpu_measurements.bench import ROOT, Bench, Facts
    from gpu_measurements.checks import gpu_tests, time_to_quality
    from gpu_measurements.profile import profile
    from gpu_measurements.sampling import sampling
    from gpu_measurements.training import ceilings, memory, pairs, settings, throughput
    from gpu_measurements.turns import first_line

    from diffusion.storage.files import write_atomic
except ModuleNotFoundError as error:
    sys.exit(f"benchmarks/gpu.py: no module named {error.name}; the top of this file says what it needs")

MEASUREMENTS: list[Callable[[Bench], Iterator[Facts]]] = [
    gpu_tests, ceilings, throughput, profile, time_to_quality, sampling, memory, settings, pairs,
]  # fmt: skip
"""The most important ones first."""
RESULTS = ROOT / "benchmarks" / "results"
NO_GPU = "no GPU: rehearsing tiny on the CPU; these figures are of no GPU"


def machine(bench: Bench, commit: str | None) -> Facts:
    """What was measured on, and with."""
    return {
        "device": bench.card if bench.cuda else "CPU, rehearsal",
        "commit": commit or _output("git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=40"),
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
    """The first line that a program prints; None if it fails or is not there."""
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
    """The lines of a run, printed and in a file as soon as they are added."""

    def __init__(self, path: Path | None) -> None:
        self.all: list[Facts] = []
        self._path = path

    def add(self, line: Facts) -> None:
        self.all.append(line)
        print(json.dumps(line), flush=True)
        if self._path:
            write_atomic(self._path, "".join(f"{json.dumps(each)}\n" for each in self.all).encode())


def measure(bench: Bench, lines: Lines, names: list[str]) -> None:
    """Run the measurements of these names, for which time is left; one that fails has a line with the error."""
    for measurement in MEASUREMENTS:
        name = measurement.__name__
        if name not in names:
            continue
        if bench.left() < 0:
            lines.add({"measurement": name, "skipped": "no time was left"})
            continue
        try:
            for facts in measurement(bench):
                lines.add({"measurement": name, **facts})
        except ModuleNotFoundError as error:
            lines.add({"measurement": name, "skipped": f"no module named {error.name}"})
        except Exception as error:  # whatever fails, the rest is still measured
            traceback.print_exc()
            lines.add({"measurement": name, "error": first_line(error)})


def main() -> int:
    described = {each.__name__: (each.__doc__ or "").strip().partition("\n")[0] for each in MEASUREMENTS}
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--minutes", type=float, default=8.0, help="no measurement begins after these (default 8)")
    parser.add_argument("--out", type=Path, help="the file of the lines; a rehearsal writes none without it")
    parser.add_argument("--only", default=",".join(described), help=f"some of {', '.join(described)}")
    parser.add_argument("--commit", help="of the code, if this is no git repository (default: DDPM_COMMIT)")
    parser.add_argument(
        "--fashion-mnist",
        type=Path,
        default=Path("/usr/share/datasets/fashion-mnist"),
        help="folder of its four idx files (default %(default)s)",
    )
    parser.add_argument("--rehearse", action="store_true", help="all of it, tiny, on the CPU")
    parser.add_argument("--page", action="store_true", help="measure nothing; write the page of all results")
    arguments = parser.parse_args()
    names = arguments.only.split(",")
    if unknown := sorted(set(names) - described.keys()):
        parser.error(f"--only: no measurement {unknown[0]!r}; there are {', '.join(described)}")
    if arguments.page:
        print(page.write(RESULTS, described))
        return 0
    rehearse = arguments.rehearse or not torch.cuda.is_available()
    if rehearse and not arguments.rehearse:
        print(NO_GPU, file=sys.stderr)
    with Bench(rehearse, arguments.minutes, arguments.fashion_mnist) as bench:
        name = re.sub(r"\W+", "-", bench.card.removeprefix("NVIDIA ")).strip("-")
        lines = Lines(arguments.out or (None if rehearse else RESULTS / f"gpu-{name}.jsonl"))
        about = machine(bench, arguments.commit or os.environ.get("DDPM_COMMIT"))
        rehearsal = {"not_rehearsed": "torch.compile: what is to be compiled runs as it is"} if rehearse else {}
        lines.add({"measurement": "machine"} | about | rehearsal)
        measure(bench, lines, names)
    print(page.tables(lines.all))
    return int(any("error" in line for line in lines.all))


if __name__ == "__main__":
    sys.exit(main())
