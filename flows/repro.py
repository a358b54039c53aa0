"""`dvc repro`, except that lock entries with missing outputs do not bypass the run cache.

DVC restores an unchanged stage only from the outputs in its lock entry. If these are in neither the working tree, the
cache nor a remote, for instance after cloning a repository with someone else's dvc.lock, DVC runs the stage even though
its run cache has the results of an earlier run. `python -m flows.repro` accepts the arguments of `dvc repro`.
"""

import sys
from collections.abc import Sequence
from typing import Any

from dvc import cli
from dvc.commands import repro
from dvc.repo.reproduce import _reproduce_stage
from dvc_data.hashfile.hash_info import HashInfo

from flows import dvc_remote
from flows.environment import PUSH, setting


class Repro(repro.CmdRepro):  # type: ignore[misc] # dvc has no types
    @property
    def _repro_kwargs(self) -> dict[str, Any]:
        return {**super()._repro_kwargs, "repro_fn": reproduce}


def reproduce(stage: Any, **options: Any) -> Any:
    """Bring one stage up to date, given that its dependencies are.

    Outputs that exist only in the working tree are saved to the cache, and those only in a remote are fetched. If the
    outputs are nowhere, the lock entry is dropped in memory; dvc.lock keeps it until the stage succeeds.
    """
    if not (options["force"] or options["dry"]) and _not_in_cache(stage):
        if not any(out.workspace_status() for out in stage.outs):
            stage.commit()
        elif not _fetch(stage):
            print(
                f"dvc.lock: the outputs of {stage.addressing} are in neither the cache nor a remote; "
                "looking for the results of an earlier run in the run cache",
                flush=True,
            )
            for out in stage.outs:
                out.hash_info = HashInfo()
    shared = setting(PUSH, False, bool) and stage.cmd and not (options["force"] or options["dry"])
    if shared:
        dvc_remote.take(stage)
    result = _reproduce_stage(stage, **options)
    if shared:
        dvc_remote.give(stage)
    return result


def _not_in_cache(stage: Any) -> bool:
    """Whether DVC would restore a stage's outputs according to its lock entry, but the cache lacks them."""
    return (
        bool(stage.cmd)
        and all(out.hash_info for out in stage.outs)
        and not stage.changed_stage()
        and stage.deps_cached()
        and not stage.outs_cached()
    )


def _fetch(stage: Any) -> bool:
    """Fetch a stage's outputs from the remotes, the default one first; returns whether all are in the cache."""
    config = stage.repo.config
    default = config["core"].get("remote")
    for remote in sorted(config["remote"], key=lambda name: name != default):
        reason = "not there, or the remote is unreachable"  # DVC does not always distinguish these
        try:
            stage.repo.fetch(stage.addressing, remote=remote)
        except Exception as error:  # each storage backend has its own exceptions
            reason = " ".join(str(error).split()) or type(error).__name__
        if stage.outs_cached():
            return True
        print(f"remote {remote!r}: cannot fetch the outputs of {stage.addressing}: {reason}", flush=True)
    return False


def main(argv: Sequence[str] | None = None) -> int:
    repro.CmdRepro = Repro  # the class that DVC's parser looks up
    arguments = sys.argv[1:] if argv is None else argv
    status: int = cli.main(["--wait-for-lock", "repro", *arguments])
    return status


if __name__ == "__main__":
    sys.exit(main())
