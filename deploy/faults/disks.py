"""A disk that is full: stages, an import and DVC, on a file system of limited size."""

import contextlib
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from itertools import count
from pathlib import Path

from deploy.faults.case import Case, Seen, Unavailable
from deploy.faults.clone import OUTPUTS, REPRO, STAGES, Clone, ddpm, must, refused, same, shown
from deploy.team.stack import output_of

FREE = (0, 32_768, 262_144, 2_097_152, 16_777_216)
"""Bytes that are free, in turn: too few, until the command succeeds."""
SPACE = "No space left on device"


class Disk:
    """A file system in memory (tmpfs), whose size can be changed."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def resize(self, free: int) -> None:
        """Leave so many bytes free."""
        stat = os.statvfs(self.folder)
        used = (stat.f_blocks - stat.f_bfree) * stat.f_frsize
        _mount("-o", f"remount,size={max(used + free, stat.f_frsize)}", str(self.folder))


def _mount(*arguments: str) -> None:
    done = subprocess.run(["mount", *arguments], capture_output=True, text=True)
    if done.returncode:
        raise Unavailable(f"no file system of limited size can be mounted ({done.stderr.strip()}); this needs root")


@contextlib.contextmanager
def disk() -> Iterator[Disk]:
    """A file system for a block; raises Unavailable where none can be mounted."""
    with tempfile.TemporaryDirectory() as folder:
        _mount("-t", "tmpfs", "-o", "size=1g", "tmpfs", folder)
        try:
            yield Disk(Path(folder))
        finally:
            subprocess.run(["umount", "--lazy", folder], check=True)


def until_it_fits(
    clone: Clone, space: Disk, command: tuple[str, ...], check: Callable[["subprocess.CompletedProcess[str]"], None]
) -> int:
    """Run a command with more and more space until it succeeds; returns how often it failed, each checked."""
    for failures in count():
        must("the command succeeds with 16 MiB", failures < len(FREE))
        space.resize(FREE[failures])
        done = clone.call(*command)
        if done.returncode == 0:
            must("the command fails on a full disk", failures > 0, done)
            return failures
        check(done)
    raise AssertionError


def stage(name: str, reference: Clone) -> Seen:
    """Run a stage on disks that are too small."""
    named = set[str]()
    with disk() as space:
        clone = reference.before(name, space.folder / "clone")
        before = clone.digests(*OUTPUTS)

        def check(done: "subprocess.CompletedProcess[str]") -> None:
            line = refused(done, rf"^ddpm {name}: error: .*No space left on device\); free some space")
            named.add(line.split(": ")[2])
            found = clone.digests(*OUTPUTS)
            whole = {path: wanted.get(path, "") for path in found.keys() - before.keys()}
            same("files on the full disk", found, before | whole)

        wanted = reference.digests(*reference.outputs(name))
        times = until_it_fits(clone, space, ddpm(name), check)
        same(f"the results of {name}, once there is space,", clone.digests(*reference.outputs(name)), wanted)
        left = clone.digests(*OUTPUTS).keys() - before.keys() - wanted.keys()
        must(f"nothing else is left behind: {left}", not left)
    return Seen(
        times,
        f"`ddpm {name}: error: PATH: cannot be written (No space left on device); free some space`, with PATH "
        f"{shown(named)}; no file is half-written; once there is space, the same command succeeds, with the same bytes",
    )


def imported(reference: Clone) -> Seen:
    """Import images onto disks that are too small for the working tree, or for DVC's cache."""
    named, times = set[str](), 0
    for full in ("tree", "cache"):
        with disk() as space, tempfile.TemporaryDirectory() as folder:
            clone = reference.fresh((space.folder if full == "tree" else Path(folder)) / "clone")
            if full == "cache":
                clone.do("dvc", "cache", "dir", "--local", str(space.folder / "cache"))
            before = clone.digests("data")

            def check(
                done: "subprocess.CompletedProcess[str]", clone: Clone = clone, before: dict[str, str] = before
            ) -> None:
                line = refused(done, r"^ddpm import: error: .*No space left on device")
                named.update(re.findall(r"data/raw/[\w./-]+", line)[:1])
                same("data after the failure", clone.digests("data"), before)

            command = ddpm("import", str(reference.path / "data/raw/digits.npz"), "--name", "mine")
            times += until_it_fits(clone, space, command, check)
            wanted = {**before, "data/raw/mine.npz": before["data/raw/digits.npz"]}
            found = clone.digests("data")
            same("the imported images", {path: found.get(path, "") for path in wanted}, wanted)
    must(f"the line names the file: {named}", named == {"data/raw/mine.npz"})
    return Seen(
        times,
        f"`ddpm import: error: ...`, one line that names {shown(named)} and says `No space left on device`; nothing "
        "is left behind; once there is space, the same command succeeds",
    )


def repro(reference: Clone) -> Seen:
    """`dvc repro` of two stages, with a cache that they do not fit into."""
    with disk() as space, tempfile.TemporaryDirectory() as folder:
        clone = reference.fresh(Path(folder) / "clone")
        clone.do("dvc", "cache", "dir", "--local", str(space.folder / "cache"))

        def check(done: "subprocess.CompletedProcess[str]") -> None:
            must("a command that cannot work ends with a status that is not 0", done.returncode != 0, done)
            must("it prints no traceback", "Traceback" not in output_of(done), done)
            must("DVC says that the disk is full", "ERROR: " in done.stderr and SPACE in done.stderr, done)

        times = until_it_fits(clone, space, (*REPRO, "pairs"), check)
        outputs = reference.outputs("shard", "pairs")
        same("shards and pairs, once there is space,", clone.digests(*outputs), reference.digests(*outputs))
        must("DVC knows the results", "up to date" in clone.do(*REPRO, "pairs"))
        must("the cache is intact", " 0 deleted" in clone.do(sys.executable, "-m", "flows.scrub"))
    return Seen(
        times,
        f"DVC's error line, with `{SPACE}`; once there is space, the same command continues where it was, with the "
        "same bytes, and the cache is intact",
    )


CASES = {
    **{f"disk-{name}": Case(f"The disk is full in the stage {name}", partial(stage, name)) for name in STAGES},
    "disk-import": Case("The disk is full in `ddpm import`", imported),
    "disk-repro": Case("The disk of DVC's cache is full in `dvc repro`", repro),
}
