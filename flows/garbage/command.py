"""`ddpm gc`: what takes up space, and deleting what is not needed."""

import json
import shlex
from contextlib import nullcontext
from typing import Any

from rich.filesize import decimal

from flows import dvc_add
from flows.garbage import collect
from flows.garbage.collect import Garbage
from flows.garbage.rules import Rule
from flows.paths import Paths


def run(keep: int | None, older_than: str | None, *, force: bool, as_json: bool) -> None:
    """Print what takes up space and what can be deleted; delete it if `force`.

    Raises:
        UserError: an option is wrong, or it is not known what is needed.
    """
    rule = Rule.of(keep, older_than)
    dvc_add.check_repository(Paths())
    with collect.at_rest() if force else nullcontext():
        found = collect.find(rule)
        if force:
            collect.delete(found)
    print(json.dumps(_as_json(found, force)) if as_json else _as_text(found, rule, force))


def _as_json(found: Garbage, force: bool) -> dict[str, Any]:
    return {
        "deleted": force,
        "bytes": found.taken,
        "freed": found.freed,
        "parts": {part.name: {"bytes": part.space.taken, "freed": part.space.freed} for part in found.parts},
        "runs": [run.name for _, run in found.runs],
        "kept": found.stays,
    }


def _as_text(found: Garbage, rule: Rule, force: bool) -> str:
    went = "DELETED" if force else "RECLAIMABLE"
    rows = [("", "SIZE", went, "")]
    rows += [(part.name, _size(part.space.taken), _size(part.space.freed), part.what) for part in found.parts]
    rows.append(("total", _size(found.taken), _size(found.freed), ""))
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = [
        f"{name.ljust(widths[0])}  {size.rjust(widths[1])}  {freed.rjust(widths[2])}  {what}".rstrip()
        for name, size, freed, what in rows
    ]
    if found.runs:
        lines.append(f"\nruns {'deleted' if force else 'to delete'}: {', '.join(run.name for _, run in found.runs)}")
    if found.stays:
        lines.append(f"\nruns kept: {', '.join(f'{name} ({why})' for name, why in found.stays.items())}")
    if not force and found.freed:
        lines.append(f"\nNothing was deleted; `{_command(rule)}` deletes it.")
    return "\n".join(lines)


def _size(size: int) -> str:
    return decimal(size) if size else "0"


def _command(rule: Rule) -> str:
    keep = [] if rule.keep is None else ["--keep", str(rule.keep)]
    older_than = ["--older-than", rule.text] if rule.text else []
    return shlex.join(["ddpm", "gc", *keep, *older_than, "--force"])
