"""Inserts random single-line faults and reports which ones no test notices.

`make mutants` runs it. mutmut makes the faults, and runs the tests that call the function around each.
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
"""Any run makes all mutants, and finds out which tests call what; this module has the fewest."""
KILLED = {"killed", "timeout"}


def run(*names: str) -> None:
    """Run the tests on these mutants."""
    subprocess.run([MUTMUT, "run", *names], check=True)


def results() -> dict[str, str]:
    """What became of each mutant."""
    output = subprocess.run([MUTMUT, "results", "--all", "true"], check=True, stdout=subprocess.PIPE, text=True).stdout
    return dict(line.strip().rsplit(": ", 1) for line in output.splitlines())


def main() -> int:
    parser = argparse.ArgumentParser(description="Insert random single-line faults; report those no test notices.")
    parser.add_argument("--count", type=int, default=60, help="faults to try (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: %(default)s)")
    parser.add_argument("--of", default="diffusion", help="package or module to draw from (default: %(default)s)")
    arguments = parser.parse_args()
    shutil.rmtree(ROOT / "mutants", ignore_errors=True)  # mutmut would go on with the tests as they were
    run(SMALLEST)
    names = sorted(name for name in results() if name.startswith(f"{arguments.of}."))
    if not names:
        parser.error(f"--of {arguments.of}: nothing in it is mutated; see tool.mutmut in pyproject.toml")
    chosen = random.Random(arguments.seed).sample(names, min(arguments.count, len(names)))
    run(*chosen)
    states = results()
    unnoticed = [name for name in chosen if states[name] not in KILLED]
    for name in unnoticed:
        subprocess.run([MUTMUT, "show", name], check=True)
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} faults were noticed")
    return bool(unnoticed)


if __name__ == "__main__":
    sys.exit(main())
