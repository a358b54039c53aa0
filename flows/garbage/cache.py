"""Which files of DVC's cache nothing uses any more, and holding DVC still while they are deleted.

`dvc gc` follows other rules: it overlooks what .dvcignore hides, such as the lock file of the distillation, and stages
that dvc.yaml no longer has; with --all-commits it fails if the dvc.yaml or params.yaml of a single commit is invalid;
and it writes before it deletes, which a full disk does not allow. Here, every digest in a lock file or .dvc file keeps
what it names. As with `dvc gc`, the entries of the run cache keep nothing.
"""

import hashlib
import json
import os
import re
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

import psutil
from filelock import FileLock, Timeout

from diffusion.errors import Damaged, UserError
from diffusion.progress import say
from flows import dvc_config, workspace
from flows.dvc_lock import FILE
from flows.paths import Paths

_DIGEST = re.compile(rb"(?<![0-9a-f])[0-9a-f]{32}(?![0-9a-f])(?:\.dir)?")
_PATTERNS = ("*.dvc", f"*{FILE}")
"""Of files that name files of the cache, for git."""


def folder() -> Path | None:
    """The cache; None if it is outside of the repository, where other repositories may use it.

    Raises:
        UserError: DVC's configuration is invalid, or its locks are of another kind.
    """
    configuration = dvc_config.read()
    if configuration["core"].get("hardlink_lock"):
        raise UserError("core.hardlink_lock in DVC's configuration: such locks are not supported; use `dvc gc` instead")
    found = dvc_config.cache(configuration).resolve()
    return found if found.is_relative_to(Path().resolve()) else None


def unused(cache: Path, workspaces: Iterable[Path], more: Iterable[bytes]) -> list[Path]:
    """The files of the cache that nothing uses, in an order in which they can be deleted.

    A file is used if its digest is in a lock file or .dvc file of the working tree, of git's index, of any commit that
    git still has, or of a workspace. What an interrupted command of DVC left is not used.

    Args:
        cache: its folder.
        workspaces: those that stay.
        more: contents of other lock files.
    Raises:
        UserError: git or a file cannot be read, so that it is not known what is used.
    """
    named = set[bytes]()
    for content in (*_committed(), *_present(workspaces), *more):
        named.update(_DIGEST.findall(content))
    objects = {_digest(cache, path): path for path in _files(cache / "files" / "md5")}
    for digest in [each for each in named if each.endswith(b".dir")]:
        if (path := objects.get(digest.decode())) is not None:
            named.update(_DIGEST.findall(_read(path)))
    going = [path for digest, path in objects.items() if digest.encode() not in named]
    return sorted(going, key=lambda path: (path.suffix != ".dir", path))  # no list of files that are gone is left


def count(cache: Path) -> int:
    """The number of files in the cache."""
    return sum(1 for _ in _files(cache / "files" / "md5"))


@contextmanager
def at_rest(folders: Iterable[Path]) -> Iterator[None]:
    """Hold DVC's lock in the working tree and in `folders` for the block.

    A command of DVC holds it from before it stores files in the cache until their digests are in a lock file, but not
    while a stage runs.
    """
    with ExitStack() as held:
        for root in (Path(), *folders):
            lock = FileLock(root / ".dvc" / "tmp" / "lock")  # the same flock as DVC's, which also writes into the file
            with suppress(OSError):  # on a full disk, where DVC cannot create its lock, either
                (root / ".dvc" / "tmp").mkdir(exist_ok=True)
                try:
                    held.enter_context(lock.acquire(timeout=0))
                except Timeout:
                    say(f"gc: waiting for DVC in {root}")
                    held.enter_context(lock.acquire())
        yield


def runs_stage() -> bool:
    """Whether a command of DVC runs a stage in the working tree; it then holds another lock, on the stage's outputs."""
    try:
        holders = json.loads(Path(".dvc/tmp/rwlock").read_bytes())["write"].values()
        return any(psutil.pid_exists(holder["pid"]) for holder in holders)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _files(directory: Path) -> Iterator[Path]:
    for parent, _, names in os.walk(directory):
        yield from (Path(parent, name) for name in names)


def _digest(cache: Path, path: Path) -> str:
    return "".join(path.relative_to(cache / "files" / "md5").parts)


def _read(path: Path) -> bytes:
    """The list of the files of a directory in the cache; raises Damaged if it is not what was stored."""
    content = path.read_bytes()
    if hashlib.md5(content, usedforsecurity=False).hexdigest() != path.parent.name + path.stem:
        raise Damaged(path, "it does not match its name; `make scrub` deletes it")
    return content


def _present(workspaces: Iterable[Path]) -> Iterator[bytes]:
    """The lock files and .dvc files of the working tree, also those that git ignores, and of workspaces."""
    listed = workspace.git("ls-files", "-z", "--cached", "--others", "--exclude-standard", "--", *_PATTERNS)
    inputs = [str(file) for folder in (Paths().raw, Paths().imported) for file in folder.glob("*.dvc")]
    for name in {*listed.split("\0"), *inputs, FILE, str(Path("distill", FILE))} - {""}:
        if (file := Path(name)).is_file():
            yield file.read_bytes()
    for root in workspaces:
        for path in _files(root):
            if path.name == FILE or (path.suffix == ".dvc" and path.is_file()):
                yield path.read_bytes()


def _committed() -> Iterator[bytes]:
    """The lock files and .dvc files of all commits, also those only in the reflog or the stash, and of the index."""
    log = ("log", "--all", "--reflog", "--full-history", "--root", "-m", "--raw", "--no-abbrev", "--no-renames")
    changes = workspace.git(*log, "--format=", "--", *_PATTERNS).splitlines()
    staged = workspace.git("ls-files", "--stage", "--", *_PATTERNS).splitlines()
    blobs = {line.split()[3] for line in changes} | {line.split()[1] for line in staged}
    wanted = "".join(f"{blob}\n" for blob in sorted(blobs) if blob.strip("0"))
    done = subprocess.run(["git", "cat-file", "--batch"], input=wanted.encode(), capture_output=True)
    if done.returncode or re.search(rb"^[0-9a-f]+ missing$", done.stdout, re.MULTILINE):
        raise UserError("git cat-file: the repository lacks objects; `git fsck` names them")
    yield done.stdout
