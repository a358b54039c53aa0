"""`ddpm compare`: several runs side by side, on one page and as a table on the terminal."""

from collections.abc import Sequence
from pathlib import Path

from diffusion.errors import UsageError, UserError
from diffusion.storage.files import write_atomic
from flows.comparison import figures
from flows.comparison.figures import Figure
from flows.comparison.page import Compared, page
from flows.pages import contents
from flows.pages.rendering import number
from flows.paths import Paths
from flows.recorded import read_parameters
from flows.run_report import find, open_page

TREE = "."
"""The working tree, in place of a run."""


def show(runs: Sequence[str], out: Path | None) -> None:
    """Write the page, print the table and the page's path, and open it.

    Args:
        runs: two or more names of runs; TREE is the working tree.
        out: the page to write; by default reports/compare.html.
    Raises:
        UserError: a run does not exist or has no evaluation, or `out` is a folder.
    """
    if len(runs) < 2:
        raise UsageError(f"takes two or more runs (got {len(runs)})")
    file = Paths().comparison if out is None else out
    if file.is_dir():
        raise UserError(f"--out: {file} is a folder; name a file")
    folders = [find(None if name == TREE else name) for name in runs]
    compared = [_read(paths) for paths in folders]
    names = [each.name for each in compared]
    if twice := next((name for name in names if names.count(name) > 1), None):
        raise UsageError(f"{twice} is there twice; name different runs")
    found = figures.compare([each.contents for each in compared])
    write_atomic(file, page(compared, found).encode())
    print(table(names, found))
    print(f"\n{file}")
    open_page(file)


def table(names: list[str], found: list[Figure]) -> str:
    """The figures as text; differences are from the first run."""
    rows = [["", *names]]
    for figure in found:
        differences = [None, *figure.differences]
        cells = []
        for value, difference in zip(figure.values, differences, strict=True):
            text = number(value.value) if value else ""
            cells.append(f"{text} ({difference.word}{', paired' * difference.paired})" if difference else text)
        rows.append([figure.title, *cells])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in rows]
    return "\n".join(lines)


def _read(paths: Paths) -> Compared:
    return Compared(paths.root.name or "working tree", read_parameters(paths), contents.read(paths))
