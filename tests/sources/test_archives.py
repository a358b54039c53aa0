"""Zip and tar archives give what the folder gives; what is odd in them is rejected with a reason."""

import io
import os
import resource
import tarfile
import tempfile
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import UserError
from diffusion.sources import shards, trees
from diffusion.sources.folders import Folder
from diffusion.sources.images import Unreadable
from diffusion.sources.sources import open_source
from diffusion.sources.splits import Fractions

NAMES = ["cat/b.png", "cat/a-1.png", "cat/a.png", "cat/a/z.png", "dog/ü.png", "dog/notes.txt", "dog/plain", "stray.png"]
FRACTIONS = Fractions(0.3, 0.3)


def picture(seed: int) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def contents(names: list[str]) -> dict[str, bytes]:
    return {name: b"text" if name.endswith(".txt") else picture(seed) for seed, name in enumerate(names)}


def save_folder(path: Path, files: dict[str, bytes]) -> Path:
    for name, content in files.items():
        (path / name).parent.mkdir(parents=True, exist_ok=True)
        (path / name).write_bytes(content)
    return path


def save_zip(path: Path, files: dict[str, bytes]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.mkdir("empty")
        for name, content in files.items():
            archive.writestr(name, content)
    return path


def save_tar(path: Path, files: dict[str, bytes]) -> Path:
    mode = {".tar": "w", ".gz": "w:gz", ".tgz": "w:gz", ".bz2": "w:bz2", ".xz": "w:xz"}[path.suffix]
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


SAVERS: dict[str, Callable[[Path, dict[str, bytes]], Path]] = {
    "a.zip": save_zip, "a.tar": save_tar, "a.tar.gz": save_tar, "a.tgz": save_tar, "a.tar.bz2": save_tar,
    "a.TAR.xz": save_tar,
}  # fmt: skip


@pytest.mark.parametrize("name", SAVERS)
def test_an_archive_gives_what_the_folder_gives(tmp_path: Path, name: str) -> None:
    files = contents([*NAMES, *(f"cat/{number}.png" for number in range(30))])
    folder = open_source(save_folder(tmp_path / "folder", files))
    shuffled = dict(sorted(files.items(), key=lambda item: hash(item[1])))
    archive = open_source(SAVERS[name](tmp_path / name, shuffled | {".hidden.png": b"", "__MACOSX/cat/._b.png": b""}))
    assert isinstance(archive, Folder)
    for source, place in ((folder, "from_folder"), (archive, "from_archive")):
        (tmp_path / place).mkdir()
        shards.write(source, "pictures", tmp_path / place, FRACTIONS, 10)
    written = {path.name: path.read_bytes() for path in (tmp_path / "from_folder").iterdir()}
    assert written == {path.name: path.read_bytes() for path in (tmp_path / "from_archive").iterdir()}
    assert "train-000000.tar" in written


def test_splits_in_an_archive_are_found(tmp_path: Path) -> None:
    files = contents([f"set/{split}/{kind}/1.png" for split in ("train", "test") for kind in ("cat", "dog")])
    source = open_source(save_zip(tmp_path / "a.zip", files))
    assert source.own_splits == {"train": "train/", "test": "test/"}
    assert source.classes == ("cat", "dog")
    assert [(sample.file, sample.split) for sample in source][:2] == [
        ("set/test/cat/1.png", "test"),
        ("set/test/dog/1.png", "test"),
    ]


@pytest.mark.parametrize("save", [save_zip, save_tar])
def test_names_that_lead_out_of_the_archive_are_rejected(
    tmp_path: Path, save: Callable[[Path, dict[str, bytes]], Path]
) -> None:
    names = ["cat/1.png", "../out.png", "cat/../../out.png"]
    source = open_source(save(tmp_path / ("a.zip" if save is save_zip else "a.tar"), contents(names)))
    found = {sample.file: sample.rejected for sample in source}
    assert found.pop("cat/1.png") is None
    assert len(found) == 2
    assert set(found.values()) == {"its name is empty, or leads out of the archive"}
    assert source.classes == ("cat",)


@pytest.mark.parametrize("save", [save_zip, save_tar])
def test_names_are_read_as_in_unpacking(tmp_path: Path, save: Callable[[Path, dict[str, bytes]], Path]) -> None:
    names = ["./cat/1.png", "dog//2.png", "/dog/3.png", "dog/./4.png"]
    source = open_source(save(tmp_path / ("a.zip" if save is save_zip else "a.tar"), contents(names)))
    assert [sample.file for sample in source] == ["cat/1.png", "dog/2.png", "dog/3.png", "dog/4.png"]
    assert source.classes == ("cat", "dog")


def test_names_of_other_systems_in_a_zip(tmp_path: Path) -> None:
    """Backslashes of Windows, and UTF-8 without its flag, as macOS writes it."""
    path = save_zip(tmp_path / "a.zip", {"caf\u00e9/1.png": picture(1), "dog_2.png": picture(2)})
    content = path.read_bytes().replace(b"dog_2.png", b"dog\\2.png")
    assert b"caf\xc3\xa9" in content
    with zipfile.ZipFile(path) as archive:
        offsets = [info.header_offset for info in archive.infolist() if "caf" in info.filename]
    content = bytearray(content)
    for place in (offsets[0] + 6, content.rindex("caf\u00e9".encode()) - 46 + 8):
        content[place + 1] &= ~0x08
    path.write_bytes(content)
    assert open_source(path).classes == ("caf\u00e9", "dog")


def reasons(path: Path) -> dict[str, str]:
    """Why each image of a source is rejected; empty for those that are read."""
    found = {}
    for sample in open_source(path):
        try:
            found[sample.file] = sample.rejected or ""
            if not sample.rejected:
                sample.decode()
        except Exception as error:
            found[sample.file] = f"{type(error).__name__}: {error}"
    return found


def test_what_cannot_be_read_in_a_zip_is_rejected_by_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = save_zip(tmp_path / "a.zip", contents(["a/1.png", "a/2.png", "a/3.png", "a/4.png", "a/plain"]))
    whole = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        offsets = {info.filename: info.header_offset for info in archive.infolist()}
    whole[offsets["a/2.png"] + 60] ^= 0xFF  # in its compressed content
    central = {name: whole.rindex(name.encode()) - 46 for name in offsets if name.startswith("a/")}
    for name in ("a/3.png", "a/plain"):  # flag bit 0: encrypted
        whole[central[name] + 8] |= 1
        whole[offsets[name] + 6] |= 1
    whole[central["a/4.png"] + 10] = 97  # a method of compression that Python does not know
    path.write_bytes(whole)
    found = reasons(path)
    assert found["a/1.png"] == ""
    assert found["a/2.png"].startswith("Unreadable: ")
    assert found["a/3.png"] == "Unreadable: encrypted; unpack the archive with its password first"
    assert found["a/4.png"].startswith("Unreadable: damaged, or compressed in a way that Python cannot read")
    assert found["a/plain"] == "not an image by its name or content"
    monkeypatch.setattr(trees, "MAX_MEMBER_BYTES", 50)
    assert "bytes when uncompressed, more than 50" in reasons(path)["a/1.png"]


def test_links_in_a_tar_are_rejected(tmp_path: Path) -> None:
    path = save_tar(tmp_path / "a.tar", contents(["a/1.png"]))
    with tarfile.open(path, "a") as archive:
        for name, kind, target in (
            ("a/2.png", tarfile.SYMTYPE, "/etc/passwd"),
            ("a/3.png", tarfile.LNKTYPE, "a/1.png"),
        ):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, target
            archive.addfile(member)
    rejected = "Unreadable: a link or device in an archive; only regular files are read"
    assert reasons(path) == {"a/1.png": "", "a/2.png": rejected, "a/3.png": rejected}


def test_the_last_file_of_a_name_counts(tmp_path: Path) -> None:
    path = save_tar(tmp_path / "a.tar", {"a/1.png": picture(1)})
    with tarfile.open(path, "a") as archive:
        member = tarfile.TarInfo("a/1.png")
        member.size = len(picture(2))
        archive.addfile(member, io.BytesIO(picture(2)))
    (sample,) = open_source(path)
    assert np.array_equal(np.asarray(sample.decode().image), np.asarray(Image.open(io.BytesIO(picture(2)))))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.zip", b"no archive", "a.zip: not a readable zip archive"),
        ("a.tar", b"no archive" * 100, "a.tar: not a readable tar archive"),
        ("a.tar.gz", b"\x1f\x8bno archive", "a.tar.gz: not a readable tar archive"),
        ("a.tar.xz", b"\xfd7zXZ\x00no archive", "a.tar.xz: not a readable tar archive"),
        ("a.tar", b"", "a.tar: not a readable tar archive"),
        ("b.rar", b"no archive", "b.rar: no images in a supported format"),
    ],
)
def test_what_is_no_archive_gets_one_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError) as caught:
        open_source(tmp_path / name)
    assert str(caught.value).startswith(str(tmp_path / message))
    assert "\n" not in str(caught.value)


def test_a_truncated_archive_gets_one_line(tmp_path: Path) -> None:
    for name, save in SAVERS.items():
        path = save(tmp_path / name, contents(NAMES))
        path.write_bytes(path.read_bytes()[: 6 * 512 if name.endswith(".tar") else -700])
        with pytest.raises(UserError, match=r"not a readable (zip|tar) archive"):
            list(open_source(path))


def test_an_archive_that_is_truncated_while_it_is_read(tmp_path: Path) -> None:
    buffer = io.BytesIO()
    Image.effect_noise((200, 200), 100).save(buffer, "PNG")
    path = save_zip(tmp_path / "a.zip", {"a.png": buffer.getvalue()})
    (sample,) = open_source(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(Unreadable, match=r"^truncated$"):
        sample.decode()


def test_an_archive_that_grows_too_much_is_refused(tmp_path: Path) -> None:
    path = save_tar(tmp_path / "a.tar.gz", {"a.png": bytes(10**7)})
    with pytest.raises(UserError, match=r"a.tar.gz: more than 200 times as large when decompressed"):
        open_source(path)


def test_no_room_for_a_decompressed_archive(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The message names the folder that is full, not the archive."""
    path = save_tar(tmp_path / "a.tar.gz", contents(NAMES))
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "full"))
    (tmp_path / "full").mkdir()
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
    try:
        with pytest.raises(UserError, match=r"^\S+/full: cannot be written \(File too large\)"):
            open_source(path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)


def test_archives_without_images_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no images in a supported format"):
        open_source(save_zip(tmp_path / "a.zip", {"a/notes.txt": b"text"}))
