"""The measurements as tables: at the end of a run, and of all files of results on one page."""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from diffusion.storage.files import write_atomic
from gpu_measurements.bench import Facts

OF_A_SLICE = ("slice", "images_per_s", "mfu", "share_of_products", "first_s", "peak_gib")
"""What differs between the slices of one contender."""
MACHINE = ("driver", "python", "torch", "cuda", "cudnn", "onnxruntime", "diffusers", "numpy", "cores")
REHEARSAL = "CPU, rehearsal"
"""The device that a rehearsal states."""
WIDEST = 12
"""Columns of a table; further ones stay in the file."""
HEADING = """# Measured on GPUs

`python benchmarks/gpu.py --page` makes this page of the files `gpu-*.jsonl` beside it.
"""


def tables(lines: Iterable[Facts]) -> str:
    """The measurements of a run, Markdown: a table for each, with the slices of each contender as one row."""
    by_name: dict[str, list[Facts]] = {}
    for line in lines:
        facts = {key: value for key, value in line.items() if key != "measurement"}
        if line["measurement"] != "machine":
            by_name.setdefault(line["measurement"], []).append(facts)
    parts = []
    for name, rows in by_name.items():
        parts.append(f"### {name}\n\n" + "\n\n".join(table(alike) for alike in _alike(merged(rows))))
        if ratio := advantage(rows):
            parts.append(ratio)
    return "\n\n".join(parts) + "\n"


def merged(rows: Iterable[Facts]) -> list[Facts]:
    """The rows, with those that are slices of one contender as one: medians, and the least and the most."""
    found: dict[str, list[Facts]] = {}
    for number, row in enumerate(rows):
        own = {key: value for key, value in row.items() if key not in OF_A_SLICE}
        found.setdefault(json.dumps(own) if "slice" in row else str(number), []).append(row)
    return [_of_slices(group) if "slice" in group[0] else group[0] for group in found.values()]


def _of_slices(group: list[Facts]) -> Facts:
    rates = [row["images_per_s"] for row in group]
    facts = {key: value for key, value in group[0].items() if key not in OF_A_SLICE}
    facts |= {"images_per_s": statistics.median(rates), "from": min(rates), "to": max(rates), "slices": len(rates)}
    for name in ("mfu", "share_of_products"):
        if name in group[0]:
            facts[name] = round(statistics.median(row[name] for row in group), 4)
    return facts | {name: group[0][name] for name in ("first_s", "peak_gib") if group[0].get(name) is not None}


def advantage(rows: Iterable[Facts]) -> str:
    """How many times as fast the fastest of this project's trainings is as the fastest of diffusers'."""
    best: dict[bool, Facts] = {}
    for row in merged(rows):
        if "training" in row and "slices" in row:
            theirs = row["training"].startswith("diffusers")
            if row["images_per_s"] > best.get(theirs, {"images_per_s": 0})["images_per_s"]:
                best[theirs] = row
    if len(best) < 2:
        return ""
    ratio = best[False]["images_per_s"] / best[True]["images_per_s"]
    return f"The fastest here trains {ratio:.2f} times as many images a second as the fastest of diffusers."


def _alike(rows: list[Facts]) -> Iterator[list[Facts]]:
    """Rows in groups: each shares a column with the first of its group."""
    waiting = rows
    while waiting:
        first = {key for key, value in waiting[0].items() if not isinstance(value, Mapping)}
        yield [row for row in waiting if first & row.keys()]
        waiting = [row for row in waiting if not first & row.keys()]


def table(rows: list[Facts]) -> str:
    """Rows as a Markdown table of all their columns, up to WIDEST."""
    columns = list(dict.fromkeys(key for row in rows for key in row))[:WIDEST]
    lines = [columns, ["---"] * len(columns), *([cell(row.get(key)) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """A value as the text of a cell; nothing for None."""
    if value is None:
        return ""
    if isinstance(value, Mapping):
        return "; ".join(f"{name} {cell(each)}" for name, each in value.items()).replace("|", "\\|")
    if isinstance(value, list):
        return "; ".join(cell(each) for each in value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    text = f"{value:.5g}" if isinstance(value, float) and abs(value) < 10000 else str(value)
    return text.replace("|", "\\|").replace("\n", " ")


def page(files: Mapping[str, list[Facts]], measurements: Mapping[str, str]) -> str:
    """The page of files of results by name; `measurements` are all there are, with what each is."""
    parts, done = [], set[str]()
    for name, lines in files.items():
        machine = _machine(lines)
        commit = machine.get("commit")
        about = "; ".join(f"{key} {machine.get(key) or 'not stated'}" for key in MACHINE)
        of = f"Of commit {commit}." if commit else "**Of earlier code**: the file does not state its commit."
        parts.append(f"## {machine.get('device', 'a GPU that is not stated')} ([{name}]({name}))\n\n{of} {about}.")
        parts.append(tables(lines).rstrip())
        if commit:
            done |= {line["measurement"] for line in lines if not {"skipped", "error"} & line.keys()} - {"machine"}
    missing = [f"- `{name}`: {what}" for name, what in measurements.items() if name not in done]
    if not done:
        parts.insert(0, "**No figure of the current code on a GPU exists.**")
    if missing:
        parts.append(
            "## Not measured\n\nNo file that states its commit has a figure of these:\n\n" + "\n".join(missing)
        )
    return "\n\n".join([HEADING.rstrip(), *parts]) + "\n"


def _machine(lines: Iterable[Facts]) -> Facts:
    return next((line for line in lines if line["measurement"] == "machine"), {})


def read(path: Path) -> list[Facts]:
    """The lines of a file of results. Raises UserError, which names the line, unless each is a measurement."""
    found: list[Facts] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append(json.loads(line))
            found[-1]["measurement"]
        except (ValueError, TypeError, KeyError):
            problem = "is not a JSON object with `measurement`; restore or remove the file"
            raise UserError(f"{path}, line {number}: {problem}") from None
    return found


def write(folder: Path, measurements: Mapping[str, str]) -> Path:
    """Write gpu.md of the gpu-*.jsonl files in `folder`, without those of rehearsals; gives its path.

    Raises UserError if a file is damaged.
    """
    files = {path.name: read(path) for path in sorted(folder.glob("gpu-*.jsonl"))}
    files = {name: lines for name, lines in files.items() if _machine(lines).get("device") != REHEARSAL}
    path = folder / "gpu.md"
    write_atomic(path, page(files, measurements).encode())
    return path
