"""Sources at URLs, and brace ranges and globs, by fsspec's file systems without a network."""

import errno
import shutil
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import fsspec
import numpy as np
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image

import diffusion
from diffusion.errors import UserError, WriteFault
from diffusion.sources import locations
from diffusion.sources.locations import locate
from diffusion.sources.sources import open_source
from tests.sources.test_webdatasets import samples, save


@pytest.fixture
def memory() -> Iterator[Any]:
    fs = fsspec.filesystem("memory")
    yield fs
    fs.store.clear()
    fs.pseudo_dirs[:] = [""]


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """A folder with four shards of ten images, one of them for testing."""
    for number, name in enumerate(("train-0000", "train-0001", "train-0002", "test-0000")):
        save(tmp_path / "shards" / f"{name}.tar", samples(range(10 * number, 10 * number + 10), cls=lambda n: n % 3))
    return tmp_path / "shards"


def contents(location: str) -> list[Any]:
    """All that a reader finds: names, keys, labels, splits and pixels."""
    with locate(location).at_hand("test") as path:
        source = open_source(path)
        return [source.classes, dict(source.own_splits)] + [
            (*sample[:4], np.asarray(sample.decode().image).tolist()) for sample in source
        ]


@pytest.mark.parametrize("kind", ["zip", "tar", "gztar"])
def test_an_archive_in_memory_is_read_like_a_file(tmp_path: Path, memory: Any, kind: str) -> None:
    for name in ("cat/1.png", "dog/2.png"):
        (tmp_path / "pictures" / name).parent.mkdir(parents=True)
        Image.new("RGB", (3, 2), (5, 6, 7)).save(tmp_path / "pictures" / name)
    archive = Path(shutil.make_archive(str(tmp_path / "pictures"), kind, tmp_path / "pictures"))
    memory.put(str(archive), f"/data/{archive.name}")
    before = set(tmp_path.iterdir())
    with locate(f"memory://data/{archive.name}").at_hand("test", tmp_path) as path:
        assert path.read_bytes() == archive.read_bytes()
        assert len(set(tmp_path.iterdir()) - before) == 1
    assert set(tmp_path.iterdir()) == before
    assert contents(f"memory://data/{archive.name}") == contents(str(archive)) == contents(archive.as_uri())
    assert len(diffusion.load_images(f"memory://data/{archive.name}", 4, 4)) == 2


def test_a_path_is_used_as_it_is(shards: Path) -> None:
    odd = shards.with_name("{a,b}*")
    shards.rename(odd)
    for source in (str(odd), f"file://{odd}"):
        with locate(source).at_hand("test") as path:
            assert path == odd


@pytest.mark.parametrize("name", ["{train-{0000..0002},test-0000}.tar", "*.tar", "t*-000{0..2}.tar"])
def test_ranges_and_globs_are_read_like_their_folder(shards: Path, memory: Any, name: str) -> None:
    memory.put(str(shards), "/data", recursive=True)
    expected = contents(str(shards))
    assert len(expected) == 42
    assert expected[1] == {"train": "train-0000.tar and train-0001.tar and train-0002.tar", "test": "test-0000.tar"}
    assert contents(f"{shards}/{name}") == contents(f"memory://data/{name}") == contents("memory://data") == expected


def test_files_of_several_folders_keep_their_places(shards: Path, tmp_path: Path) -> None:
    for split in ("train", "val"):
        (tmp_path / split).mkdir()
        shutil.copy(shards / "train-0000.tar", tmp_path / split / "0.tar")
    with locate(f"{tmp_path}/{{train,val}}/0.tar").at_hand("test") as path:
        assert dict(open_source(path).own_splits) == {"train": "train/0.tar", "val": "val/0.tar"}
        assert (path / "val" / "0.tar").resolve() == tmp_path / "val" / "0.tar"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("memory://nothing.zip", "memory://nothing.zip: no such file or folder"),
        ("memory://data/train-{0001..0003}.tar", "memory://data/train-0003.tar: no such file"),
        ("memory://data/x*.tar", "memory://data/x*.tar: matches no file"),
        ("memory://data/{1..999999999}.tar", "memory://data/{1..999999999}.tar: more than 10000 files"),
        ("memory://data/" + 14 * "{a,b}", "memory://data/" + 14 * "{a,b}" + ": more than 10000 files"),
        ("memory://data/broken.zip", "memory://data/broken.zip: not a readable zip archive (File is not a zip file)"),
        ("memory://data/{train-broken,train-0001}.tar", "memory://data/train-broken.tar: not a readable tar archive ("),
        ("memory://data/notes.txt", "memory://data/notes.txt: no images in a supported format"),
        ("SHARDS/train-{0001..0003}.tar", "SHARDS/train-0003.tar: no such file"),
        ("SHARDS/x*.tar", "SHARDS/x*.tar: matches no file"),
        ("SHARDS/train-{0001", "SHARDS/train-{0001: "),
        ("unknown://data", "unknown://data: cannot be read (Protocol not known: unknown)"),
        ("http://127.0.0.1:1/a.zip", "http://127.0.0.1:1/a.zip: cannot be read (Cannot connect to host"),
    ],
)
def test_what_cannot_be_read_gives_one_line(shards: Path, memory: Any, source: str, message: str) -> None:
    memory.put(str(shards), "/data", recursive=True)
    memory.pipe({"/data/broken.zip": b"nothing", "/data/train-broken.tar": b"nothing", "/data/notes.txt": b"x"})
    with pytest.raises(UserError) as caught:
        contents(source.replace("SHARDS", str(shards)))
    said = str(caught.value).replace(str(shards), "SHARDS").replace("memory:///", "memory://")
    assert said.startswith(message)
    assert "\n" not in said


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    def needs(_: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(locations, "url_to_fs", needs)
    with pytest.raises(UserError, match=r"^s3://a/b.zip: cannot be read \(Install s3fs to access S3\)$"):
        locate("s3://a/b.zip")


def test_names_that_lead_out_of_the_folder_are_refused(memory: Any, tmp_path: Path) -> None:
    class Sly(MemoryFileSystem):  # type: ignore[misc] # as an object store, whose keys are any text
        def find(self, path: str, **_: Any) -> list[str]:
            return [f"{path}/a/../../../{tmp_path.name}.png"]

    memory.pipe("/data/a.png", b"x")
    where = locate("memory://data")._replace(fs=Sly(), files=tuple(Sly().find("/data")))
    with pytest.raises(UserError, match="leads out of /data"), where.at_hand("test", tmp_path):
        pass
    with (
        pytest.raises(UserError, match="or to another file"),
        where._replace(files=("/data/a//b", "/data/a/b")).at_hand("test", tmp_path),
    ):
        pass
    memory.pipe({"/data/..": b"x", f"/data/{'x' * 300}/a.png": b"x"})
    with locate("memory://data")._replace(files=("/data/..",), folder=None).at_hand("test", tmp_path) as path:
        assert path.name == "files"
    with (
        pytest.raises(WriteFault, match="choose a shorter name"),
        where._replace(fs=memory, files=(f"/data/{'x' * 300}/a.png",)).at_hand("test", tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("cut", [False, True])
def test_a_file_that_changes_meanwhile_is_refused(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool
) -> None:
    memory.pipe("/a.npz", b"before")

    def get_file(self: Any, path: str, target: str, callback: Any) -> None:  # noqa: ARG001
        Path(target).write_bytes(b"befor" if cut else b"before")
        if not cut:
            self.pipe(path, b"after")

    monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
    with (
        pytest.raises(UserError, match=r"^memory:///?a.npz: changed while it was downloaded; try again$"),
        locate("memory://a.npz").at_hand("test", tmp_path),
    ):
        pass
    assert not list(tmp_path.iterdir())


def test_a_full_disk_is_told_from_a_lost_connection(
    memory: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    memory.pipe("/a.npz", b"x")
    for number, kind, message in (
        (errno.ENOSPC, WriteFault, "a.npz: cannot be written"),
        (errno.ECONNRESET, UserError, r"^memory:///?a.npz: cannot be read \(.*reset"),
    ):

        def get_file(*_: Any, number: int = number, **__: Any) -> None:
            raise OSError(number, "Connection reset" if number == errno.ECONNRESET else "full")

        monkeypatch.setattr(MemoryFileSystem, "get_file", get_file)
        with pytest.raises(kind, match=message), locate("memory://a.npz").at_hand("test", tmp_path):
            pass
    assert not list(tmp_path.iterdir())


@contextmanager
def serving(handler: Callable[..., SimpleHTTPRequestHandler]) -> Iterator[str]:
    """A web server's address."""
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_web_server(shards: Path) -> None:
    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_: object) -> None: ...

    with serving(partial(Quiet, directory=str(shards))) as url:
        assert contents(f"{url}/train-0001.tar?download=true") == contents(str(shards / "train-0001.tar"))
        assert contents(f"{url}/train-{{0000..0002}}.tar") == contents(f"{shards}/train-{{0000..0002}}.tar")
        with pytest.raises(UserError, match=r"none.tar: no such file or folder$"):
            locate(f"{url}/none.tar")


def test_progress_in_megabytes_reaches_its_total(memory: Any, capsys: pytest.CaptureFixture[str]) -> None:
    memory.pipe({"/data/a.npz": bytes(1_200_000), "/data/b.npz": bytes(900_000)})
    with locate("memory://data").at_hand("shard"):
        pass
    assert capsys.readouterr().err.startswith("shard: 3/3 MB")
