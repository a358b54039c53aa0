"""`dvc repro`, except that lock entries whose outputs exist nowhere do not hide the run cache.

DVC takes an unchanged stage with a lock entry from that entry's outputs alone. Where these are in neither the working
tree nor the cache nor a remote, as after cloning a repository with someone else's dvc.lock, it runs the stage even
though its run cache holds the results of an earlier run here. `python -m flows.repro` takes the arguments of
`dvc repro`.
"""

import sys
from collections.abc import Sequence
from typing import Any

from dvc import cli
from dvc.commands import repro
from dvc.repo.reproduce import _reproduce_stage
from dvc_data.hashfile.hash_info import HashInfo


class Repro(repro.CmdRepro):  # type: ignore[misc] # dvc has no types
    @property
    def _repro_kwargs(self) -> dict[str, Any]:
        return {**super()._repro_kwargs, "repro_fn": reproduce}


def reproduce(stage: Any, **options: Any) -> Any:
    """Bring one stage up to date, its dependencies being so already.

    Outputs that only the working tree has are saved to the cache, and those that only a remote has are fetched. An
    entry whose outputs are nowhere is forgotten, in memory: dvc.lock keeps it until the stage has succeeded.
    """
    if not (options["force"] or options["dry"]) and _not_in_cache(stage):
        if not any(out.workspace_status() for out in stage.outs):
            stage.commit()
        elif not _fetch(stage):
            print(
                f"dvc.lock: the outputs of {stage.addressing} are in neither the cache nor a remote; "
                "looking for results of an earlier run instead",
                flush=True,
            )
            for out in stage.outs:
                out.hash_info = HashInfo()
    return _reproduce_stage(stage, **options)


def _not_in_cache(stage: Any) -> bool:
    """Whether DVC would take a stage's outputs from the cache, by its lock entry, but the cache lacks them."""
    return (
        bool(stage.cmd)
        and all(out.hash_info for out in stage.outs)
        and not stage.changed_stage()
        and stage.deps_cached()
        and not stage.outs_cached()
    )


def _fetch(stage: Any) -> bool:
    """Fetch a stage's outputs from the configured remotes, the default one first; whether they are all here now."""
    config = stage.repo.config
    default = config["core"].get("remote")
    for remote in sorted(config["remote"], key=lambda name: name != default):
        reason = "not there, or the remote cannot be reached"  # DVC does not always tell these apart
        try:
            stage.repo.fetch(stage.addressing, remote=remote)
        except Exception as error:  # each kind of storage raises errors of its own
            reason = " ".join(str(error).split()) or type(error).__name__
        if stage.outs_cached():
            return True
        print(f"remote {remote!r}: the outputs of {stage.addressing} cannot be fetched: {reason}", flush=True)
    return False


def main(argv: Sequence[str] | None = None) -> int:
    repro.CmdRepro = Repro  # what DVC's parser will look up
    arguments = sys.argv[1:] if argv is None else argv
    status: int = cli.main(["--wait-for-lock", "repro", *arguments])
    return status


if __name__ == "__main__":
    sys.exit(main())
