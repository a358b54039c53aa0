"""`ddpm report`: the report of a run, or of the working tree, as one page with everything that is known of it."""

import os
import sys
import webbrowser
from pathlib import Path
from typing import Any

from diffusion.errors import Damaged, FileFault, UserError
from diffusion.storage.files import write_atomic
from flows import gate, made_with, params, workspace
from flows import report as markdown
from flows import summary as summaries
from flows.pages import contents, report
from flows.params import Params
from flows.paths import Paths
from flows.recorded import read_parameters
from flows.stages import STAGES


def show(run: str | None) -> None:
    """Write the page of a run, or of the working tree for None, print its path and open it.

    That of a distillation is the page that its stage evaluate-student has written.
    """
    if run is not None and workspace.Run.read(workspace.find(run)).teacher:
        file = _evaluated(Paths(workspace.find(run), student=True)).report
    else:
        paths = find(run)
        file = paths.run_report
        write_atomic(file, page(paths, run is not None).encode())
    print(file)
    open_page(file)


def find(run: str | None) -> Paths:
    """The files of a training's run, or of the working tree for None.

    Raises UserError if there is no evaluation, or if the run is a distillation.
    """
    if run is None:
        if not Paths().evaluate_report.exists():
            raise FileFault(Paths().evaluate_report, "missing")
        return Paths()
    paths = Paths(workspace.find(run))
    if teacher := workspace.Run.read(paths.root).teacher:
        raise UserError(
            f"run {paths.root.name!r}: a distillation of {teacher!r}; `ddpm report {paths.root.name}` compares both, "
            "and `ddpm compare` takes trainings only"
        )
    return _evaluated(paths)


def _evaluated(paths: Paths) -> Paths:
    """A run's files; raises UserError if there is no evaluation among them."""
    if not paths.evaluate_report.exists():
        state = workspace.state_of(paths.root, workspace.Run.read(paths.root))
        raise UserError(f"run {paths.root.name!r}: it has no evaluation to show; its state is {state}")
    return paths


def page(paths: Paths, is_run: bool) -> str:
    """Render the report with all that the folder says."""
    parameters = read_parameters(paths)
    summary = summaries.read(paths.root) if (paths.root / "summary.json").exists() else None
    about = report.About(
        name=paths.root.name if is_run else "",
        when=_when(paths) if is_run else _tree(paths),
        parameters=parameters,
        stages=summary.stages if summary else [],
        gate=summary.gate if summary else [],
        decision=gate.sentence(summary.gate) if summary and summary.gate else "",
        export=_export(paths),
        commands=_commands(paths) if is_run else ["dvc repro"],
        digests=_digests(paths),
    )
    return report.page(contents.read(paths), parameters, made_with.flat(Params()), about)


def open_page(path: Path) -> None:
    """Open a page in a browser, if someone is at a terminal with a display."""
    display = sys.platform in ("darwin", "win32") or os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY")
    if sys.stdout.isatty() and display:
        webbrowser.open(path.absolute().as_uri())


def _export(paths: Paths) -> list[list[str]]:
    """The table of the ONNX files; empty if there are none. Raises FileFault if their report is damaged."""
    if not paths.export_report.exists():
        return []
    try:
        return markdown.precisions(paths.export_report)
    except (ValueError, TypeError, KeyError, AttributeError):
        raise Damaged(paths.export_report, "it is not what export writes") from None


def _tree(paths: Paths) -> str:
    """A sentence that says what is shown, and one that names the parameters changed since, if there are any."""
    shown = "The results in the working tree."
    try:
        now = made_with.flat(params.load(paths.params))  # validated: a choice may be written in a short form
    except UserError as error:
        return f"{shown} params.yaml is not valid now: {error}."
    records = [contents.read_record(paths, stage)["params"].items() for stage in STAGES]
    changed = sorted({name for record in records for name, value in record if name in now and now[name] != value})
    return f"{shown} Changed since in params.yaml: {', '.join(changed)}." if changed else shown


def _when(paths: Paths) -> str:
    run = workspace.Run.read(paths.root)
    ended = f", ended {_minute(run.ended)}" if run.ended else ""
    code = f"revision {run.git_revision[:12]}" + (" with uncommitted changes" if run.git_dirty else "")
    return f"Started {_minute(run.created)}{ended} (UTC); {workspace.state_of(paths.root, run)}; code: {code}."


def _minute(time: str) -> str:
    return time[:16].replace("T", " ")


def _commands(paths: Paths) -> list[str]:
    run = workspace.Run.read(paths.root)
    copied = f"  # it had uncommitted changes: its code is in {paths.root}" if run.git_dirty else ""
    return [
        f"git checkout {run.git_revision}{copied}",
        f"ddpm apply {run.name}  # its params.yaml, dvc.lock and results; without them, `dvc repro` makes them again",
        "dvc repro",
    ]


def _digests(paths: Paths) -> dict[str, str]:
    """Of the files that the stages read and wrote, by path."""
    found: dict[str, Any] = {}
    for stage in STAGES:
        record = contents.read_record(paths, stage)
        found |= record["read"] | record["wrote"]
    return {name: digest for name, digest in found.items() if isinstance(digest, str)}
