"""Import images into data/raw and track them with DVC."""

import copy
import re
import shutil
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from diffusion.errors import UsageError, UserError, counted, describe, without_secrets
from diffusion.nn.unet import UNetOptions
from diffusion.progress import Progress, printable
from diffusion.sources import shards
from diffusion.sources.arrays import Arrays
from diffusion.sources.descriptions import describe_classes, describe_splits
from diffusion.sources.locations import Location, locate
from diffusion.sources.reading import DEFAULTS, Reading
from diffusion.sources.rejections import Rejections, Remark, TooFewImages
from diffusion.sources.shards import Source
from diffusion.sources.sources import open_source
from diffusion.sources.trees import ending, files_below
from diffusion.storage.files import write_atomic, writing
from diffusion.storage.tar import Split
from flows import dvc_add, inspecting
from flows.cards import licenses
from flows.cards.licenses import License
from flows.changes import lay_over, write_changes
from flows.made_with import leaves
from flows.params import Pairs, Shard, read, validate
from flows.paths import Paths

MAX_LISTED = 5
"""Maximum number of rejected files to list on the terminal."""
MAX_SIZE = 4096
"""Maximum of `--size`."""
VERSIONS = {"ETag", "Content-MD5", "Digest", "Last-Modified"}
"""Headers by which DVC notices that what is at a web address has changed."""
Transfer = Callable[[Path, Path], Any]
"""Puts a file at a new path: a copy, a link, or the file itself."""


def import_data(
    images: str | Path,
    name: str,
    paths: Paths,
    link: bool,
    reading: Reading = DEFAULTS,
    size: int | None = None,
    pairs: Mapping[str, Any] | None = None,
    license: License | None = None,
) -> None:
    """Copy or link images to data/raw/NAME (a file to data/raw/NAME.npz, .zip and so on) and add them to DVC.

    Args:
        images: their path or URL, in any supported format, or a brace range or glob.
        name: name below data/raw.
        paths: paths of the working tree.
        link: whether to create symbolic links instead of copies; what is at a URL stays there.
        reading: how to read what the files leave open.
        size: side of the images to train on; by default found by looking at some of them.
        pairs: other parameters of the section `pairs`.
        license: under which they may be used, for the model cards.
    Raises:
        UserError: the format is not supported, the name is invalid or exists, or DVC fails; nothing is left behind.
    """
    if size is not None and not 1 <= size <= MAX_SIZE:
        raise UsageError(f"--size: must be from 1 to {MAX_SIZE} (got {size})")
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9_-]*", name):
        raise UsageError(
            f"--name: must start with a letter or digit and contain only letters, digits, - and _ (got {name!r})"
        )
    try:
        Shard(value_range=reading.value_range)
    except ValidationError as error:
        raise UsageError(describe(error, name=lambda _: "--value-range")) from None
    dvc_add.check_repository(paths)
    where = locate(images)
    target = paths.raw / f"{name}{ending(Path(where.name))}"
    if in_place := link and where.remote:
        _check_watched(where, paths.root)
    else:
        dvc_add.check_free(target, "delete it first")
    place = where.source if in_place else target.relative_to(paths.root).as_posix()
    licenses.read(paths.licenses)  # if it is not valid, nothing is imported
    before = read(paths.params) if paths.params.exists() else None
    present = None if before is None else validate(before, str(paths.params))
    limits = Shard() if present is None else present.shard
    background = (pairs or {}).get("background") or (Pairs() if present is None else present.pairs).background
    reading = reading._replace(max_pixels=limits.max_pixels)
    with where.at_hand("import", paths.state) as path:
        _check_names(path)
        source = open_source(path, reading)
        description = _description(source, without_secrets(str(images)), limits.max_rejected)
        findings = inspecting.look_at(source, background)
        shard = {"source": place, **reading._asdict(), "value_range": list(reading.value_range)}
        changes = {"shard": shard} | findings.parameters(size)
        changes["pairs"] |= pairs or {}
        if present is not None and present.evaluate.shown_channels:  # of the former images
            changes["evaluate"] = {"shown_channels": []}
        if present is not None and isinstance(present.network, UNetOptions) and present.network.fourier_features:
            changes.setdefault("network", {})["fourier_features"] = []
        document = None if before is None else lay_over(copy.deepcopy(before), changes)
        if document is None:
            fit = Pairs(**changes["pairs"]).fit
        else:
            fit = validate(document, f"{paths.params} with what was found").pairs.fit
        if reading.value_range and not findings.deep:
            raise UsageError("--value-range: for arrays, and greyscale pictures with more than 8 bits; these have 8")
        values = source.describe_values() if isinstance(source, Arrays) else ""
        content = inspecting.contact_sheet(source, fit)
        if not in_place:
            transfer = _link if link else shutil.move if where.remote else shutil.copyfile
            origin = without_secrets(where.source) if where.remote else ""
            dvc_add.add(
                target,
                paths,
                lambda copy: _transfer(path, copy, transfer),
                keep_links=link,
                description=f"imported from {origin}" if origin else "",
            )
    sheet = paths.state / "imports" / f"{name}.png"
    write_atomic(sheet, content)
    print(description)
    print(f"Pixels: {findings.describe(fit)}")
    if values:
        print(f"Values: {values}")
    shown = f"{sheet.relative_to(paths.root)} shows some images as the network will see them"
    print(f"Contact sheet: {shown}; `ddpm params pairs` lists what changes that\n")
    licenses.record(paths.licenses, place, license)
    if license is not None:
        print(f"License: {license.license}, in {paths.licenses.relative_to(paths.root)}; model cards state it\n")
    if document is not None:
        write_changes(paths.params, before, document)
    else:
        print(f"{paths.params}: not there; set {', '.join(name for name, _ in leaves(changes))} where you train")
    if in_place:
        print("\nTo train on them; they stay where they are, and DVC notices when they change:\n")
    else:
        print("\nTo train on them, and to keep their DVC file in git:\n")
        files = [dvc_add.ignore_file(target), *([paths.licenses] if license else [])]
        print(f"    git add {place}.dvc {' '.join(file.relative_to(paths.root).as_posix() for file in files)}")
    print("    prefect deployment run train-ddpm --watch      # or dvc repro")


def license_of(identifier: str | None, url: str | None) -> License | None:
    """The license that options name; raises UsageError if it is none, or if there is only a URL."""
    if identifier is None:
        if url is not None:
            raise UsageError("--source-url: needs --license")
        return None
    try:
        return License(license=identifier, url=url or "")
    except ValidationError as error:
        options = {"license": "--license", "url": "--source-url"}
        raise UsageError(describe(error, name=lambda place: options[str(place[0])])) from None


def _check_names(path: Path) -> None:
    """Raise UserError if a file has a name that DVC cannot track."""
    for file in files_below(path) if path.is_dir() else ():
        try:
            str(file).encode()
        except UnicodeEncodeError:
            raise UserError(
                f"{str(file)!a}: DVC cannot track a name that is not in UTF-8; rename the file, or import an archive"
            ) from None


def _check_watched(where: Location, root: Path) -> None:
    """Raise UserError if a URL cannot be a dependency of DVC."""
    from dvc.fs import parse_external_url  # imported here, since it takes a second
    from dvc.repo import Repo

    url = where.source
    if without_secrets(url) != url and "?" not in url:
        raise UserError(f"{url}: its password would be recorded with --link; omit --link")
    if "?" in url:
        raise UserError(f"{url.partition('?')[0]}: its query may be secret, and --link would record it; omit --link")
    if where.pattern:
        folder = "" if url.startswith("http") else ", or name their folder, which DVC can watch"
        raise UserError(f"{url}: several files, which DVC cannot watch; leave out --link to copy them{folder}")
    try:
        with Repo(str(root)) as repo:
            fs, path = parse_external_url(url, config=repo.config)
            facts = fs.info(path)
    except Exception as error:  # each storage backend has its own exceptions
        line = " ".join(str(error).split())
        raise UserError(f"{url}: DVC cannot watch it ({line}); leave out --link to copy it") from None
    if url.startswith("http") and not facts.keys() & VERSIONS:
        raise UserError(f"{url}: its server does not say when it changes; leave out --link to copy it")


def _description(source: Source, name: str, max_rejected: float) -> str:
    """Summarize files, classes, splits and rejected files; no image is decoded."""
    splits, labels, rejected = Counter[Split | None](), Counter[int | None](), Rejections()
    for sample in source:
        if sample.rejected:
            rejected.add(Remark(file=sample.file, reason=sample.rejected))
            continue
        splits[sample.split] += 1
        labels[sample.label] += 1
    images = splits.total()
    per_class = [labels[number] for number in range(len(source.classes))]
    counts = ", ".join(f"{count} {split}" for split, count in splits.items() if split)
    files = f"Imported {counted(images, 'image')}{f' ({counts})' if counts else ''}, for the shard stage to decode."
    classes = describe_classes(source.classes, per_class, images)
    lines = [files, f"Classes: {classes}", f"Splits: {describe_splits(source.own_splits)}"]
    lines += [f"Rejected: {remark.file}: {remark.reason}" for remark in rejected.listed[:MAX_LISTED]]
    if len(rejected) > MAX_LISTED:
        lines.append(f"Rejected: {counted(len(rejected) - MAX_LISTED, 'more file')}")
    try:
        rejected.check(name, images, max_rejected)
        shards.check_number(name, images)
    except TooFewImages as error:
        lines.append(f"The shard stage will stop: {error}")
    return "\n".join(map(printable, lines))


def _link(file: Path, target: Path) -> None:
    target.symlink_to(file.resolve(strict=True))


def _transfer(path: Path, target: Path, transfer: Transfer) -> None:
    """Copy, move or link the files of `path` to `target`."""
    files = list(files_below(path)) if path.is_dir() else [path]
    with Progress("import", len(files), "files") as progress:
        for file in files:
            copy = target / file.relative_to(path) if path.is_dir() else target
            try:
                with writing(copy):
                    copy.parent.mkdir(parents=True, exist_ok=True)
                    transfer(file, copy)
            except OSError as error:
                raise UserError(f"{file}: cannot be imported ({error.strerror or error})") from None
            progress.advance(1)
