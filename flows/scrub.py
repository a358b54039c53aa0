"""`make scrub`: delete damaged files from DVC's cache, which DVC itself trusts without hashing them."""

import hashlib
import subprocess
from collections.abc import Iterator
from pathlib import Path


def damaged(cache: Path) -> Iterator[Path]:
    """The files of a DVC cache whose content does not have the MD5 that is their name."""
    for path in sorted((cache / "files" / "md5").glob("??/*")):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
        if content != path.parent.name + path.name.removesuffix(".dir"):
            yield path


def main() -> None:
    found = subprocess.run(["dvc", "cache", "dir"], stdout=subprocess.PIPE, text=True, check=True)
    paths = list(damaged(Path(found.stdout.strip())))
    for path in paths:
        path.unlink()
        print(f"deleted {path}")
    print(f"{len(paths)} damaged files" + ("; `dvc repro` or `dvc pull` brings them back" if paths else ""))


if __name__ == "__main__":
    main()
