"""Insert random single-line faults and report those that no test detects.

Run by `make mutants`. mutmut creates the faults and runs the tests that call the function around each.
"""

import argparse
import random
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]
MUTMUT = Path(sys.executable).with_name("mutmut")
SMALLEST = "diffusion.process.bands.*"
"""Every run creates all mutants and records which tests call what; this module has the fewest mutants."""
KILLED = {"killed", "timeout"}


def run(*names: str) -> None:
    """Test these mutants."""
    subprocess.run([MUTMUT, "run", *names], check=True)


def results() -> dict[str, str]:
    """Status of each mutant."""
    output = subprocess.run([MUTMUT, "results", "--all", "true"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(line.strip().rsplit(": ", 1) for line in output.splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description="Insert random single-line faults; report those that no test detects.")
    parser.add_argument("--count", type=int, default=60, help="number of faults (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the selection (default: %(default)s)")
    parser.add_argument("--of", default="diffusion", help="package or module to mutate (default: %(default)s)")
    arguments = parser.parse_args()
    shutil.rmtree(ROOT / "mutants", ignore_errors=True)  # else mutmut would reuse outdated tests
    run(SMALLEST)
    names = sorted(name for name in results() if name.startswith(f"{arguments.of}."))
    if not names:
        parser.error(f"--of {arguments.of}: contains no mutants; see tool.mutmut in pyproject.toml")
    chosen = random.Random(arguments.seed).sample(names, min(arguments.count, len(names)))
    run(*chosen)
    states = results()
    undetected = [name for name in chosen if states[name] not in KILLED]
    for name in undetected:
        subprocess.run([MUTMUT, "show", name], check=True)
    print(f"{len(chosen) - len(undetected)} of {len(chosen)} faults were detected")
    return bool(undetected)


if __name__ == "__main__":
    sys.exit(main())
