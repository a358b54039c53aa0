"""Advice for files that cannot be used."""

from pathlib import Path

from diffusion.errors import Damaged, FileFault
from flows import dvc_yaml
from flows.paths import Paths
from flows.stages import STUDENT_STAGES


def with_remedy(error: Exception) -> str:
    """An error in one line, with advice if it concerns a file that a stage writes."""
    stage = stage_of(error) if isinstance(error, FileFault) else None
    if stage is None:
        return str(error)
    if isinstance(error, Damaged):
        # DVC trusts the read-only files in its cache without hashing them: `dvc checkout --force` restores the damaged
        # file, and so does the first checkout after `dvc repro --force`. Only deleting the cached copy helps.
        again = dvc_yaml.repro(student=stage in STUDENT_STAGES)
        return f"{error}; delete it, run `make scrub` (the DVC cache may hold the same damaged file), then `{again}`"
    return f"{error}; `dvc repro {dvc_yaml.target(stage)}` writes it{_or_apply(distilled=stage in STUDENT_STAGES)}"


def _or_apply(distilled: bool) -> str:
    """How to take the file from the last flow run instead; empty in a run's workspace."""
    if Path("run.json").exists():
        return ""
    from flows import workspace

    last = workspace.newest("completed", distilled=distilled)
    return f", or `ddpm apply {last.name}` takes the results of the last flow run" if last else ""


def stage_of(error: FileFault) -> str | None:
    """The stage that writes a file of the working tree; None if no stage does."""
    student = Paths(student=True)
    return _stage_of(error, student) or _stage_of(error, Paths())


def _stage_of(error: FileFault, paths: Paths) -> str | None:
    written = {
        "shard": (paths.shards,),
        "pairs": (paths.pairs,),
        "train": (paths.model, paths.train_report, paths.train_curves, paths.previews),
        "evaluate": (paths.evaluation, paths.evaluate_report, paths.report),
        "export": (paths.onnx, paths.export_report),
    }
    at = error.path.absolute()
    return next(
        (paths.stage(stage) for stage, made in written.items() if any(at.is_relative_to(p.absolute()) for p in made)),
        None,
    )
