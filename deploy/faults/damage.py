"""Files that change behind the back of the project: a flipped bit, or an end that is missing."""

import random
import re
import sys
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

from deploy.faults import training
from deploy.faults.case import Case, Seen
from deploy.faults.clone import OUTPUTS, REPRO, Clone, ddpm, must, refused, same
from deploy.faults.training import ALWAYS, TRAIN

CHECKPOINTS = ".ddpm/checkpoints/*"
SCRUB = (sys.executable, "-m", "flows.scrub")


def flipped(content: bytes, chance: random.Random) -> bytes:
    bit = chance.randrange(8 * len(content))
    return content[: bit // 8] + bytes([content[bit // 8] ^ 1 << bit % 8]) + content[bit // 8 + 1 :]


def cut(content: bytes, chance: random.Random) -> bytes:
    return content[: chance.randrange(len(content))]


DAMAGES = (flipped, cut)


def read(path: str, command: Sequence[str], clone: Clone) -> int:
    """Damage a file in each way, and have it read by a command, which must refuse and write nothing; the number."""
    file, chance = clone.path / path, random.Random(path)
    whole = file.read_bytes()
    for damage in DAMAGES:
        file.unlink()  # in DVC's cache, it may be the same file
        file.write_bytes(damage(whole, chance))
        before = clone.digests(*OUTPUTS)
        refused(clone.call(*ddpm(*command)), rf"^ddpm {command[0]}: error: {re.escape(path)}: ")
        same(f"after `ddpm {command[0]}`, all files", clone.digests(*OUTPUTS), before)
    return len(DAMAGES)


def of_a_stage(path: str, command: Sequence[str], reference: Clone) -> Seen:
    """Damage the output of a stage, and mend it as the documentation says."""
    with tempfile.TemporaryDirectory() as folder:
        clone = reference.copy(Path(folder) / "clone", (".ddpm",))
        times = read(path, command, clone)
        (clone.path / path).unlink()
        clone.do(*SCRUB)
        clone.do(*REPRO)
        same(
            "all results, after the file was deleted and `make scrub` and `dvc repro` were run,",
            *_both(clone, reference),
        )
    return Seen(
        times,
        f"`ddpm {command[0]}: error: {path}: ...`, which says what is wrong with it; nothing is written; deleting the "
        "file, `make scrub` and `dvc repro` bring back the same bytes",
    )


def _both(clone: Clone, reference: Clone) -> tuple[dict[str, str], dict[str, str]]:
    return clone.digests(*OUTPUTS), reference.digests(*OUTPUTS)


def checkpoints(reference: Clone) -> Seen:
    """Damage the newest checkpoint of a killed training, then all."""
    wanted = reference.digests("models/ddpm", *reference.outputs("train"))
    chance, newest, used = random.Random(0), (lambda found: found[-1:]), list[str]()
    which: tuple[Callable[[list[Path]], list[Path]], ...] = (newest, newest, lambda found: found)
    with tempfile.TemporaryDirectory() as folder:
        for number, (damage, chosen) in enumerate(zip((*DAMAGES, flipped), which, strict=True)):
            clone = reference.before("train", Path(folder) / str(number))
            must("a training is killed", training.kill(clone, partial(_at_step, clone, 5)))
            found = [path.with_suffix(".safetensors") for path in sorted(clone.path.glob(f"{CHECKPOINTS}/0*.json"))]
            for path in chosen(found):
                path.write_bytes(damage(path.read_bytes(), chance))
            done = clone.call(*TRAIN, **ALWAYS)
            must("the training ends", done.returncode == 0, done)
            must("the checkpoint is named", f"train: checkpoint {found[-1].stem} is corrupt (" in done.stderr, done)
            step = re.search(r"resuming from step (\d+)", done.stderr)
            used.append(f"step {step[1]} instead of {int(found[-1].stem)}" if step else "the start")
            same("model and reports", clone.digests("models", *clone.outputs("train")), wanted)
    return Seen(
        len(used),
        "`train: checkpoint STEP is corrupt (digest mismatch); using the previous one`; training continues from the "
        f"one before, or from the start if all are damaged ({'; '.join(used)}); the same bytes",
    )


def _at_step(clone: Clone, step: int) -> bool:
    return any(int(path.stem) >= step for path in clone.path.glob(f"{CHECKPOINTS}/0*.json"))


def cached(reference: Clone) -> Seen:
    """Damage a shard in DVC's cache, of which `dvc checkout` then makes a copy."""
    path, times = "data/shards/train-000000.tar", 0
    with tempfile.TemporaryDirectory() as folder:
        clone = reference.copy(Path(folder) / "clone", (".ddpm",))
        objects = [file for file in (clone.path / ".dvc/cache/files/md5").glob("??/*") if file.is_file()]
        whole = (clone.path / path).read_bytes()
        (stored,) = [file for file in objects if file.stat().st_size == len(whole) and file.read_bytes() == whole]
        for damage in DAMAGES:
            stored.chmod(0o644)
            stored.write_bytes(damage(whole, random.Random(times)))
            stored.chmod(0o444)  # as DVC does, which then trusts it
            (clone.path / path).unlink()
            clone.do("dvc", "checkout", "--force", "data/shards")
            refused(clone.call(*ddpm("pairs")), rf"^ddpm pairs: error: {re.escape(path)}: damaged")
            said = clone.do(*SCRUB)
            must("`make scrub` names and deletes it", stored.name in said and not stored.exists(), said)
            (clone.path / path).unlink()
            clone.do(*REPRO)
            same("all results, after `make scrub` and `dvc repro`,", *_both(clone, reference))
            times += 1
    return Seen(
        times,
        "`dvc checkout` copies it, since DVC trusts its cache; the next stage refuses the copy by name; `make scrub` "
        "finds and deletes the object (`deleted PATH`), and `dvc repro` brings back the same bytes",
    )


def lock(reference: Clone) -> Seen:
    """Damage dvc.lock, which `dvc repro` reads."""
    chance, outcomes = random.Random(0), {"refused": 0, "made again": 0}
    with tempfile.TemporaryDirectory() as folder:
        clone = reference.copy(Path(folder) / "clone", (".ddpm",))
        file = clone.path / "dvc.lock"
        whole = file.read_bytes()
        for damage in DAMAGES * 3:
            file.write_bytes(damage(whole, chance))
            done = clone.call(*REPRO)
            if done.returncode:
                must("the error names the file", "dvc.lock" in done.stderr, done)
                must("it is no traceback", "Traceback" not in done.stderr, done)
                file.unlink()
                clone.do(*REPRO)
            outcomes["refused" if done.returncode else "made again"] += 1
            same("all results", *_both(clone, reference))
            same("dvc.lock", clone.digests("dvc.lock"), reference.digests("dvc.lock"))
    times = sum(outcomes.values())
    return Seen(
        times,
        f"`'./dvc.lock' is invalid.` with the line ({outcomes['refused']} of {times}): delete the file; "
        "where it is still valid YAML, `dvc repro` sees that it does not match; either way `dvc repro` takes the "
        "results from its cache, with the same bytes, and writes the file as it was",
    )


FILES = {
    "shard": ("A shard", "data/shards/train-000000.tar", ("pairs",)),
    "pairs": ("A file of pair blocks", "data/pairs/train-000000.tar", ("train",)),
    "weights": ("The file of trained weights", "models/ddpm/model.safetensors", ("evaluate",)),
    "onnx": ("An exported ONNX model", "models/onnx/sampler.onnx", ("verify-onnx", "models/onnx/sampler.onnx")),
}
CASES = {
    **{
        f"damaged-{name}": Case(
            f"{what} is damaged: a bit flipped, the end cut off", partial(of_a_stage, path, command)
        )
        for name, (what, path, command) in FILES.items()
    },
    "damaged-checkpoint": Case("A checkpoint is damaged: a bit flipped, the end cut off", checkpoints),
    "damaged-cache": Case("A file in DVC's cache is damaged: a bit flipped, the end cut off", cached),
    "damaged-lock": Case("`dvc.lock` is damaged: a bit flipped, the end cut off", lock),
}
