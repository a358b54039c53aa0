"""What could not be used: its reasons, how much is too much, and its thumbnails."""

import csv
import io
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from pyarrow import parquet

from diffusion.sources import images, rejections, report
from diffusion.sources.convert import thumbnail
from diffusion.sources.images import OTHER_FILE, THUMBNAIL, Unreadable, read_image
from diffusion.sources.reading import MAX_PIXELS, Reading
from diffusion.sources.rejections import Rejections, Remark, TooFewImages
from diffusion.sources.shards import Images, Manifest, write
from diffusion.sources.sources import open_source
from diffusion.sources.splits import COPY_OF_TEST, Fractions


def found(**counts: int) -> Rejections:
    return Rejections(
        Remark(file=f"{reason}/{n}.png", reason=reason) for reason, count in counts.items() for n in range(count)
    )


def test_the_share_of_images_that_cannot_be_used_is_limited() -> None:
    found(damaged=5).check("name", 95, 0.05)
    found(damaged=500).check("name", 1, 1.0)
    with pytest.raises(TooFewImages) as caught:
        found(damaged=1, raw=5).check("name", 94, 0.05)
    assert str(caught.value) == (
        "name: 6 of 100 images cannot be used, more than shard.max_rejected (0.05) allows: repair or remove them, or "
        "increase it; 'raw/0.png' and 4 more: raw; 'damaged/0.png': damaged"
    )
    with pytest.raises(TooFewImages, match=r"^name: 1 of 1001 images .*\(0\)"):
        found(damaged=1).check("name", 1000, 0)


def test_what_is_no_loss_does_not_count() -> None:
    found(**{OTHER_FILE: 50, COPY_OF_TEST: 50}).check("name", 1, 0)


@pytest.fixture
def among_texts(tmp_path: Path) -> Path:
    """Forty pictures, and a text beside each of 30."""
    folder = tmp_path / "in"
    folder.mkdir()
    for number in range(40):
        Image.new("L", (3, 3), number).save(folder / f"{number}.png")
    for number in range(30):
        (folder / f"{number}.txt").write_text("a text")
    return folder


def test_a_list_of_rejected_files_ends_but_their_number_does_not(
    tmp_path: Path, among_texts: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(rejections, "MAX_LISTED", 4)
    (tmp_path / "out").mkdir()
    manifest = write(open_source(among_texts), "name", tmp_path / "out", Fractions(0.2, 0.2), 100)
    assert manifest == Manifest.read(tmp_path / "out" / "manifest.json")
    assert [remark.file for remark in manifest.rejected] == ["0.txt", "1.txt", "10.txt", "11.txt"]
    assert (manifest.more_rejected, manifest.reasons) == ({OTHER_FILE: 26}, [(OTHER_FILE, 30)])
    page = report.page(manifest, tmp_path / "out", [None] * 4)
    assert "30 files could not be used" in page
    assert "The first 4; data/shards/manifest.json lists\n4:" in page


def test_a_manifest_that_lists_all_says_nothing_of_more(tmp_path: Path, among_texts: Path) -> None:
    (tmp_path / "out").mkdir()
    manifest = write(open_source(among_texts), "name", tmp_path / "out", Fractions(0.2, 0.2), 100)
    assert (len(manifest.rejected), manifest.more_rejected) == (30, {})
    assert b"more_rejected" not in (tmp_path / "out" / "manifest.json").read_bytes()


def test_the_share_of_images_counts_those_that_are_not_listed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rejections, "MAX_LISTED", 1)
    with pytest.raises(TooFewImages, match=r"^name: 6 of 100 images .* 'raw/0.png' and 4 more: raw; 'damaged/0.png'"):
        found(damaged=1, raw=5).check("name", 94, 0.05)


def test_the_table_can_be_read_by_a_spreadsheet() -> None:
    content = rejections.table([Remark(file='a, "b".png', reason="über\nall")]).decode()
    assert list(csv.reader(io.StringIO(content))) == [["file", "reason"], ['a, "b".png', "über\nall"]]


@pytest.fixture
def pictures(tmp_path: Path) -> Path:
    """Three pictures, and a class of which Pillow reads none."""
    for number in range(3):
        path = tmp_path / "pictures" / "png" / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("L", (3, 3), number).save(path)
    for number in range(9):
        path = tmp_path / "pictures" / "phone" / f"IMG_{number}.HEIC"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(b"\0\0\0\x18ftypheic")
    (path.parent / "film.mov").write_bytes(b"")
    return tmp_path / "pictures"


def test_pictures_that_pillow_does_not_read_are_not_overlooked(tmp_path: Path, pictures: Path) -> None:
    source = open_source(pictures)
    assert source.classes == ("phone", "png")
    (tmp_path / "shards").mkdir()
    with pytest.raises(
        TooFewImages, match=r"^name: 9 of 12 .*'phone/IMG_0.HEIC' and 8 more: HEIC, which Pillow cannot"
    ):
        write(source, "name", tmp_path / "shards", Fractions(0.1, 0.1), 100, max_rejected=0.5)


def test_a_plugin_of_pillow_may_read_them(pictures: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(images, "_suffixes", lambda: {".heic", ".png"})
    assert images.unsupported(".HEIC") is None
    assert {sample.rejected for sample in open_source(pictures)} == {None, OTHER_FILE}


def of_each_kind(folder: Path) -> dict[str, Path]:
    """A picture of 5x4 pixels by itself, in archives and in a table."""
    buffer = io.BytesIO()
    Image.new("RGB", (5, 4), "red").save(buffer, "PNG")
    content, found = buffer.getvalue(), {name: folder / name for name in ("folder", "a.zip", "a.tar", "a.parquet")}
    found["folder"].mkdir()
    (found["folder"] / "1.png").write_bytes(content)
    with zipfile.ZipFile(found["a.zip"], "w") as archive:
        archive.writestr("1.png", content)
    for name, others in (("a.tar", {}), ("b.tar", {"1.cls": b"0"})):
        with tarfile.open(folder / name, "w") as tar:
            for member, text in ({"1.png": content} | others).items():
                info = tarfile.TarInfo(member)
                info.size = len(text)
                tar.addfile(info, io.BytesIO(text))
    parquet.write_table(pa.table({"image": [content]}), found["a.parquet"])
    return found | {"b.tar": folder / "b.tar"}


@pytest.mark.parametrize("kind", ["folder", "a.zip", "a.tar", "b.tar", "a.parquet"])
def test_every_reader_of_files_has_the_limit_of_pixels(tmp_path: Path, kind: str) -> None:
    path = of_each_kind(tmp_path)[kind]
    (sample,) = open_source(path, Reading(max_pixels=20))
    assert sample.decode().image.size == (5, 4)
    (sample,) = open_source(path, Reading(max_pixels=19))
    with pytest.raises(Unreadable, match=r"^20 pixels, more than shard\.max_pixels \(19\); increase it if"):
        sample.decode()
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


def test_pillows_own_limit_is_no_obstacle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file to the shards and back."""
    images = np.random.default_rng(0).integers(0, 256, (30, 5, 4), dtype=np.uint8)
    (tmp_path / "in").mkdir()
    (tmp_path / "out").mkdir()
    for number, pixels in enumerate(images):
        Image.fromarray(pixels).save(tmp_path / "in" / f"{number}.png")
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 3)
    manifest = write(open_source(tmp_path / "in"), "name", tmp_path / "out", Fractions(0.2, 0.2), 100)
    image, _ = Images(tmp_path / "out", manifest.splits["train"])[0]
    assert image.size == (4, 5)
    assert manifest.rejected == ()


def test_an_image_inside_of_another_has_the_same_limit(tmp_path: Path) -> None:
    """An ICO file of 16x16 pixels, by its own account, that contains a PNG file of 40x40."""
    buffer = io.BytesIO()
    Image.new("RGB", (40, 40), "red").save(buffer, "ICO", sizes=[(40, 40)])
    content = bytearray(buffer.getvalue())
    content[6:8] = 16, 16
    (tmp_path / "a.ico").write_bytes(content)
    assert read_image(tmp_path / "a.ico", Reading(max_pixels=1600))
    with pytest.raises(Unreadable, match=r"^1600 pixels, more than shard\.max_pixels \(1599\)"):
        read_image(tmp_path / "a.ico", Reading(max_pixels=1599))


def large(kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    Image.new("RGB", (400, 300), "red").save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.mark.parametrize(
    ("content", "max_pixels", "drawn"),
    [
        (lambda: large("JPEG"), 30_000, True),
        (lambda: large("JPEG"), 29_999, False),  # halved, it would be larger
        (lambda: large("JPEG", progressive=True), 30_000, False),
        (lambda: large("PNG"), 20_000, False),
        (lambda: large("PNG")[:-40], 200_000, False),
        (lambda: large("PNG"), 119_999, False),
    ],
)
def test_a_thumbnail_never_needs_the_memory_of_the_whole(
    tmp_path: Path, content: Callable[[], bytes], max_pixels: int, drawn: bool
) -> None:
    (tmp_path / "a").write_bytes(content())
    with pytest.raises(Unreadable) as caught:
        read_image(tmp_path / "a", Reading(max_pixels=max_pixels))
    picture = caught.value.thumbnail
    assert (picture is not None) == drawn
    assert picture is None or (max(picture.size), picture.mode) == (THUMBNAIL, "RGB")
    assert Image.MAX_IMAGE_PIXELS == MAX_PIXELS


def test_the_page_shows_what_was_rejected_and_what_looks_alike(tmp_path: Path) -> None:
    for split, numbers in (("train", range(6)), ("val", range(6, 8)), ("test", range(8, 11))):
        for number in numbers:
            path = tmp_path / "in" / split / "<b>" / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            rng = np.random.default_rng(number)
            Image.fromarray(rng.integers(0, 256, (20, 20, 3), dtype=np.uint8)).resize((40, 40)).save(path)
    Image.open(tmp_path / "in" / "train" / "<b>" / "2.png").save(path.with_name("again.jpg"), quality=90)
    (path.parents[2] / "train" / "<b>" / "copy.bmp").write_bytes(path.read_bytes())
    Image.new("LAB", (30, 90)).save(path.parents[2] / "train" / "<b>" / "lab.tif")
    path.with_name("cut.png").write_bytes(path.read_bytes()[:100])
    (tmp_path / "out").mkdir()
    seen = list[tuple[str, tuple[int, int] | None]]()

    def note(remark: Remark, png: bytes | None) -> None:
        seen.append((remark.file, Image.open(io.BytesIO(png)).size if png else None))

    source = open_source(tmp_path / "in")
    manifest = write(source, "name", tmp_path / "out", Fractions(0.1, 0.1), 100, on_rejected=note)
    assert seen == [
        ("test/<b>/cut.png", None), ("train/<b>/copy.bmp", (40, 40)), ("train/<b>/lab.tif", (30, 90)),
    ]  # fmt: skip
    page = report.page(manifest, tmp_path / "out", [None, thumbnail(Image.new("RGBA", (300, 20))), b"png"])
    for text in (
        "<td>train/&lt;b&gt;/copy.bmp</td><td>a copy of an image in the source&#39;s test split</td>",
        '<img alt="" src="data:image/png;base64,cG5n">',
        "<p>Images of test that resemble one of train: 1.</p>",
        "<td>test/&lt;b&gt;/again.jpg</td>",
        "<p>12 images of name; size in pixels: 40x40; exact copies of others:\n",
        "<p>3 files could not be used:</p>",
    ):
        assert text in page
    assert page.count("<img") == 2 + 2
    assert page == report.page(manifest, tmp_path / "out", [None, thumbnail(Image.new("RGBA", (300, 20))), b"png"])
    nothing = manifest.model_copy(update={"rejected": (), "near_duplicates": None})
    assert "Every file was used." in report.page(nothing, tmp_path / "out", [])
    assert isinstance(Manifest.read(tmp_path / "out" / "manifest.json"), Manifest)
