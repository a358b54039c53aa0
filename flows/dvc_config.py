"""DVC's configuration of a workspace."""

from pathlib import Path
from typing import Any

from diffusion.errors import UserError
from flows.paths import Paths


def configure(workspace: Path) -> None:
    """Configure a workspace to use the repository's cache and remotes, resolving relative paths and local settings.

    Raises:
        UserError: DVC rejects the configuration of the repository.
    """
    from configobj import ConfigObj  # a dependency of DVC; imported here, since it takes a second
    from dvc.config import Config, ConfigError, merge

    try:
        ours = Config(str(Path(".dvc")))
    except ConfigError as error:
        raise UserError(f"DVC's configuration: {' '.join(str(error).split())}") from None
    own = {
        "core": {"no_scm": True, "site_cache_dir": str(Paths().state.absolute() / "dvc")},
        "cache": {
            "dir": ours["cache"].get("dir") or str(Path(".dvc/cache").absolute()),
            "type": "reflink,hardlink,symlink,copy",
        },
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
