"""PNG files as the shards store them."""

import io
import zlib

from PIL import Image

SIGNATURE = b"\x89PNG\r\n\x1a\n"
HEADER = b"\0\0\0\x0dIHDR"
"""Beginning of the first chunk."""
KINDS = {bytes((8, colour, 0, 0, 0)) for colour in (0, 2, 6)}
"""The rest of that chunk after the size: bit depth, colour (grey, RGB or RGBA), compression, filter, interlacing."""


def encode(image: Image.Image) -> bytes:
    """Encode an image as PNG, deterministically; with fast compression, since the images are small."""
    buffer = io.BytesIO()
    image.save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()


def is_plain(content: bytes) -> bool:
    """Whether a PNG file consists of nothing but pixels that need no conversion, so that it is stored as it is.

    They have 8 bits in mode L, RGB or RGBA and are not interlaced, nothing states colours, orientation or other facts,
    and all checksums are right, which Pillow does not check. Whether the pixels can be decoded is not checked.
    """
    if not content.startswith(SIGNATURE):
        return False
    view, kinds, place = memoryview(content), list[bytes](), len(SIGNATURE)
    while place < len(content):
        end = place + 12 + int.from_bytes(view[place : place + 4])
        kinds.append(content[place + 4 : place + 8])
        if zlib.crc32(view[place + 4 : end - 4]) != int.from_bytes(view[end - 4 : end]):
            return False
        place = end
    chunks = content[8:16] == HEADER and kinds[-1] == b"IEND" and set(kinds[1:-1]) == {b"IDAT"}
    return chunks and place == len(content) and content[24:29] in KINDS
