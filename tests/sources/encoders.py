"""Image files and ICC profiles written by hand, from their specifications, where Pillow cannot write them."""

import struct
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
from numpy.typing import NDArray

WHITE_D50 = (0.9642, 1.0, 0.8249)
# Linear RGB to XYZ relative to D50 (Bradford-adapted), from the definitions of the spaces.
SRGB = np.array([[0.4361, 0.3851, 0.1431], [0.2225, 0.7169, 0.0606], [0.0139, 0.0971, 0.7141]])
DISPLAY_P3 = np.array([[0.5151, 0.2920, 0.1571], [0.2412, 0.6922, 0.0666], [-0.0011, 0.0419, 0.7841]])
ADOBE_RGB = np.array([[0.6097, 0.2053, 0.1492], [0.3111, 0.6257, 0.0632], [0.0195, 0.0609, 0.7446]])

Tag = tuple[int, Sequence[int]]
"""TIFF type (1 byte, 3 short, 4 long) and values."""


def tiff(
    width: int,
    height: int,
    strips: Sequence[bytes],
    bits: Sequence[int],
    photometric: int,
    tags: Mapping[int, Tag] | None = None,
    order: str = "<",
    child: tuple[int, int] | None = None,
) -> bytes:
    """An uncompressed TIFF file, little-endian ("<") or big-endian (">").

    `strips`: one for the whole picture, or one for each channel (planar). `child`: width and height of a sub-image
    (SubIFDs) without pixels.
    """
    entries: dict[int, Tag] = {
        256: (4, [width]), 257: (4, [height]), 258: (3, bits), 259: (3, [1]), 262: (3, [photometric]),
        277: (3, [len(bits)]), 278: (4, [height]), 279: (4, [len(strip) for strip in strips]),
        284: (3, [2 if len(strips) > 1 else 1]),
    }  # fmt: skip
    content = b"".join(strips)
    offsets = np.cumsum([8, *map(len, strips)])
    entries[273] = (4, offsets[:-1].tolist())
    if child:
        content += b"\0" * (len(content) % 2)
        entries[330] = (4, [8 + len(content)])
        content += _directory({256: (4, [child[0]]), 257: (4, [child[1]])}, 8 + len(content), order)
    content += b"\0" * (len(content) % 2)
    start = 8 + len(content)
    header = (b"II" if order == "<" else b"MM") + struct.pack(f"{order}HI", 42, start)
    return header + content + _directory(entries | dict(tags or {}), start, order)


def _directory(entries: Mapping[int, Tag], start: int, order: str) -> bytes:
    table, values = struct.pack(f"{order}H", len(entries)), b""
    after = start + 2 + 12 * len(entries) + 4
    for tag, (kind, numbers) in sorted(entries.items()):
        content = struct.pack(f"{order}{len(numbers)}{ {1: 'B', 3: 'H', 4: 'I'}[kind] }", *numbers)
        table += struct.pack(f"{order}HHI", tag, kind, len(numbers))
        if len(content) > 4:
            table += struct.pack(f"{order}I", after + len(values))
            values += content + b"\0" * (len(content) % 2)
        else:
            table += content.ljust(4, b"\0")
    return table + bytes(4) + values


def png(width: int, height: int, bits: int, colour: int, rows: Sequence[bytes], chunks: Mapping[bytes, bytes]) -> bytes:
    """A PNG file. `colour`: 0 grey, 2 RGB, 3 palette, 4 grey with alpha. `chunks` come before the pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    parts = [(b"IHDR", struct.pack(">IIBBBBB", width, height, bits, colour, 0, 0, 0)), *chunks.items()]
    parts += [(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


def packed(values: NDArray[np.integer], bits: int) -> bytes:
    """One row of values of 1, 2, 4 or 12 bits, the first in the highest bits, filled up to a byte."""
    digits = "".join(format(int(value), f"0{bits}b") for value in values)
    digits += "0" * (-len(digits) % 8)
    return int(digits, 2).to_bytes(len(digits) // 8)


def matrix_profile(to_xyz: NDArray[np.float64], gamma: float) -> bytes:
    """An ICC profile of an RGB space: XYZ (D50) = to_xyz @ value ** gamma."""
    tags = {name: _xyz(*column) for name, column in zip((b"rXYZ", b"gXYZ", b"bXYZ"), to_xyz.T, strict=True)}
    return _profile(b"RGB ", b"XYZ ", tags | dict.fromkeys((b"rTRC", b"gTRC", b"bTRC"), _curve(gamma)))


def grey_profile(gamma: float) -> bytes:
    return _profile(b"GRAY", b"XYZ ", {b"kTRC": _curve(gamma)})


def cmyk_profile(corners: NDArray[np.float64]) -> bytes:
    """An ICC profile of inks: L*a*b* by multilinear interpolation between `corners` (2, 2, 2, 2, 3), without curves."""
    encoded = np.stack([corners[..., 0] * 2.55, corners[..., 1] + 128, corners[..., 2] + 128], -1)
    ramp = bytes(range(256))
    table = b"mft1" + bytes(4) + bytes([4, 3, 2, 0]) + b"".join(map(_fixed, np.eye(3).ravel().tolist()))
    return _profile(
        b"CMYK", b"Lab ", {b"A2B0": table + ramp * 4 + encoded.round().astype(np.uint8).tobytes() + ramp * 3}
    )


def _fixed(value: float) -> bytes:
    return struct.pack(">i", round(value * 65536))


def _xyz(*values: float) -> bytes:
    return b"XYZ " + bytes(4) + b"".join(map(_fixed, values))


def _curve(gamma: float) -> bytes:
    return b"curv" + bytes(4) + struct.pack(">IH", 1, round(gamma * 256))


def _profile(space: bytes, connection: bytes, tags: Mapping[bytes, bytes]) -> bytes:
    """A profile of version 2.4 whose rendering intent is relative colorimetric: colours as the tags say."""
    tags = {b"wtpt": _xyz(*WHITE_D50), **tags}
    table, body, start = struct.pack(">I", len(tags)), b"", 128 + 4 + 12 * len(tags)
    for name, content in tags.items():
        table += name + struct.pack(">II", start + len(body), len(content))
        body += content + bytes(-len(content) % 4)
    kind = b"prtr" if space == b"CMYK" else b"mntr"
    header = bytes(4) + b"\x02\x40\0\0" + kind + space + connection + bytes(12) + b"acsp" + bytes(24)
    header += struct.pack(">I", 1)
    header += b"".join(map(_fixed, WHITE_D50))
    return (struct.pack(">I", start + len(body)) + header).ljust(128, b"\0") + table + body


def to_srgb(rgb: NDArray[np.uint8], to_xyz: NDArray[np.float64], gamma: float) -> NDArray[np.float64]:
    """What uint8 (..., 3) of an RGB space is in sRGB, 0..255 (IEC 61966-2-1)."""
    return encoded((rgb / 255.0) ** gamma @ to_xyz.T)


def encoded(xyz: NDArray[np.float64]) -> NDArray[np.float64]:
    """XYZ relative to D50 (..., 3) as sRGB, 0..255."""
    linear = np.clip(xyz @ np.linalg.inv(SRGB).T, 0, 1)
    return 255 * np.where(linear <= 0.0031308, 12.92 * linear, 1.055 * linear ** (1 / 2.4) - 0.055)


def lab_to_xyz(lab: NDArray[np.float64]) -> NDArray[np.float64]:
    """CIE L*a*b* relative to D50 (..., 3) as XYZ."""
    y = (lab[..., 0] + 16) / 116
    f = np.stack([y + lab[..., 1] / 500, y, y - lab[..., 2] / 200], -1)
    return np.where(f > 6 / 29, f**3, 3 * (6 / 29) ** 2 * (f - 4 / 29)) * np.array(WHITE_D50)
