"""Stage shard: convert raw images to webdataset shards."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion.errors import UserError, counted
from diffusion.progress import Progress, say
from diffusion.sources import rejections, report, shards
from diffusion.sources.descriptions import SHOWN_CLASSES, describe_classes, describe_splits
from diffusion.sources.locations import locate, resolved
from diffusion.sources.rejections import Rejections, Remark, TooFewImages
from diffusion.sources.sources import open_source
from diffusion.sources.splits import Fractions
from diffusion.sources.trees import linked_folders
from diffusion.storage.files import new_directory, write_atomic
from flows import made_with
from flows.params import Params
from flows.paths import Paths
from flows.workers import executor

MAX_LISTED = 5
"""Maximum number of files to list on the terminal; the manifest lists all."""


def run(params: Params, paths: Paths) -> None:
    """Write data/shards and the data report.

    Raises UserError if the source is missing, has an unknown format, is too small, or has linked folders, or too many
    of its images cannot be used; these are then in reports/rejected.csv.
    """
    with locate(resolved(params.shard.source, paths.root)).at_hand("shard", paths.state) as path:
        _write(path, params, paths)


def _write(path: Path, params: Params, paths: Paths) -> None:
    options = params.shard
    if linked := linked_folders(path):
        raise UserError(
            f"{linked[0]}: a link to a folder, whose changes DVC would not notice; use `ddpm import`, which copies "
            "the linked files"
        )
    source = open_source(path, options.reading)
    rejected, thumbnails = Rejections(), list[bytes | None]()

    def on_rejected(remark: Remark, thumbnail: bytes | None) -> None:
        rejected.add(remark)
        if len(thumbnails) < report.MAX_LISTED:
            thumbnails.append(thumbnail)

    try:
        with new_directory(paths.shards) as directory, Progress("shard", len(source), "images") as progress:
            manifest = shards.write(
                source,
                options.source,
                directory,
                Fractions(options.val_fraction, options.test_fraction),
                options.samples_per_shard,
                progress.advance,
                executor(len(source)),
                max_rejected=options.max_rejected,
                on_rejected=on_rejected,
            )
    except TooFewImages as error:
        if not rejected:
            raise
        write_atomic(paths.rejected, rejections.table(rejected.listed))
        which = f"the first {len(rejected.listed)}" if rejected.more else "all"
        raise UserError(f"{error}; {paths.rejected} lists {which} rejected files") from None
    paths.rejected.unlink(missing_ok=True)
    write_atomic(paths.data_report, report.page(manifest, paths.shards, thumbnails).encode())
    made_with.write(paths, "shard", params)
    _say_files("rejected", manifest.rejected, len(rejected))
    _say_files("decoder warning", manifest.warnings, len(manifest.warnings))
    if manifest.multipage:
        say(f"shard: files with several pages or frames, of which only the first is used: {manifest.multipage}")
    if manifest.copies:
        say(f"shard: exact copies of other images: {manifest.copies}; all copies of an image are in the same split")
    if similar := [each for each in manifest.near_duplicates or () if each.images]:
        counts = ", ".join(f"{each.images} of {each.second} resemble one of {each.first}" for each in similar)
        say(f"shard: near-duplicates in different splits: {counts}; see {paths.data_report}")
    per_class = np.sum([contents.per_class for contents in manifest.splits.values()], axis=0)
    used = sum(contents.samples for contents in manifest.splits.values())
    say(f"shard: {describe_classes(manifest.classes, per_class.tolist(), used)}")
    trained_on = dict(zip(manifest.classes, manifest.splits["train"].per_class, strict=True))
    if unseen := [name for name, images in trained_on.items() if not images]:
        say(
            f"shard: classes without an image to train on: {', '.join(unseen[:SHOWN_CLASSES])}; add images, or "
            "decrease shard.val_fraction or shard.test_fraction"
        )
    say(f"shard: splits: {describe_splits(manifest.own_splits)}")
    counts = ", ".join(f"{contents.samples} {split}" for split, contents in manifest.splits.items())
    files = sum(len(contents.shards) for contents in manifest.splits.values())
    say(f"shard: {counts} images in {files} shards; {counted(len(rejected), 'file')} rejected")


def _say_files(what: str, remarks: Sequence[Remark], count: int) -> None:
    for remark in remarks[:MAX_LISTED]:
        say(f"shard: {what}: {remark.file}: {remark.reason}")
    if count > MAX_LISTED:
        say(f"shard: {what}: {count - MAX_LISTED} more, listed in data/shards/{shards.MANIFEST}")
