"""Putting inputs of the pipeline into the working tree and tracking them with DVC: all of it, or nothing."""

import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock

from diffusion.errors import UserError, WriteFault
from diffusion.storage.files import write_atomic, writing
from flows.dvc_output import reason
from flows.paths import Paths
from flows.yaml_files import read_yaml, write_yaml


def check_repository(paths: Paths) -> None:
    """Raise UserError unless DVC can be used here."""
    if not (paths.root / ".dvc").is_dir():
        raise UserError(f"{paths.root / '.dvc'}: no such folder here; run this in the pipeline's folder")


def dvc_file(target: Path) -> Path:
    """The file in which DVC describes `target`, for git."""
    return target.with_name(f"{target.name}.dvc")


def ignore_file(target: Path) -> Path:
    """The file in which DVC lists `target`, so that git ignores it."""
    return target.with_name(".gitignore")


def check_free(target: Path, advice: str) -> None:
    """Raise UserError if something is there already."""
    for existing in (target, dvc_file(target)):
        if existing.exists() or existing.is_symlink():
            raise UserError(f"{existing}: already exists; choose another --name, or {advice}")


def add(
    target: Path,
    paths: Paths,
    make: Callable[[Path], None],
    *,
    replace: bool = False,
    advice: str = "delete it first",
    keep_links: bool = False,
    description: str = "",
) -> None:
    """Create `target` and add it to DVC.

    Args:
        target: a new file or folder.
        paths: paths of the working tree.
        make: creates it at the path that it is given, beside `target`.
        replace: whether to replace what is there.
        advice: what to do if something is there, for the message.
        keep_links: whether symbolic links remain, which DVC otherwise replaces with copies from its cache.
        description: to write into DVC's file, if any.
    Raises:
        UserError: `target` exists, or DVC fails; everything is then as before.
    """
    with writing(paths.state):
        paths.state.mkdir(exist_ok=True)
    with writing(target):
        target.parent.mkdir(parents=True, exist_ok=True)
    # One at a time, so that undoing a failed one cannot affect another.
    with (
        FileLock(paths.state / "import.lock"),
        tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary,
    ):
        if not replace:
            check_free(target, advice)
        made, former = Path(temporary) / target.name, Path(temporary) / "former"
        try:
            make(made)
        except WriteFault as fault:
            if fault.path.is_relative_to(made):  # name the file that it was to be
                raise WriteFault(target / fault.path.relative_to(made), fault.error) from None
            raise
        files = (dvc_file(target), ignore_file(target))
        before = {file: file.read_bytes() if file.exists() else None for file in files}
        try:
            with writing(target):
                if target.exists():
                    target.replace(former)
                made.replace(target)
            _dvc_add(target, paths.root, keep_links)
            if description:
                record = read_yaml(dvc_file(target))
                record["desc"] = description
                write_yaml(dvc_file(target), record)
        except BaseException:
            remove(target)
            if former.exists():
                former.replace(target)
            for file, content in before.items():
                if content is None:
                    file.unlink(missing_ok=True)
                elif file.read_bytes() != content:  # on a full disk, writing might leave less than there is
                    write_atomic(file, content)
            raise


def _dvc_add(target: Path, root: Path, keep_links: bool) -> None:
    command = [sys.executable, "-m", "dvc", "add", target.relative_to(root).as_posix()]
    command += ["--no-relink"] if keep_links else []
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"dvc add {target}: {reason(done.stderr) or f'exit status {done.returncode}'}")


def remove(path: Path) -> None:
    """Delete a file, link or folder, if it is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
