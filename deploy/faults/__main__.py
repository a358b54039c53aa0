"""Inject faults for real, and write what was seen to deploy/FAULTS.md.

    python -m deploy.faults [servers] [local] [--only NAME...]

Faults of a team's servers and workers need Debian's `postgresql` and the packages of deploy/team/rehearse.py; local
ones need root's rights for the disks, and Debian's `faketime` for the clock. A group that ran as a whole replaces its
part of the file. A fault by which anything is lost fails the command.
"""

import argparse
import contextlib
import re
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, NamedTuple

from deploy.faults import clocks, clone, damage, disks, servers, training, two
from deploy.faults.case import Case, Seen, Unavailable
from deploy.team.stack import Failed, said

FILE = Path(__file__).parents[1] / "FAULTS.md"
HEAD = """# Faults

What happens when a part dies, a disk is full, or a file is damaged. Made by `python -m deploy.faults`, which injects
each fault for real, and fails if anything is lost.
"""


@contextlib.contextmanager
def _clones() -> Iterator[Callable[[int], clone.Clone]]:
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        reference = clone.prepared(Path(folder))
        yield lambda _: reference


class Group(NamedTuple):
    """Faults that share what they are injected into."""

    title: str
    text: str
    cases: Mapping[str, Case]
    prepared: Callable[[], AbstractContextManager[Callable[[int], Any]]]
    """Gives what makes the argument of a case, given its number."""
    at_once: int = 1
    """How many are injected at once."""


GROUPS = {
    "servers": Group(
        "Servers and workers",
        "While a run trains, on a team's servers and workers as processes of one machine. Checked, as far as the fault "
        "concerns them: the run completes, or continues from its checkpoint; MLflow has every point of the curve of "
        "held-out errors; all results can be pushed.",
        servers.CASES,
        servers.trials,
    ),
    "local": Group(
        "One machine",
        "In clones with small parameters, without servers. Afterwards, all results are compared with those of a clone "
        "in which nothing went wrong, byte by byte.",
        training.CASES | disks.CASES | clocks.CASES | two.CASES | damage.CASES,
        _clones,
        at_once=2,
    ),
}


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m deploy.faults", description=(__doc__ or "").split("\n\n")[0])
    names = [name for group in GROUPS.values() for name in group.cases]
    parser.add_argument("groups", nargs="*", choices=[*GROUPS, []], help="which faults; by default all")
    parser.add_argument("--only", nargs="+", choices=names, help="faults to inject, without writing the file")
    arguments = parser.parse_args(argv)
    only = arguments.only or names
    try:
        for name in arguments.groups or GROUPS:
            group = GROUPS[name]
            if chosen := [each for each in group.cases if each in only]:
                rows = inject(group, chosen)
                if len(chosen) == len(group.cases):
                    FILE.write_text(with_part(FILE.read_text() if FILE.exists() else "", group, rows))
    except Failed as error:
        print(f"failed: {error}", file=sys.stderr)
        return 1
    return 0


def inject(group: Group, names: Sequence[str]) -> list[str]:
    """Inject some faults of a group; the rows of its table."""
    with group.prepared() as prepared, ThreadPoolExecutor(group.at_once) as pool:

        def one(number: int, case: Case) -> str:
            said(case.fault)
            try:
                found = row(case, case.inject(prepared(number)))
            except Unavailable as error:
                found = f"| {case.fault} | 0 | not injected: {error} | not known |\n"
            said(found.strip())
            return found

        return list(pool.map(one, range(len(names)), [group.cases[name] for name in names]))


def row(case: Case, seen: Seen) -> str:
    return f"| {case.fault} | {seen.times} | {seen.text} | nothing |\n"


def with_part(text: str, group: Group, rows: Sequence[str]) -> str:
    """The file, with new rows for a group, and those of the others as they are."""
    former = dict(re.findall(r"^(## .*)\n((?:(?!## ).*\n)*)", text, re.MULTILINE))
    table = "| fault | injected | what the user sees | lost |\n|---|---|---|---|\n" + "".join(rows)
    former[f"## {group.title}"] = f"\n{group.text}\n\n{table}"
    titles = [f"## {each.title}" for each in GROUPS.values()]
    return HEAD + "".join(f"\n{title}\n{former[title].rstrip()}\n" for title in titles if title in former)


if __name__ == "__main__":
    sys.exit(main())
