"""Measurements as tables: at the end of a run, and on one page for all result files."""

import json
import statistics
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from diffusion.storage.files import write_atomic
from gpu_measurements.bench import Facts

SLICE_FIELDS = ("slice", "images_per_s", "mfu", "share_of_products", "first_s", "peak_gib")
"""Fields that differ between the slices of a contender."""
MACHINE = ("driver", "python", "torch", "cuda", "cudnn", "onnxruntime", "diffusers", "numpy", "cores")
REHEARSAL = "CPU, rehearsal"
"""The device recorded by a rehearsal."""
MAX_COLUMNS = 12
"""Maximum number of columns in a table; the rest are only in the file."""
REASONS = ("skipped", "error")
"""Fields that tell why there is no result."""
HEADING = """# GPU measurements

Generated from the files `gpu-*.jsonl` in this folder by `python benchmarks/gpu.py --page`.
"""


def tables(lines: Iterable[Facts]) -> str:
    """Markdown tables of a run, one per measurement; the slices of a contender form one row."""
    by_name: dict[str, list[Facts]] = {}
    for line in lines:
        facts = {key: value for key, value in line.items() if key != "measurement"}
        if line["measurement"] != "machine":
            by_name.setdefault(line["measurement"], []).append(facts)
    parts = []
    for name, rows in by_name.items():
        parts.append(f"### {name}\n\n" + "\n\n".join(table(group) for group in _grouped(merged(rows))))
        if ratio := advantage(rows):
            parts.append(ratio)
    return "\n\n".join(parts) + "\n"


def merged(rows: Iterable[Facts]) -> list[Facts]:
    """Merge the slices of each contender into one row with median, minimum and maximum."""
    found: dict[str, list[Facts]] = {}
    for number, row in enumerate(rows):
        own = {key: value for key, value in row.items() if key not in SLICE_FIELDS}
        found.setdefault(json.dumps(own) if "slice" in row else str(number), []).append(row)
    return [_of_slices(group) if "slice" in group[0] else group[0] for group in found.values()]


def _of_slices(group: list[Facts]) -> Facts:
    rates = [row["images_per_s"] for row in group]
    facts = {key: value for key, value in group[0].items() if key not in SLICE_FIELDS}
    facts |= {"images_per_s": statistics.median(rates), "from": min(rates), "to": max(rates), "slices": len(rates)}
    for name in ("mfu", "share_of_products"):
        if name in group[0]:
            facts[name] = round(statistics.median(row[name] for row in group), 4)
    return facts | {name: group[0][name] for name in ("first_s", "peak_gib") if group[0].get(name) is not None}


def advantage(rows: Iterable[Facts]) -> str:
    """The speed of this project's fastest training relative to the fastest of diffusers, as a sentence."""
    best: dict[bool, Facts] = {}
    for row in merged(rows):
        if "training" in row and "slices" in row:
            theirs = row["training"].startswith("diffusers")
            if row["images_per_s"] > best.get(theirs, {"images_per_s": 0})["images_per_s"]:
                best[theirs] = row
    if len(best) < 2:
        return ""
    ratio = best[False]["images_per_s"] / best[True]["images_per_s"]
    return f"The fastest training here has {ratio:.2f} times the images per second of the fastest of diffusers."


def _grouped(rows: list[Facts]) -> Iterator[list[Facts]]:
    """Group rows that share a column with the first row of their group."""
    waiting = rows
    while waiting:
        first = {key for key, value in waiting[0].items() if not isinstance(value, Mapping)}
        yield [row for row in waiting if first & row.keys()]
        waiting = [row for row in waiting if not first & row.keys()]


def table(rows: list[Facts]) -> str:
    """A Markdown table with the first MAX_COLUMNS columns of the rows, and why rows have no result."""
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in REASONS))[:MAX_COLUMNS]
    columns += [key for key in REASONS if any(key in row for row in rows)]
    lines = [columns, ["---"] * len(columns), *([cell(row.get(key)) for key in columns] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def cell(value: Any) -> str:
    """Text of a table cell; empty for None."""
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
    """The page for result files by name; `measurements` describes all measurements by name."""
    parts, done = [], set[str]()
    for name, lines in files.items():
        machine = _machine(lines)
        commit = machine.get("commit")
        about = "; ".join(f"{key} {machine.get(key) or 'unknown'}" for key in MACHINE)
        of = f"Commit {commit}." if commit else "**Older code**: the file does not name its commit."
        parts.append(f"## {machine.get('device', 'Unknown GPU')} ([{name}]({name}))\n\n{of} {about}.")
        parts.append(tables(lines).rstrip())
        if commit:
            done |= {line["measurement"] for line in lines if not line.keys() & set(REASONS)} - {"machine"}
    missing = [f"- `{name}`: {what}" for name, what in measurements.items() if name not in done]
    if not done:
        parts.insert(0, "**There are no measurements of the current code on a GPU.**")
    if missing:
        parts.append("## Not measured\n\nNo file that names its commit has results for:\n\n" + "\n".join(missing))
    return "\n\n".join([HEADING.rstrip(), *parts]) + "\n"


def _machine(lines: Iterable[Facts]) -> Facts:
    return next((line for line in lines if line["measurement"] == "machine"), {})


def read(path: Path) -> list[Facts]:
    """Read a result file; raises UserError naming the line if one is not a measurement."""
    found: list[Facts] = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):
        try:
            found.append(json.loads(line))
            found[-1]["measurement"]
        except (ValueError, TypeError, KeyError):
            problem = "not a JSON object with `measurement`; restore or delete the file"
            raise UserError(f"{path}, line {number}: {problem}") from None
    return found


def write(folder: Path, measurements: Mapping[str, str]) -> Path:
    """Write gpu.md from the gpu-*.jsonl files in `folder`, without rehearsals; returns its path.

    Raises UserError if a file is damaged.
    """
    files = {path.name: read(path) for path in sorted(folder.glob("gpu-*.jsonl"))}
    files = {name: lines for name, lines in files.items() if _machine(lines).get("device") != REHEARSAL}
    path = folder / "gpu.md"
    write_atomic(path, page(files, measurements).encode())
    return path
