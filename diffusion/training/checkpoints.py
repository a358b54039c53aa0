"""Rolling checkpoints of a training run."""

import hashlib
import json
from itertools import islice
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from diffusion.progress import say
from diffusion.storage.files import write_atomic, write_json
from diffusion.training.distributed import World
from diffusion.training.state import State


class Checkpoints:
    """Checkpoints of one training run: a directory with the last two and the last good one.

    A checkpoint consists of STEP.safetensors and STEP.json, which is written last and holds a digest of both; without
    the JSON file, or if the digest differs, the checkpoint is ignored. A good checkpoint follows a finite held-out
    measurement, at a step that the parameters determine. So a rollback does not depend on when the periodic checkpoints
    were written.
    """

    KEEP = 2

    def __init__(
        self,
        directory: Path,
        world: World = World(),  # noqa: B008 (immutable)
        seconds: float = 60.0,
        stage: str = "train",
    ) -> None:
        self.directory, self.world = directory, world
        self.stage = stage
        """For messages."""
        self.seconds = seconds
        """Time between checkpoints, besides those after each held-out measurement. Does not affect the result."""

    def write(self, state: State, good: bool = False) -> None:
        """Write the state; a collective call, in which the main process writes."""
        sums = self.world.gather(state.sums[None]).cpu()  # they differ between processes
        tensors = state.tensors() if self.world.main or state.sharded else {}
        if not self.world.main:
            return
        name = f"{state.step:010d}"
        weights = self.directory / f"{name}.safetensors"
        # Delete an existing JSON file of this step first, so that it never describes other weights.
        good = good or _is_good(weights.with_suffix(".json"))
        content, facts = save(tensors | {"sums": sums}), {"good": good} | state.facts()
        if not weights.exists() or weights.read_bytes() != content:
            weights.with_suffix(".json").unlink(missing_ok=True)
            write_atomic(weights, content)
        write_json(weights.with_suffix(".json"), {"sha256": _digest(content, facts), "facts": facts})
        newest = _newest_first(self.directory)
        kept = {path.stem for path in [*newest[: self.KEEP], *islice(filter(_is_good, newest), 1)]}
        for path in [*self.directory.glob("*[0-9].json*"), *self.directory.glob("*.safetensors*")]:
            if path.name.split(".")[0] not in kept:  # older, or left unfinished by a killed process
                path.unlink()

    def restore(self, state: State, good: bool = False) -> bool:
        """Restore the newest intact (and if `good`, good) checkpoint into `state`; returns False if there is none.

        A collective call; only the main process needs the files.
        """
        facts, tensors = dict[str, Any](), dict[str, Tensor]()
        weights = b""
        for path in _newest_first(self.directory) if self.world.main else []:
            if good and not _is_good(path):
                continue
            try:
                written, weights = json.loads(path.read_bytes()), path.with_suffix(".safetensors").read_bytes()
                if _digest(weights, written["facts"]) != written["sha256"]:
                    raise ValueError("digest mismatch")
                tensors = load(weights)
            except (OSError, ValueError, KeyError, TypeError, RecursionError, SafetensorError) as error:
                say(f"{self.stage}: checkpoint {path.stem} is corrupt ({error}); using the previous one")
            else:
                facts = written["facts"]
                break
        facts = self.world.broadcast(facts)
        if facts:
            del facts["good"]
            weights = self.world.broadcast_bytes(weights)
            tensors = tensors or load(weights)
            tensors["sums"] = tensors["sums"][self.world.rank]
            state.restore(tensors, facts)
        return bool(facts)

    def delete_after(self, step: int) -> None:
        """Delete the checkpoints of steps after `step`."""
        for path in _newest_first(self.directory) if self.world.main else []:
            if int(path.stem) > step:
                path.unlink()
                path.with_suffix(".safetensors").unlink(missing_ok=True)


def newest_step(directory: Path) -> int | None:
    """Step of the newest checkpoint in a directory; None if there is none."""
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
