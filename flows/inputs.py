"""The inputs of a run that DVC tracks, checked out into its workspace: the raw data, and the model to start from."""

from pathlib import Path

from diffusion.errors import UserError
from diffusion.sources.locations import is_url
from flows import start
from flows.params import Params, load
from flows.paths import Paths
from flows.workspace import dvc


def check_out(workspace: Path) -> str:
    """Check out what a training needs; returns what it starts from, empty for random weights.

    Raises:
        UserError: something is missing, or the training cannot start from the model.
    """
    paths = Paths(workspace)
    params = load(paths.params)
    _check_out_raw_data(paths, params)
    name = params.train.start_from
    tracked = paths.imported / f"{name}.dvc"
    if name and tracked.exists() and not (paths.imported / name).exists():
        _check_out(paths, tracked)
    origin = start.check(paths, params)
    return str(origin) if origin else ""


def _check_out_raw_data(paths: Paths, params: Params) -> None:
    """Check out the raw data, unless they are in git or at a URL."""
    source = params.shard.source
    if is_url(source) or (paths.root / source).exists():
        return
    for tracked in sorted(paths.raw.glob("*.dvc")):
        if (paths.root / source).is_relative_to(tracked.with_suffix("")):
            _check_out(paths, tracked)
            return
    if Path(source).exists():
        raise UserError(
            f"shard.source: {source} is tracked by neither git nor DVC, so runs cannot use it; "
            "`ddpm import` adds it to DVC"
        )
    raise UserError(f"shard.source: {source}: no such file or folder; correct it in params.yaml, or use `ddpm import`")


def _check_out(paths: Paths, tracked: Path) -> None:
    """Check out what a .dvc file describes, from the cache or else a remote."""
    file = str(tracked.relative_to(paths.root))
    try:
        dvc(paths.root, "checkout", file)
    except UserError:
        try:
            dvc(paths.root, "pull", file)
        except UserError as error:
            raise UserError(
                f"{file}: its data are not in the DVC cache, and no remote has them ({error}); `dvc commit {file}` "
                "adds them from the working tree"
            ) from None
