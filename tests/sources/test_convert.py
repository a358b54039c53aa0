"""The shards are the same to the byte wherever the images are converted, and however they are divided into tasks."""

import io
import os
import pickle
import signal
import tarfile
import zipfile
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, ClassVar, cast

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from diffusion.errors import SystemFault, UserError
from diffusion.sources import convert
from diffusion.sources.images import Picture
from diffusion.sources.shards import Sample, Source, write
from diffusion.sources.sources import open_source
from diffusion.sources.splits import Fractions
from diffusion.storage.executors import OWN_PROCESS, Executor
from diffusion.storage.processes import Processes

COUNT = 45


def encoded(index: int) -> bytes:
    """A picture; each 11th is damaged, each 7th a copy of its predecessor, and each 5th has two frames."""
    if index % 11 == 10:
        return encoded(0)[:60]
    pixels = np.random.default_rng(index - (index % 7 == 6)).integers(0, 256, (4, 5 + index % 3, 3), dtype=np.uint8)
    image, buffer = Image.fromarray(pixels), io.BytesIO()
    if index % 5 == 4:
        image.save(buffer, "GIF", save_all=True, append_images=[image.rotate(180)])
    else:
        image.save(buffer, ("PNG", "WEBP", "BMP")[index % 3])
    return buffer.getvalue()


def files() -> dict[str, bytes]:
    return {f"{'ab'[index % 2]}/{index:02}.img": encoded(index) for index in range(COUNT)} | {"b/note.txt": b"text"}


def folder(path: Path) -> None:
    for name, content in files().items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)


def zipped(path: Path) -> None:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files().items():
            archive.writestr(name, content)
    content = bytearray(path.read_bytes())
    content[content.index(b"a/02.img") + 20] ^= 255  # a wrong checksum
    path.write_bytes(content)


def tarred(path: Path, shards: bool = False) -> None:
    with tarfile.open(path, "w:gz" if path.suffix == ".gz" else "w") as archive:
        members = files()
        if shards:
            members |= {f"{name[:-4]}.cls": name[:1].encode() for name in members}
        for name, content in sorted(members.items()):
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        link = tarfile.TarInfo("b/link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)


def table(path: Path) -> None:
    rows = [{"bytes": encoded(index) if index else None, "path": f"{index}.img"} for index in range(COUNT)]
    parquet.write_table(pa.table({"image": rows, "label": [index % 3 for index in range(COUNT)]}), path)


def arrays(path: Path) -> None:
    np.savez(path, images=np.random.default_rng(0).integers(0, 256, (COUNT, 6, 5, 3), dtype=np.uint8))


MAKERS: dict[str, Callable[[Path], None]] = {
    "folder": folder, "a.zip": zipped, "a.tar.gz": tarred, "shard.tar": partial(tarred, shards=True),
    "a.parquet": table, "a.npz": arrays,
}  # fmt: skip


def written(source: Any, directory: Path, executor: Executor) -> dict[str, bytes]:
    directory.mkdir()
    write(source, "name", directory, Fractions(0.2, 0.2), 10, executor=executor)
    return {path.name: path.read_bytes() for path in directory.iterdir()}


@pytest.mark.parametrize("name", MAKERS)
def test_same_bytes_for_any_number_of_workers(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    MAKERS[name](tmp_path / name)
    expected = written(open_source(tmp_path / name), tmp_path / "expected", OWN_PROCESS)
    assert (b'"reason"' in expected["manifest.json"]) == (name != "a.npz")
    for workers, images, size in ((2, 1, 2**20), (3, 7, 2**20), (2, 64, 200)):
        monkeypatch.setattr(convert, "CHUNK", images)
        monkeypatch.setattr(convert, "CHUNK_BYTES", size)
        assert expected == written(open_source(tmp_path / name), tmp_path / f"{images}", Processes(workers))


@dataclass(frozen=True)
class Elsewhere:
    """Another machine, which does not have the images."""

    images: Path
    shares_files: ClassVar[bool] = False

    def map(
        self, function: Callable[[Any], Any], tasks: Iterable[Any], _: Callable[[Any], int]
    ) -> Generator[tuple[Any, Any]]:
        for task in tasks:
            sent = pickle.dumps(partial(function, task))
            hidden = self.images.rename(self.images.with_name("hidden"))
            result = pickle.loads(sent)()
            hidden.rename(self.images)
            yield task, result


@pytest.mark.parametrize("name", MAKERS)
def test_same_bytes_on_a_machine_without_the_images(tmp_path: Path, name: str) -> None:
    MAKERS[name](tmp_path / name)
    expected = written(open_source(tmp_path / name), tmp_path / "expected", OWN_PROCESS)
    assert expected == written(open_source(tmp_path / name), tmp_path / "there", Elsewhere(tmp_path / name))


def test_files_that_cannot_be_sent_are_named(tmp_path: Path) -> None:
    folder(tmp_path / "pictures")
    source, large = open_source(tmp_path / "pictures"), tmp_path / "pictures" / "b" / "43.img"
    with large.open("ab") as file:
        file.truncate(2**30 + 1)
    with pytest.raises(UserError, match=rf"^{large}: 1073741825 bytes, too many to send to a Dask worker; unset DDPM"):
        written(source, tmp_path / "there", Elsewhere(tmp_path / "pictures"))
    large.unlink()
    with pytest.raises(SystemFault, match=rf"^{large}: cannot be read \(No such file or directory\)"):
        written(source, tmp_path / "again", Elsewhere(tmp_path / "pictures"))


def test_tasks_are_limited_in_number_and_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arrays(tmp_path / "a.npz")
    source, size = open_source(tmp_path / "a.npz"), 6 * 5 * 3
    for images, limit, expected in ((20, 2**20, [20, 20, 5]), (64, 10 * size, [10, 10, 10, 10, 5]), (64, 1, [1] * 45)):
        monkeypatch.setattr(convert, "CHUNK", images)
        monkeypatch.setattr(convert, "CHUNK_BYTES", limit)
        assert [len(chunk) for chunk in convert._chunks(source, True)] == expected


@dataclass
class Fatal:
    """A source whose picture number 70 kills its process: once, if `mark` is given."""

    mark: Path | None

    classes = ()
    own_splits = {}  # noqa: RUF012

    def __len__(self) -> int:
        return 100

    def __iter__(self) -> Iterator[Sample]:
        for index in range(100):
            yield Sample(f"{index}", f"{index}.png", None, None, partial(fatal, index, self.mark))


def fatal(index: int, mark: Path | None) -> Picture:
    if index == 70 and (mark is None or not mark.exists()):
        if mark is not None:
            mark.touch()
        os.kill(os.getpid(), signal.SIGKILL)
    return Picture(Image.new("L", (4, 4), index), "L")


def test_a_killed_worker_changes_no_byte(tmp_path: Path) -> None:
    found = written(Fatal(tmp_path / "mark"), tmp_path / "found", Processes(2))
    assert (tmp_path / "mark").exists()
    assert found == written(Fatal(tmp_path / "mark"), tmp_path / "expected", OWN_PROCESS)


@pytest.mark.parametrize(
    ("chunk", "files"), [(64, r"64\.png: .* the files from here to 99\.png"), (1, r"70\.png: .* this file")]
)
def test_a_picture_that_kills_every_worker_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, chunk: int, files: str
) -> None:
    monkeypatch.setattr(convert, "CHUNK", chunk)
    message = f"^{files} is killed each time; give it more memory"
    with pytest.raises(UserError, match=message):
        written(Fatal(None), tmp_path / "found", Processes(2))


def test_a_file_that_cannot_be_read_stops_the_stage(tmp_path: Path) -> None:
    folder(tmp_path / "folder")
    source = open_source(tmp_path / "folder")
    samples = list(source)
    (tmp_path / "folder" / "b" / "31.img").unlink()

    class Listed(Fatal):
        def __iter__(self) -> Iterator[Sample]:
            return iter(samples)

    with pytest.raises(SystemFault, match=r"b/31\.img: cannot be read \(No such file or directory\)$"):
        written(Listed(None), tmp_path / "found", Processes(2))


def test_an_image_for_which_memory_does_not_suffice_is_named() -> None:
    def decode() -> Picture:
        raise MemoryError

    class One:
        def __iter__(self) -> Iterator[Sample]:
            yield Sample("a", "a.png", None, None, decode)

    with pytest.raises(UserError, match=r"^a\.png: out of memory; .*DDPM_WORKERS.*shard\.max_pixels"):
        list(convert.convert(cast(Source, One()), OWN_PROCESS))
