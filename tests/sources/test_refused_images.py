"""Image files that cannot be decoded correctly, and similar ones that can."""

import errno
import io
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import SystemFault
from diffusion.sources.folders import rejection_reason
from diffusion.sources.images import Unreadable, is_image, read_image
from tests.sources.encoders import png, tiff
from tests.sources.pixels import BYTES, DEEP, H, W, differ, save


def refused_files() -> dict[str, tuple[bytes, str]]:
    strip = BYTES[..., :3].tobytes()
    rgb16 = png(W, H, 16, 2, [row.tobytes() for row in DEEP.repeat(3, 1).astype(">u2")], {b"tRNS": bytes(6)})
    linear = {b"gAMA": (100000).to_bytes(4)}
    wide = {b"gAMA": (45455).to_bytes(4), b"cHRM": b"".join(n.to_bytes(4) for n in [31270, 32900, 68000, 32000] * 2)}
    rows = [row.tobytes() for row in BYTES[..., 0]]
    return {
        "photo.NEF": (tiff(W, H, [strip], [8] * 3, 2), "camera raw"),
        "photo.cr3": (b"anything", "camera raw"),
        "dng.tif": (tiff(W, H, [strip], [8] * 3, 2, {50706: (1, [1, 4, 0, 0])}), "camera raw"),
        "flag.tif": (tiff(W, H, [strip], [8] * 3, 2, {254: (4, [1])}), "its first page is the thumbnail of another"),
        "oldflag.tif": (tiff(W, H, [strip], [8] * 3, 2, {255: (3, [2])}), "its first page is the thumbnail"),
        "child.tif": (tiff(W, H, [strip], [8] * 3, 2, child=(4000, 3000)), "its first page is the thumbnail"),
        "signed.tif": (tiff(W, H, [strip[: W * H]], [8], 1, {339: (3, [2])}), "signed 8-bit"),
        "cut.tif": (tiff(W, H, [strip], [8] * 3, 2, {273: (4, [10**6])}), "decoder error"),
        "inks.tif": (tiff(W, H, [BYTES.tobytes()], [8] * 4, 5, {332: (3, [2])}), "inks other than"),
        "rgb16.png": (rgb16, "16-bit RGB with a transparent colour"),
        "linear.png": (png(W, H, 8, 0, rows, linear), "gamma 1 without an ICC profile"),
        "wide.png": (png(W, H, 8, 0, rows, wide), "primaries other than those of sRGB"),
        "pq.png": (png(W, H, 8, 0, rows, {b"cICP": bytes([9, 16, 0, 1])}), "code points 9/16"),
        "text.png": (b"no image", "not an image, or of a kind that Pillow cannot read"),
        "empty.jpg": (b"", "not an image"),
        "cut.png": (png(W, H, 8, 0, rows, {})[:70], "truncated|broken"),
    }


@pytest.mark.parametrize("name", refused_files())
def test_what_cannot_be_read_is_refused_with_its_reason(tmp_path: Path, name: str) -> None:
    content, reason = refused_files()[name]
    (tmp_path / name).write_bytes(content)
    with pytest.raises(Unreadable, match=reason) as caught:
        read_image(tmp_path / name)
    assert "\n" not in str(caught.value)
    assert str(tmp_path) not in str(caught.value)
    assert is_image(tmp_path / name)


def test_harmless_relatives_of_refused_files_are_read(tmp_path: Path) -> None:
    strip, rows = BYTES[..., :3].tobytes(), [row.tobytes() for row in BYTES[..., 0]]
    srgb = {b"gAMA": (45455).to_bytes(4), b"cHRM": b"".join(
        n.to_bytes(4) for n in [31270, 32900, 64000, 33000, 30000, 60000, 15000, 6000])}  # fmt: skip
    (tmp_path / "child.tif").write_bytes(tiff(W, H, [strip], [8] * 3, 2, child=(4, 3)))
    assert differ(read_image(tmp_path / "child.tif").image, BYTES[..., :3]) == 0
    (tmp_path / "srgb.png").write_bytes(png(W, H, 8, 0, rows, srgb))
    (tmp_path / "cicp.png").write_bytes(png(W, H, 8, 0, rows, {b"cICP": bytes([1, 13, 0, 1])}))
    for name in ("srgb.png", "cicp.png"):
        assert differ(read_image(tmp_path / name).image, BYTES[..., 0]) == 0


def test_adobe_rgb_by_exif_alone_is_refused(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0xA005] = {1: "R03"}
    save(tmp_path / "a.jpg", Image.new("RGB", (W, H)), exif=exif)
    with pytest.raises(Unreadable, match="Adobe RGB"):
        read_image(tmp_path / "a.jpg")


def test_high_dynamic_range_avif_is_refused(tmp_path: Path) -> None:
    content = save(tmp_path / "a.avif", Image.new("RGB", (W, H), "red"))
    place = content.index(b"colrnclx") + 8
    (tmp_path / "a.avif").write_bytes(content[:place] + bytes([0, 9, 0, 16]) + content[place + 4 :])
    with pytest.raises(Unreadable, match="code points 9/16"):
        read_image(tmp_path / "a.avif")


def test_other_colour_spaces_of_jpeg_2000_are_refused(tmp_path: Path) -> None:
    content = save(tmp_path / "a.jp2", Image.new("RGB", (W, H), "red"), irreversible=False)
    assert differ(read_image(tmp_path / "a.jp2").image, np.full((H, W, 3), (255, 0, 0))) == 0
    place = content.index(b"colr\x01") + 7
    assert content[place : place + 4] == bytes([0, 0, 0, 16])  # sRGB
    (tmp_path / "a.jp2").write_bytes(content[:place] + bytes([0, 0, 0, 14]) + content[place + 4 :])  # L*a*b*
    with pytest.raises(Unreadable, match="colour space 14 of JPEG 2000"):
        read_image(tmp_path / "a.jp2")


class BadDisk(io.FileIO):
    """A file whose first bytes alone can be read."""

    def read(self, size: int | None = -1, /) -> Any:
        content = super().read(-1 if size is None else size)
        if self.tell() > 4096:
            raise OSError(errno.EIO, "Input/output error")
        return content


@pytest.mark.parametrize(("name", "read"), [("1.tif", read_image), ("1", read_image), ("1", rejection_reason)])
def test_an_error_of_the_disk_is_none_of_the_format(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, read: Callable[[Path], Any]
) -> None:
    """Pillow mistakes a read error in the directory of a TIFF file for corruption, and says it is not an image."""
    path = tmp_path / name
    path.write_bytes(tiff(100, 100, [bytes(30000)], [8] * 3, 2))
    assert rejection_reason(path) is None
    monkeypatch.setattr(Path, "open", lambda path, mode: BadDisk(path, mode))
    with pytest.raises(SystemFault, match=rf"{name}: cannot be read \(Input/output error\)"):
        read(path)


def test_an_image_that_points_outside_of_itself_is_refused_alone(tmp_path: Path) -> None:
    """Seeking to a negative place is an error of the operating system."""
    content = bytearray(tiff(4, 4, [bytes(48)], [8] * 3, 2))
    content[4:8] = (0xFFFFFFFF).to_bytes(4, "little")
    for bits in (b"MM\0\x2b\0\x08\0\0" + (2**63).to_bytes(8), bytes(content)):  # BigTIFF, TIFF
        (tmp_path / "a.tif").write_bytes(bits)
        with pytest.raises(Unreadable):
            read_image(tmp_path / "a.tif")


def test_what_is_no_file_is_refused_without_waiting(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.png")
    for path in (tmp_path / "pipe.png", tmp_path):
        with pytest.raises(Unreadable, match=r"^not a file$"):
            read_image(path)
