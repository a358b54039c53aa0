"""Images on an S3 server: `ddpm import`, DVC and the stage `shard`, with credentials from the environment."""

import os
import shutil
import sys
from collections.abc import Mapping
from contextlib import chdir
from functools import partial
from http.server import SimpleHTTPRequestHandler
from pathlib import Path
from typing import Any
from unittest.mock import patch

import fsspec
import numpy as np
import pyarrow as pa
import pytest
from dvc.repo import Repo
from PIL import Image
from pyarrow import parquet

from tests.command import ddpm
from tests.e2e.conftest import upload
from tests.e2e.test_dvc import call, git_clone, ran
from tests.sources.test_locations import serving
from tests.sources.test_webdatasets import samples, save
from tests.training import trees

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def tree(clone: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return git_clone(clone, tmp_path_factory.mktemp("remote") / "tree")


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same kinds of files as on the server: an archive of each kind, a Parquet file, shards."""
    folder = tmp_path_factory.mktemp("originals")
    pixels = np.random.default_rng(0).integers(0, 256, (80, 9, 8, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        path = folder / "pictures" / ("cat" if number % 3 else "dog") / f"{number:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path)
    for kind in ("zip", "tar"):
        shutil.make_archive(str(folder / "pictures"), kind, folder / "pictures")
    images = [path.read_bytes() for path in sorted((folder / "pictures").rglob("*.png"))]
    parquet.write_table(pa.table({"image": images, "label": [n % 2 for n in range(80)]}), folder / "pictures.parquet")
    for number in range(4):
        save(folder / "shards" / f"{number:04}.tar", samples(range(10 * number, 10 * number + 10), cls=lambda n: n % 2))
    return folder


def dvc(tree: Path, server: Mapping[str, str], *arguments: str) -> str:
    """What DVC says; it has to succeed."""
    with patch.dict(os.environ, server):
        return call(tree, sys.executable, "-m", "dvc", *arguments)


def sharded(tree: Path, server: Mapping[str, str], *command: str) -> dict[str, str]:
    """The digests of the shards after a command that sets their source."""
    for each in (command, ("shard",)):
        done = ddpm(tree, *each, environment=server)
        assert done.returncode == 0, done.stderr
    return {name: digest for name, digest in trees.digests(tree, "data/shards").items() if name.endswith(".tar")}


@pytest.mark.parametrize("name", ["pictures.zip", "pictures.tar", "pictures.parquet", "shards"])
def test_remote_files_are_read_like_local_ones(tree: Path, server: dict[str, str], originals: Path, name: str) -> None:
    upload(server, originals / name, name)
    there = sharded(tree, server, "import", f"s3://images/{name}", "--name", "x", "--link", "--size", "8")
    assert len(there) == 3
    assert sharded(tree, server, "set", f"shard.source={originals / name}") == there
    assert not list((tree / "data" / "raw").glob("x*"))
    assert not list((tree / ".ddpm").glob(".remote.*"))


def test_a_range_of_shards_is_copied_for_dvc(tree: Path, server: dict[str, str], originals: Path) -> None:
    upload(server, originals / "shards", "set")
    copied = sharded(tree, server, "import", "s3://images/set/{0000..0002}.tar", "--name", "some", "--size", "8")
    files = sorted((tree / "data" / "raw" / "some").iterdir())
    assert [(file.name, file.read_bytes()) for file in files] == [
        (file.name, file.read_bytes()) for file in sorted((originals / "shards").iterdir())[:3]
    ]
    assert sharded(tree, server, "set", f"shard.source={originals}/shards/{{0000..0002}}.tar") == copied
    record = (tree / "data" / "raw" / "some.dvc").read_text()
    assert record.endswith("desc: imported from s3://images/set/{0000..0002}.tar\n")
    again = ddpm(tree, "import", "s3://images/set/{0000..0002}.tar", "--name", "some", environment=server)
    assert "data/raw/some: already exists" in again.stderr
    assert "MB" not in again.stderr


def changed(tree: Path, server: Mapping[str, str]) -> dict[str, Any]:
    """What DVC says that has changed for the stage `shard`."""
    with chdir(tree), patch.dict(os.environ, server), Repo() as repo:
        return dict(repo.status(["shard"]))


def test_dvc_notices_a_changed_object(tree: Path, server: dict[str, str], originals: Path) -> None:
    upload(server, originals / "pictures.zip", "own.zip")
    command = ("import", "s3://images/own.zip", "--name", "own", "--link", "--size", "8")
    said = ddpm(tree, *command, environment=server).stdout
    assert 'shard.source: "s3://images/own.zip"\n' in said
    assert "DVC notices when they change" in said
    assert ran(dvc(tree, server, "repro", "shard")) == ["shard"]
    assert "etag: " in (tree / "dvc.lock").read_text()
    assert changed(tree, server) == {}
    upload(server, originals / "pictures.tar", "own.zip")
    assert changed(tree, server) == {"shard": [{"changed deps": {"s3://images/own.zip": "modified"}}]}
    before = trees.digests(tree, "data/shards")
    done = ddpm(tree, "shard", environment=server)
    message = "s3://images/own.zip: not a readable zip archive (File is not a zip file)"
    assert done.stderr.splitlines()[-1] == f"ddpm shard: error: {message}"
    assert trees.digests(tree, "data/shards") == before
    assert not list((tree / ".ddpm").glob(".remote.*"))


def test_dvc_notices_a_change_of_any_file_of_a_folder(tree: Path, server: dict[str, str], originals: Path) -> None:
    upload(server, originals / "shards", "set")
    done = ddpm(tree, "import", "s3://images/set", "--name", "own", "--link", "--size", "8", environment=server)
    assert done.returncode == 0, done.stderr
    assert ran(dvc(tree, server, "repro", "shard")) == ["shard"]
    assert changed(tree, server) == {}
    last = max((originals / "shards").iterdir())
    upload(server, min((originals / "shards").iterdir()), f"set/{last.name}")
    assert changed(tree, server) == {"shard": [{"changed deps": {"s3://images/set": "modified"}}]}


def test_what_cannot_be_read_or_watched_is_refused(tree: Path, server: dict[str, str], originals: Path) -> None:
    upload(server, originals / "pictures.zip", "own.zip")
    for source, message in (
        ("s3://images/nothing.zip", "no such file or folder"),
        ("s3://nothing/own.zip", "no such file or folder"),
        (
            "s3://images/{own,own}.zip",
            "several files, which DVC cannot watch; leave out --link to copy them, or name their folder, which",
        ),
        (
            "memory://own.zip",
            "DVC cannot watch it (config file error: Unsupported URL type memory://); leave out --link",
        ),
    ):
        with fsspec.open("memory://own.zip", "wb") as file:
            file.write((originals / "pictures.zip").read_bytes())
        done = ddpm(tree, "import", source, "--name", "x", "--link", environment=server)
        assert (done.returncode, done.stdout) == (1, "")
        assert done.stderr.startswith(f"ddpm import: error: {source}: {message}")
        assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("dated", [True, False])
def test_a_web_server_has_to_say_when_a_file_changes(tree: Path, originals: Path, dated: bool) -> None:
    class Handler(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

        def send_header(self, keyword: str, value: str) -> None:
            if dated or keyword != "Last-Modified":
                super().send_header(keyword, value)

    with serving(partial(Handler, directory=str(originals))) as address:
        url = f"{address}/pictures.zip"
        done = ddpm(tree, "import", url, "--name", "x", "--link", "--size", "8", environment={})
    assert done.returncode == (0 if dated else 1), done.stderr
    refused = f"{url}: its server does not say when it changes; leave out --link to copy it"
    assert (refused in done.stderr) == (not dated)
