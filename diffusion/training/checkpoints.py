"""The rolling checkpoints of a training."""

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors.torch import load, save

from diffusion.progress import say
from diffusion.storage.files import write_atomic, write_json
from diffusion.training.distributed import World
from diffusion.training.state import State


class Checkpoints:
    """The checkpoints of one training: a directory with the last two and the last good one.

    A checkpoint is STEP.safetensors and then STEP.json, which holds the digest of both: without a JSON file, or with
    another digest, it does not count. A good one was written at a step that the parameters name, after a
    measurement that was finite: what goes back to it does not depend on when the others happened to be written.
    """

    KEEP = 2

    def __init__(self, directory: Path, world: World = World(), seconds: float = 60.0) -> None:  # noqa: B008 (immutable)
        self.directory, self.world = directory, world
        self.seconds = seconds
        """How often one is written, besides those after each held-out measurement. It does not shape the result."""

    def write(self, state: State, good: bool = False) -> None:
        """Write the state. All processes call this together; the main one writes."""
        sums = self.world.gather(state.sums[None]).cpu()  # each process has its own
        tensors = state.tensors() if self.world.main or state.sharded else {}
        if not self.world.main:
            return
        name = f"{state.step:010d}"
        weights = self.directory / f"{name}.safetensors"
        # If another one of this step is there already, its JSON goes first: at no moment it speaks of other weights.
        good = good or _is_good(weights.with_suffix(".json"))
        content, facts = save(tensors | {"sums": sums}), {"good": good} | state.facts()
        if not weights.exists() or weights.read_bytes() != content:
            weights.with_suffix(".json").unlink(missing_ok=True)
            write_atomic(weights, content)
        write_json(weights.with_suffix(".json"), {"sha256": _digest(content, facts), "facts": facts})
        newest = _newest_first(self.directory)
        kept = {path.stem for path in [*newest[: self.KEEP], *islice(filter(_is_good, newest), 1)]}
        for path in [*self.directory.glob("*[0-9].json*"), *self.directory.glob("*.safetensors*")]:
            if path.name.split(".")[0] not in kept:  # an older one, or what a killed process left unfinished
                path.unlink()

    def restore(self, state: State, good: bool = False) -> bool:
        """Put the newest sound checkpoint (of the good ones) into `state`; false if there is none.

        All processes call this together; only the main one has to have the files.
        """
        facts: dict[str, Any] = {}
        weights = b""
        for path in _newest_first(self.directory) if self.world.main else []:
            if good and not _is_good(path):
                continue
            try:
                written, weights = json.loads(path.read_bytes()), path.with_suffix(".safetensors").read_bytes()
                if _digest(weights, written["facts"]) != written["sha256"]:
                    raise ValueError("its digest does not match")
            except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
                say(f"train: checkpoint {path.stem} is damaged ({error}); going back to the one before")
            else:
                facts = written["facts"]
                break
        facts = self.world.broadcast(facts)
        if facts:
            del facts["good"]
            tensors = load(self.world.broadcast_bytes(weights))
            tensors["sums"] = tensors["sums"][self.world.rank]
            state.restore(tensors, facts)
        return bool(facts)

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of later steps than `step`."""
        for path in _newest_first(self.directory) if self.world.main else []:
            if int(path.stem) > step:
                path.unlink()
                path.with_suffix(".safetensors").unlink(missing_ok=True)


def newest_step(directory: Path) -> int | None:
    """The step of the newest checkpoint in a directory; None if there is none."""
    return next((int(path.stem) for path in _newest_first(directory)), None)


def _newest_first(directory: Path) -> list[Path]:
    return sorted(directory.glob("[0-9]*.json"), reverse=True)


def _digest(weights: bytes, facts: dict[str, Any]) -> str:
    digest = hashlib.sha256(weights)
    digest.update(json.dumps(facts, sort_keys=True).encode())
    return digest.hexdigest()


def _is_good(path: Path) -> bool:
    try:
        return bool(json.loads(path.read_bytes())["facts"]["good"])
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return False
