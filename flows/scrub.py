"""`make scrub`: delete damaged files from the DVC cache, which DVC trusts without hashing them."""

import hashlib
import re
import sys
from pathlib import Path

from diffusion.errors import SystemFault, UserError, counted
from diffusion.progress import Progress, say
from flows import workspace

_NAME = re.compile(r"[0-9a-f]{30}(\.dir)?")


def scrub(cache: Path) -> tuple[int, int]:
    """Delete the files of a DVC cache whose MD5 does not match their name.

    Files with other names, such as unfinished ones of a running `dvc`, are ignored.

    Returns:
        The number of files checked and the number deleted.

    Raises:
        OSError: a file cannot be read or deleted.
    """
    files = [path for path in sorted((cache / "files" / "md5").glob("??/*")) if _NAME.fullmatch(path.name)]
    deleted = 0
    with Progress("scrub", len(files), "files") as progress:
        for path in files:
            if not _intact(path):
                path.unlink()
                deleted += 1
                say(f"deleted {path}")
            progress.advance(1)
    return len(files), deleted


def _intact(path: Path) -> bool:
    with path.open("rb") as file:
        content = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
    return content == path.parent.name + path.name.removesuffix(".dir")


def main() -> int:
    try:
        checked, deleted = scrub(Path(workspace.dvc(Path(), "cache", "dir")))
    except (UserError, OSError) as error:
        print(f"scrub: error: {SystemFault.of(error) if isinstance(error, OSError) else error}", file=sys.stderr)
        return 1
    restored = "; `dvc repro` or `dvc pull` restores them" if deleted else ""
    print(f"{counted(checked, 'file')} checked, {deleted} deleted{restored}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
