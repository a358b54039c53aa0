"""Stage shard: raw images into webdataset shards."""

from diffusion import made_with
from diffusion.data import shards
from diffusion.data.sources import open_source
from diffusion.files import new_directory
from diffusion.params import Params
from diffusion.paths import Paths
from diffusion.progress import Progress, say


def run(params: Params, paths: Paths) -> None:
    """Write data/shards; raises UserError if the source is in no known form, or too small."""
    source = open_source(paths.root / params.shard.source)
    with new_directory(paths.shards) as directory, Progress("shard", len(source), "images") as progress:
        manifest = shards.write(
            source,
            params.shard.source,
            directory,
            val_fraction=params.shard.val_fraction,
            test_fraction=params.shard.test_fraction,
            samples_per_shard=params.shard.samples_per_shard,
            advance=progress.advance,
        )
    made_with.write(paths, "shard", params)
    counts = ", ".join(f"{contents.samples} {split}" for split, contents in manifest.splits.items())
    files = sum(len(contents.shards) for contents in manifest.splits.values())
    say(f"shard: {counts} images in {files} shards, {len(manifest.rejected)} rejected")
