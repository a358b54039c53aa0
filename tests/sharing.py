"""Files that several workers need: the first one makes them, while the others wait."""

import os
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
from filelock import FileLock

_folder: Path | None = None
"""Where they are, for all workers of this run."""


def use(factory: pytest.TempPathFactory) -> None:
    """Keep them in the folder of this run."""
    global _folder
    base = factory.getbasetemp()
    _folder = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base


def once(name: str, make: Callable[[Path], object]) -> Path:
    """A file or folder that `make` creates."""
    assert _folder is not None
    made = _folder / name
    with FileLock(f"{made}.lock"):
        if not made.exists():
            with TemporaryDirectory(dir=_folder) as unfinished:
                make(Path(unfinished) / name)
                (Path(unfinished) / name).rename(made)
    return made


def content(name: str, make: Callable[[], bytes]) -> bytes:
    """The content of a file, which `make` returns; not shared if tests/conftest.py is not in use."""
    return make() if _folder is None else once(name, lambda path: path.write_bytes(make())).read_bytes()
