"""Stage pairs: turn the shards into shuffled blocks of training and held-out pairs."""

from diffusion.errors import UserError
from diffusion.pairs import pairs
from diffusion.pairs.noise import BLOCK
from diffusion.process import build
from diffusion.progress import Progress, say
from diffusion.sources import shards
from diffusion.sources.bands import MODES
from diffusion.storage.files import new_directory
from flows import made_with
from flows.params import Params
from flows.paths import Paths
from flows.workers import executor


def run(params: Params, paths: Paths) -> None:
    """Write data/pairs; raises UserError if data/shards is missing or damaged."""
    source = shards.Manifest.read(paths.shards / shards.MANIFEST)
    _check_channels(source, params.pairs.channels)
    images = {split: shards.Images(paths.shards, contents) for split, contents in source.splits.items()}
    settings = pairs.Settings(
        **params.pairs.model_dump(),
        seed=params.seed,
        schedule=params.process.schedule.kind,
        num_timesteps=params.process.num_timesteps,
        classes=source.classes,
        shards_sha256=shards.manifest_sha256(paths.shards),
    )
    alpha_bar = build.process(params.process).schedule.alpha_bar.numpy()
    total = sum(map(len, images.values()))
    with new_directory(paths.pairs) as directory, Progress("pairs", total, "images") as progress:
        manifest = pairs.write(directory, images, settings, alpha_bar, progress.advance, executor(total))
    made_with.write(paths, "pairs", params)
    counts = ", ".join(f"{contents.images} {split}" for split, contents in manifest.splits.items())
    size = "x".join(map(str, (settings.channels, settings.height, settings.width)))
    if done := settings.fit.describe(manifest.cropped, manifest.cropped_area, manifest.enlarged):
        say(f"pairs: {done}")
    say(f"pairs: {counts} images of {size} in blocks of {BLOCK}")


def _check_channels(source: shards.Manifest, channels: int) -> None:
    """Raise UserError if the images cannot have this number of channels."""
    for mode in source.statistics:
        possible = tuple(MODES) if mode in MODES.values() else (int(mode.split()[0]),)
        if channels not in possible:
            raise UserError(
                f"pairs.channels: must be {' or '.join(map(str, possible))} for the images of {source.source} "
                f"(got {channels})"
            )
