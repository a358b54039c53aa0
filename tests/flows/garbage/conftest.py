"""A repository with workspaces and a cache that are made up."""

import hashlib
import json
import os
import subprocess
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from subprocess import CompletedProcess

import pytest

from flows.workspace import Run
from tests.command import ddpm
from tests.flows.conftest import git

CACHE = Path(".dvc/cache/files/md5")
RUNS = Path(".ddpm/runs")
MB = 2**20


def write(path: Path, size: int = MB, content: bytes = b"x") -> Path:
    """A file of so many bytes, all on the disk."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.write((content * size)[:size])
        file.flush()
        os.fsync(file.fileno())
    return path


def stored(content: bytes) -> str:
    """Store a file in DVC's cache; returns its digest."""
    digest = hashlib.md5(content).hexdigest()
    path = CACHE / digest[:2] / digest[2:]
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    path.chmod(0o444)
    return digest


def stored_folder(*digests: str) -> str:
    """Store a folder with these files."""
    entries = [{"md5": digest, "relpath": f"{number}"} for number, digest in enumerate(digests)]
    content = json.dumps(entries).encode()
    digest = hashlib.md5(content).hexdigest()
    path = CACHE / digest[:2] / f"{digest[2:]}.dir"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return f"{digest}.dir"


def in_cache(content: bytes) -> bool:
    digest = hashlib.md5(content).hexdigest()
    return (CACHE / digest[:2] / digest[2:]).exists()


def lock(*digests: str) -> str:
    """The text of a dvc.lock with these outputs."""
    outs = "".join(f"    - path: out{n}\n      hash: md5\n      md5: {digest}\n" for n, digest in enumerate(digests))
    return f"schema: '2.0'\nstages:\n  train:\n    cmd: train\n    outs:\n{outs}"


def run(name: str, days: float = 0, teacher: str = "", digests: Sequence[str] = ()) -> Path:
    """The workspace of a run that ended some days ago."""
    directory = RUNS / name
    directory.mkdir(parents=True)
    ended = (datetime.now(UTC) - timedelta(days=days)).isoformat()
    Run(name, f"id-{name}", ended, "", False, "completed", ended, teacher).write(directory)
    (directory / "dvc.lock").write_text(lock(*digests))
    return directory


@pytest.fixture(autouse=True)
def _tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A repository with a commit, which becomes the working directory."""
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.chdir(tmp_path)
    git("init", "--quiet", "--initial-branch=main")
    (tmp_path / ".dvc").mkdir()
    (tmp_path / ".dvc/config").write_text("[core]\n    analytics = false\n")
    (tmp_path / ".gitignore").write_text(".ddpm\n/.dvc/cache\n/data/.*\n")
    git("add", "--all")
    git("commit", "--quiet", "--message", "first")


def disk_usage(*paths: Path) -> int:
    """Bytes on the disk, as du counts them."""
    done = subprocess.run(["du", "-sc", "--block-size=1", *paths], capture_output=True, text=True, check=True)
    return int(done.stdout.splitlines()[-1].split()[0])


def gc(*arguments: str) -> CompletedProcess[str]:
    return ddpm(Path(), "gc", *arguments, environment={})


def found(*arguments: str) -> dict[str, dict[str, dict[str, int]]]:
    done = gc(*arguments, "--json")
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def left() -> list[str]:
    return sorted(path.name for path in RUNS.glob("[!.]*"))


def contents() -> set[Path]:
    """All files but locks."""
    return {path for path in Path().rglob("*") if ".git" not in path.parts and path.suffix != ".lock"}


def aged(path: Path, days: float) -> Path:
    """A file or folder that was last changed some days ago."""
    then = time.time() - days * 24 * 3600
    for each in (*path.rglob("*"), path):
        os.utime(each, (then, then))
    return path
