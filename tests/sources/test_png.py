"""PNG files that are stored as they are."""

import io
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, PngImagePlugin

from diffusion.sources.convert import _stored
from diffusion.sources.images import Picture, read_image
from diffusion.sources.png import encode, is_plain


def saved(mode: str, **options: object) -> bytes:
    buffer = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (40, 50, 4), dtype=np.uint8)
    Image.fromarray(pixels).convert(mode).save(buffer, "PNG", compress_level=9, **options)
    return buffer.getvalue()


def chunk(kind: bytes, content: bytes) -> bytes:
    return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))


def stored(content: bytes, path: Path) -> bytes:
    path.write_bytes(content)
    picture = read_image(path)
    found = _stored(picture)
    with Image.open(io.BytesIO(found.content["png"])) as image:
        assert (image.mode, image.tobytes()) == (picture.image.mode, picture.image.tobytes())
    return found.content["png"]


@pytest.mark.parametrize("mode", ["L", "RGB", "RGBA"])
def test_a_plain_file_is_stored_as_it_is(tmp_path: Path, mode: str) -> None:
    content = saved(mode)
    assert is_plain(content)
    assert stored(content, tmp_path / "x.png") == content
    start = content.index(b"IDAT") - 4
    parts = zlib.decompress(content[start + 8 : content.index(b"IEND") - 8])
    packed = zlib.compress(parts)
    several = content[:start] + chunk(b"IDAT", packed[:99]) + chunk(b"IDAT", packed[99:]) + content[-12:]
    assert stored(several, tmp_path / "y.png") == several


def text() -> PngImagePlugin.PngInfo:
    info = PngImagePlugin.PngInfo()
    info.add_text("Author", "somebody")
    return info


def with_chunk(kind: bytes, content: bytes = b"") -> bytes:
    plain = saved("RGB")
    return plain[:33] + chunk(kind, content) + plain[33:]


def with_header(place: int, value: int) -> bytes:
    plain = bytearray(saved("RGB"))
    plain[place] = value
    return bytes(plain[:8]) + chunk(b"IHDR", bytes(plain[16:29])) + bytes(plain[33:])


def wrong_checksum() -> bytes:
    content = bytearray(saved("RGB"))
    content[-13] ^= 1  # the last of IDAT's
    return bytes(content)


OTHERS = {
    "LA": saved("LA"),
    "P": saved("P"),
    "1": saved("1"),
    "I;16": encode(Image.fromarray(np.zeros((4, 5), np.uint16))),
    "text": saved("RGB", pnginfo=text()),
    "gamma": with_chunk(b"gAMA", struct.pack(">I", 45455)),
    "sRGB": with_chunk(b"sRGB", b"\0"),
    "transparent colour": saved("RGB", transparency=(1, 2, 3)),
    "orientation": saved("RGB", exif=b"Exif\0\0MM\0*\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01\0\x06\0\0\0\0\0\0"),
    "a wrong checksum": wrong_checksum(),
    "data after its end": saved("RGB") + b"x",
    "a JPEG's beginning": b"\xff\xd8" + saved("RGB"),
}


@pytest.mark.parametrize("name", OTHERS)
def test_any_other_file_is_not_plain(name: str, tmp_path: Path) -> None:
    assert not is_plain(OTHERS[name])
    if not name.startswith("a JPEG"):
        content = stored(OTHERS[name], tmp_path / "x.png")
        assert is_plain(content)
        assert content != OTHERS[name]


@pytest.mark.parametrize("content", [with_header(28, 1), with_header(25, 3), with_header(24, 16)])
def test_another_header_is_not_plain(content: bytes) -> None:
    assert not is_plain(content)


def test_every_damaged_file_is_not_plain() -> None:
    content = saved("L")
    assert not any(is_plain(content[:length]) for length in range(len(content)))
    for place in range(len(content)):
        damaged = bytearray(content)
        damaged[place] ^= 4
        assert not is_plain(bytes(damaged)), place


def test_pictures_from_arrays_are_encoded() -> None:
    found = _stored(Picture(Image.new("L", (3, 2)), "L"))
    assert found.content["png"] == encode(Image.new("L", (3, 2)))
