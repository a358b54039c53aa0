"""Stage shard: convert raw images to webdataset shards."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from diffusion.errors import UserError
from diffusion.progress import Progress, say
from diffusion.sources import shards
from diffusion.sources.locations import locate, resolved
from diffusion.sources.reading import Reading
from diffusion.sources.sources import open_source
from diffusion.sources.splits import Fractions
from diffusion.sources.trees import linked_folders
from diffusion.storage.files import new_directory
from flows import made_with
from flows.params import Params
from flows.paths import Paths

MAX_LISTED = 5
"""Maximum number of files to list on the terminal; the manifest lists all."""


def run(params: Params, paths: Paths) -> None:
    """Write data/shards; raises UserError if the source is missing, unknown or too small, or has linked folders."""
    with locate(resolved(params.shard.source, paths.root)).at_hand("shard", paths.state) as path:
        _write(path, params, paths)


def _write(path: Path, params: Params, paths: Paths) -> None:
    if linked := linked_folders(path):
        raise UserError(
            f"{linked[0]}: a link to a folder, whose changes DVC would not notice; use `ddpm import`, which copies "
            "the linked files"
        )
    shard = params.shard
    source = open_source(path, Reading(shard.split_names_as_classes, shard.layout, shard.value_range))
    with new_directory(paths.shards) as directory, Progress("shard", len(source), "images") as progress:
        manifest = shards.write(
            source,
            params.shard.source,
            directory,
            Fractions(params.shard.val_fraction, params.shard.test_fraction),
            params.shard.samples_per_shard,
            progress.advance,
        )
    made_with.write(paths, "shard", params)
    _say_files("skipped", manifest.rejected)
    _say_files("decoder warning", manifest.warnings)
    if manifest.multipage:
        say(f"shard: files with several pages or frames, of which only the first is used: {manifest.multipage}")
    if manifest.copies:
        say(f"shard: exact copies of other images: {manifest.copies}; all copies of an image are in the same split")
    per_class = np.sum([contents.per_class for contents in manifest.splits.values()], axis=0)
    samples = sum(contents.samples for contents in manifest.splits.values())
    say(f"shard: {shards.describe_classes(manifest.classes, per_class.tolist(), samples)}")
    say(f"shard: splits: {shards.describe_splits(manifest.own_splits)}")
    counts = ", ".join(f"{contents.samples} {split}" for split, contents in manifest.splits.items())
    files = sum(len(contents.shards) for contents in manifest.splits.values())
    say(f"shard: {counts} images in {files} shards, {len(manifest.rejected)} files skipped")


def _say_files(what: str, remarks: Sequence[shards.Remark]) -> None:
    for remark in remarks[:MAX_LISTED]:
        say(f"shard: {what}: {remark.file}: {remark.reason}")
    if len(remarks) > MAX_LISTED:
        say(f"shard: {what}: {len(remarks) - MAX_LISTED} more, listed in data/shards/{shards.MANIFEST}")
