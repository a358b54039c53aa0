"""Bringing images under data/raw and DVC."""

import re
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path

from filelock import FileLock

from diffusion.errors import UserError
from diffusion.progress import Progress
from diffusion.sources import shards
from diffusion.sources.folders import files_below
from diffusion.sources.shards import Source
from diffusion.sources.sources import open_source
from diffusion.storage.files import writing
from diffusion.storage.tar import Split
from flows.dvc_output import reason
from flows.paths import Paths

MAX_LISTED = 5
"""Files named on the terminal."""


def import_data(path: Path, name: str, paths: Paths, link: bool, split_names_as_classes: bool = False) -> None:
    """Copy (or link) a source to data/raw/NAME (an .npz file to data/raw/NAME.npz) and put it under DVC.

    `split_names_as_classes` confirms folders that are named like a split. Raises UserError if the source is in no known
    form, NAME is taken or unfit, or DVC fails; then nothing is left.
    """
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UserError(f"--name {name!r}: must be letters, digits, - and _ only, since it names a folder of data/raw")
    source = open_source(path, split_names_as_classes)
    with writing(paths.state):
        paths.state.mkdir(exist_ok=True)
    # One import at a time: what is undone after an error must not be another one's.
    with FileLock(paths.state / "import.lock"):
        place, ignored = _copy_into_dvc(path, name, paths, link)
    confirmed = "  split_names_as_classes: true\n" if split_names_as_classes else ""
    print(_description(source))
    print(f"\nTo use it, set in params.yaml:\n\nshard:\n  source: {place}\n{confirmed}\nand keep its record in git:\n")
    print(f"git add {place}.dvc {ignored}")


def _copy_into_dvc(path: Path, name: str, paths: Paths, link: bool) -> tuple[str, str]:
    """Bring a source under data/raw and DVC; gives its path, and that of the .gitignore beside it, from the root."""
    target = paths.raw / (f"{name}.npz" if path.is_file() else name)
    tracked = target.with_name(f"{target.name}.dvc")
    for taken in (target, tracked):
        if taken.exists() or taken.is_symlink():
            raise UserError(f"{taken}: exists already; choose another --name, or remove it first")
    paths.raw.mkdir(parents=True, exist_ok=True)
    ignored = paths.raw / ".gitignore"
    before = ignored.read_bytes() if ignored.exists() else None
    try:
        _copy_or_link(path, target, link)
        _dvc_add(target, paths.root, link)
    except BaseException:
        _remove(target)
        tracked.unlink(missing_ok=True)
        if before is not None:
            ignored.write_bytes(before)
        else:
            ignored.unlink(missing_ok=True)
        raise
    return target.relative_to(paths.root).as_posix(), ignored.relative_to(paths.root).as_posix()


def _description(source: Source) -> str:
    """Files, classes and splits, before any image is decoded, and the files that are none."""
    splits, labels, left_out = Counter[Split | None](), Counter[int | None](), list[str]()
    for sample in source:
        if sample.left_out:
            left_out.append(f"{sample.file}: {sample.left_out}")
            continue
        splits[sample.split] += 1
        labels[sample.label] += 1
    images = splits.total()
    per_class = [labels[number] for number in range(len(source.classes))]
    counts = ", ".join(f"{count} {split}" for split, count in splits.items() if split)
    files = f"Imported {images} images{f' ({counts})' if counts else ''}; the stage shard decodes them."
    classes = shards.describe_classes(source.classes, per_class, images)
    lines = [files, f"Classes: {classes}", f"Splits: {shards.describe_splits(source.own_splits)}"]
    lines += [f"Left out: {line}" for line in left_out[:MAX_LISTED]]
    if len(left_out) > MAX_LISTED:
        lines.append(f"Left out: {len(left_out) - MAX_LISTED} more")
    return "\n".join(lines)


def _copy_or_link(path: Path, target: Path, link: bool) -> None:
    """Copy or link the files of `path` to `target`, which appears whole or not at all."""
    files = list(files_below(path)) if path.is_dir() else [path]
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as temporary:
        content = Path(temporary) / target.name
        with Progress("import", len(files), "files") as progress:
            for file in files:
                copy = content / file.relative_to(path) if path.is_dir() else content
                try:
                    with writing(copy):
                        copy.parent.mkdir(parents=True, exist_ok=True)
                        if link:
                            copy.symlink_to(file.resolve(strict=True))
                        else:
                            shutil.copyfile(file, copy)
                except OSError as error:
                    raise UserError(f"{file}: cannot be imported ({error.strerror or error})") from None
                progress.advance(1)
        content.replace(target)


def _dvc_add(target: Path, root: Path, link: bool) -> None:
    command = [sys.executable, "-m", "dvc", "add", target.relative_to(root).as_posix()]
    if link:
        command.append("--no-relink")  # else DVC puts copies from its cache in the links' place
    done = subprocess.run(command, cwd=root, capture_output=True, text=True)
    if done.returncode:
        raise UserError(f"dvc add {target}: {reason(done.stderr) or f'exit status {done.returncode}'}")


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
