"""Does a test notice a fault? Some single-line faults, drawn at random, and what became of each.

`make mutants` runs it. mutmut makes the faults, each in one line, and runs the tests that call the function around it.
"""

import argparse
import random
import subprocess
import sys
from pathlib import Path

ANY = "diffusion.process.bands.*"
"""Few and quick: to run them makes all mutants, and finds out which tests call what."""


def mutmut(*arguments: str) -> str:
    """The output of a command of mutmut, which it also shows if it is a run."""
    command = [str(Path(sys.executable).with_name("mutmut")), *arguments]
    if arguments[0] == "run":
        subprocess.run(command, check=True)
        return ""
    return subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--count", type=int, default=60, help="faults to try (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="which ones (default: %(default)s)")
    parser.add_argument("--of", default="", help="only of modules that begin so, such as diffusion.training.loop")
    arguments = parser.parse_args()
    mutmut("run", ANY)
    states = dict(line.strip().rsplit(": ", 1) for line in mutmut("results", "--all", "true").splitlines())
    names = sorted(name for name in states if name.startswith(arguments.of))
    chosen = random.Random(arguments.seed).sample(names, min(arguments.count, len(names)))
    mutmut("run", *chosen)
    states = dict(line.strip().rsplit(": ", 1) for line in mutmut("results", "--all", "true").splitlines())
    unnoticed = [name for name in chosen if states[name] not in ("killed", "timeout")]
    for name in unnoticed:
        print(mutmut("show", name))
    print(f"{len(chosen) - len(unnoticed)} of {len(chosen)} faults were noticed")
    return bool(unnoticed)


if __name__ == "__main__":
    sys.exit(main())
