"""DVC's configuration in the working tree, and in the workspaces of runs, which use the same cache and remotes."""

from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from flows.paths import Paths


def read() -> Any:
    """DVC's configuration in the working tree, a `dvc.config.Config`; raises UserError if DVC rejects it."""
    from dvc.config import Config, ConfigError  # imported here, since it takes a second

    try:
        return Config(str(Path(".dvc")))
    except ConfigError as error:
        raise UserError(f"DVC's configuration: {' '.join(str(error).split())}") from None


def cache(configuration: Any) -> Path:
    """The folder of DVC's cache, absolute."""
    return Path(configuration["cache"].get("dir") or Path(".dvc/cache").absolute())


def write(workspace: Path) -> None:
    """Configure a workspace to use the repository's cache and remotes, resolving relative paths and local settings.

    Raises:
        UserError: DVC rejects the configuration of the repository.
    """
    from configobj import ConfigObj  # a dependency of DVC
    from dvc.config import merge

    ours = read()
    own = {
        "core": {"no_scm": True, "site_cache_dir": str(Paths().state.absolute() / "dvc")},
        "cache": {"dir": str(cache(ours)), "type": "reflink,hardlink,symlink,copy"},
    }
    settings: dict[str, Any] = {}
    for each in (ours.load_one("repo"), ours.load_one("local"), own):  # with absolute paths
        merge(settings, each)
    named = {
        f'{kind} "{name}"': value for kind in ("remote", "machine", "db") for name, value in settings.pop(kind).items()
    }
    file = workspace / ".dvc" / "config.local"
    file.touch()
    file.chmod(0o600)  # may contain a remote's password
    with file.open("wb") as opened:
        ConfigObj(settings | named, encoding="utf-8").write(opened)  # DVC's `Config.edit` writes only ASCII
