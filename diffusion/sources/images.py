"""Decoding of image files to upright sRGB pixels. All image files are read here.

A file that cannot be decoded correctly raises Unreadable with the reason; nothing is guessed.
"""

import errno
import hashlib
import io
import re
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import IO, Literal, NamedTuple, Protocol

import numpy as np
from PIL import ExifTags, Image, ImageOps, TiffImagePlugin, UnidentifiedImageError

from diffusion.errors import SystemFault
from diffusion.sources.bands import Bands
from diffusion.sources.colours import DEEP_GREY, from_16_bits, from_range, join, separate, to_srgb
from diffusion.sources.colours import Unreadable as Unreadable
from diffusion.sources.png import SIGNATURE, is_plain
from diffusion.sources.reading import DEFAULTS, Reading
from diffusion.storage.files import reading

RAW = re.compile(
    r"\.(3fr|arw|cr2|cr3|crw|dcr|dng|erf|fff|gpr|iiq|kdc|mef|mos|mrw|nef|nrw|orf|pef|raf|raw|rw2|rwl|sr2|srf|srw|x3f)",
    re.IGNORECASE,
)
"""Suffixes of camera raw files, of which Pillow only reads the preview."""
OTHERS = re.compile(r"\.(heic|heif|hif|jxl|jxr|svgz?|exr|psb|xcf|eps|wmf|emf)", re.IGNORECASE)
"""Suffixes of other pictures that Pillow does not read, unless a plugin of it does."""
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow recognizes but does not decode itself. For EPS it would even run the PostScript program."""
RANGE_OF_16_BITS = frozenset({"PNG", "TIFF", "JPEG2000"})
"""Formats in which black is 0 and white 65535 in mode I;16; PPM has mode I instead."""
CAMERA_RAW = "camera raw; develop it to TIFF, PNG or JPEG first"
NO_IMAGE = "not an image, or of a kind that Pillow cannot read"
OTHER_FILE = "not an image by its name or content"
THUMBNAIL = 96
"""Maximum side of a thumbnail."""
MAX_REDUCTION = 8
"""Maximum factor by which a JPEG file, which can be reduced while it is decoded, may exceed the maximum of pixels and
still get a thumbnail."""
PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""Chromaticities (x, y) of white, red, green and blue in sRGB."""

# Also for uncompressed files: Pillow's own decoder gets 16-bit planes and subsampled colour wrong.
TiffImagePlugin.READ_LIBTIFF = True


class File(Protocol):
    """A file on disk (a Path), or in an archive; its text names it in messages."""

    @property
    def name(self) -> str: ...

    @property
    def suffix(self) -> str: ...

    def open(self, mode: Literal["rb"]) -> IO[bytes]:
        """Open the file for reading; raises Unreadable if it cannot be read from its archive."""
        ...

    def exists(self) -> bool: ...

    def is_file(self) -> bool: ...


class Picture(NamedTuple):
    """One decoded image."""

    image: Image.Image | Bands
    """Upright, in sRGB, in mode L, RGB or RGBA with straight alpha; or separate channels."""
    mode: str
    """Pillow's mode of the file, or the type of an array."""
    several: bool = False
    """Whether the file has more pages or frames than this first one."""
    warnings: tuple[str, ...] = ()
    """Warnings of the decoder, one line each."""
    png: bytes | None = None
    """The file, if it is a PNG with these pixels and nothing else."""


def read_image(path: File, reading: Reading = DEFAULTS) -> Picture:
    """Decode an image file, the first page or frame if it has several.

    Raises:
        Unreadable: the file is not an image, is too large, or cannot be decoded correctly.
        SystemFault: the operating system cannot read the file.
    """
    if path.exists() and not path.is_file():
        raise Unreadable("not a file")  # reading a pipe would block
    try:
        with warnings.catch_warnings(record=True) as caught, pixel_limit(reading.max_pixels):
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = _read(path, reading.value_range)
    except (MemoryError, SystemFault):
        raise
    except Exception as error:  # decoders raise arbitrary exceptions
        raise Unreadable(_reason(error, reading.max_pixels), _thumbnail(path, reading.max_pixels)) from error
    return picture._replace(warnings=tuple(dict.fromkeys(_line(str(warning.message)) for warning in caught)))


def is_image(path: File) -> bool:
    """Whether a file claims to be an image by its suffix or content; it may still be corrupt or unsupported.

    Raises SystemFault if the operating system cannot read the file.
    """
    with _reading(path):
        if path.suffix.lower() in _suffixes() or unsupported(path.suffix):
            return not isinstance(path, Path) or stat.S_ISREG(path.stat().st_mode)
        try:
            with warnings.catch_warnings(action="ignore"), path.open("rb") as file:
                Image.open(file, formats=_formats())
                return True
        except Exception as error:  # as above
            if isinstance(error, OSError) and error.errno:
                raise
            return isinstance(error, Image.DecompressionBombError)


def unsupported(suffix: str) -> str | None:
    """Why pictures with such a suffix cannot be read; None for all other files."""
    if RAW.fullmatch(suffix):
        return CAMERA_RAW
    if OTHERS.fullmatch(suffix) and suffix.lower() not in _suffixes():
        return f"{suffix[1:].upper()}, which Pillow cannot read; convert it to PNG or JPEG"
    return None


@contextmanager
def pixel_limit(pixels: int | None) -> Iterator[None]:
    """Set Pillow's limit for a block. It is global, and also holds for images inside of others (ICO, GIF)."""
    before = Image.MAX_IMAGE_PIXELS
    Image.MAX_IMAGE_PIXELS = pixels
    try:
        yield
    finally:
        Image.MAX_IMAGE_PIXELS = before


@contextmanager
def _reading(path: File) -> Iterator[None]:
    """As `reading`, except for places outside of the file that a damaged image refers to."""
    with reading(path):
        try:
            yield
        except OSError as error:
            if error.errno == errno.EINVAL:
                raise OSError("damaged: it refers to a place outside of the file") from None
            raise


def raise_read_errors(file: IO[bytes]) -> None:
    """Read a file that Pillow rejects to the end, to raise read errors that Pillow mistakes for corruption."""
    while file.read(2**20):
        pass


def digest(image: Image.Image | Bands) -> int:
    """64-bit digest, equal for images of the same size with the same colour in all visible pixels."""
    pixels = image.pixels() if isinstance(image, Bands) else np.array(image.convert("RGBA"))
    content = hashlib.blake2b(np.array(pixels.shape, "<u8").data, digest_size=8)
    if image.mode == "RGBA":
        whole = pixels.view("<u4")
        whole[whole < 2**24] = 0  # alpha, the last byte, is 0
    content.update(pixels.data)
    return int.from_bytes(content.digest())


def _reason(error: Exception, max_pixels: int) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message contains a memory address
        return NO_IMAGE
    if isinstance(error, (Image.DecompressionBombWarning, Image.DecompressionBombError)):
        pixels = re.findall(r"\d+", str(error))[0]
        return f"{pixels} pixels, more than shard.max_pixels ({max_pixels}); increase it if the size is intended"
    return _line(str(error)) or ("truncated" if isinstance(error, EOFError) else type(error).__name__)


def _line(text: str) -> str:
    return text.strip().split("\n")[0]


@lru_cache
def _formats() -> list[str]:
    Image.init()
    # Pillow tries them in turn; the first are recognized by their first bytes alone, and are the most frequent ones.
    return ["PNG", "JPEG", *sorted(Image.OPEN.keys() - NOT_DECODED - {"PNG", "JPEG"})]


@lru_cache
def _suffixes() -> set[str]:
    return {suffix for suffix, format in Image.registered_extensions().items() if format in _formats()}


def _thumbnail(path: File, max_pixels: int) -> Image.Image | None:
    """A small picture of a file that cannot be used, as Pillow sees it; None if that fails, too."""
    with suppress(Exception), warnings.catch_warnings(), path.open("rb") as file:
        warnings.simplefilter("ignore")
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        jpeg = file.read(2) == b"\xff\xd8"
        file.seek(0)
        with pixel_limit(MAX_REDUCTION * max_pixels if jpeg else max_pixels):
            image = Image.open(file, formats=["JPEG"] if jpeg else _formats())
            if "progressive" not in image.info:  # such a JPEG file needs its whole size in memory
                image.draft("RGB", (THUMBNAIL, THUMBNAIL))
            if image.width * image.height <= max_pixels:
                image.thumbnail((THUMBNAIL, THUMBNAIL))
                return image.convert("RGB")
    return None


def _read(path: File, value_range: tuple[float, ...]) -> Picture:
    if reason := unsupported(path.suffix):
        raise Unreadable(reason)
    with _reading(path), path.open("rb") as file:
        if file.read(len(SIGNATURE)) != SIGNATURE:
            file.seek(0)
            try:
                Image.open(file, formats=_formats())
            except Exception:
                raise_read_errors(file)
                raise
        file.seek(0)
        content = file.read()  # only images, never a video, are read into memory
    if is_plain(content):  # the pixels need no conversion
        image = join(Image.open(io.BytesIO(content), formats=["PNG"]), None)
        return Picture(image, image.mode, png=content)
    # Not by path: Pillow may memory-map an uncompressed file, and then scrambles rotated ones.
    with Image.open(io.BytesIO(content), formats=_formats()) as opened:
        mode = opened.mode
        several = opened.format != "PSD" and bool(getattr(opened, "is_animated", False))  # PSD has layers
        bits, negative, unsigned = content[24] if opened.format == "PNG" else 8, False, False
        if isinstance(opened, TiffImagePlugin.TiffImageFile):
            _check_tiff(opened, content)
            bits = opened.tag_v2.get(258, (1,))[0]
            negative = mode in DEEP_GREY and opened.tag_v2.get(262, 0) == 0
            unsigned = mode == "I" and bits == 32 and opened.tag_v2.get(339, (1,))[0] == 1
        _check_colour(opened, content)
        opened.load()
        if opened.format == "PNG":
            _mend_transparency(opened, bits)
        image = ImageOps.exif_transpose(opened)
        profile = _profile(opened, content)
    if value_range and mode in DEEP_GREY:
        if content[:2] == b"MM" and mode in ("I", "F"):
            raise Unreadable("signed or 32-bit pixels in big-endian order, which Pillow misreads; save them otherwise")
        values = np.asarray(image).view(np.uint32) if unsigned else np.asarray(image)
        colour, alpha = from_range(values, image.info.get("transparency"), value_range, negative)
    elif mode.startswith("I;16") or (mode == "I" and opened.format == "PPM"):
        if opened.format not in RANGE_OF_16_BITS | {"PPM"}:
            raise Unreadable(f"16-bit pixels in {opened.format}, whose black and white are not known")
        colour, alpha = from_16_bits(image, 4095 if bits == 12 else 65535, negative)
    else:
        colour, alpha = separate(image)
    return Picture(join(to_srgb(colour, profile, bits > 8), alpha), mode, several)


def _check_tiff(image: TiffImagePlugin.TiffImageFile, content: bytes) -> None:
    """Raise Unreadable for TIFF files that Pillow misinterprets."""
    tags = image.tag_v2
    if 50706 in tags or content[8:10] == b"CR":  # DNGVersion; CR2's own mark
        raise Unreadable(CAMERA_RAW)
    if tags.get(254, 0) & 1 or tags.get(255) == 2 or _has_larger_child(image, content):
        raise Unreadable("its first page is the thumbnail of another (camera raw?); save that one by itself")
    if image.mode == "L" and max(tags.get(339, (1,))) == 2:
        raise Unreadable("signed 8-bit pixels, whose black and white are not known")
    if image.mode == "CMYK" and tags.get(332, 1) != 1:
        raise Unreadable("inks other than cyan, magenta, yellow and black")


def _has_larger_child(image: TiffImagePlugin.TiffImageFile, content: bytes) -> bool:
    """Whether a sub-image has more pixels than the first page; smaller ones are thumbnails and ignored."""
    offsets = image.tag_v2.get(330, ())
    for offset in offsets if isinstance(offsets, tuple) else (offsets,):
        child = TiffImagePlugin.ImageFileDirectory_v2(content[: 16 if 43 in content[2:4] else 8])
        file = io.BytesIO(content)
        file.seek(int(offset))
        child.load(file)
        if child.get(256, 0) * child.get(257, 0) > image.width * image.height:
            return True
    return False


def _check_colour(image: Image.Image, content: bytes) -> None:
    """Raise Unreadable for colour spaces that are neither sRGB nor described by an ICC profile."""
    info = image.info
    if image.format == "PNG" and b"cICP" in (head := content[: content.find(b"IDAT")]):
        start = head.index(b"cICP") + 4
        _check_code_points(head[start], head[start + 1])
    elif image.format == "AVIF" and "icc_profile" not in info and b"colrnclx" in content:
        start = content.index(b"colrnclx") + 8
        _check_code_points(content[start + 1], content[start + 3])
    elif image.format == "JPEG2000" and (start := content.find(b"colr\x01") + 7) > 6:
        if (space := int.from_bytes(content[start : start + 4])) not in (12, 16, 17, 18):
            raise Unreadable(f"colour space {space} of JPEG 2000; convert it to sRGB")  # not CMYK, sRGB, grey or sYCC
    elif image.format == "PNG" and not {"icc_profile", "srgb"} & info.keys():
        if not 0.43 <= info.get("gamma", 1 / 2.2) <= 0.48:
            raise Unreadable(f"gamma {info['gamma']:g} without an ICC profile; convert it to sRGB")
        if np.abs(np.subtract(info.get("chromaticity", PRIMARIES), PRIMARIES)).max() > 0.01:
            raise Unreadable("primaries other than those of sRGB without an ICC profile; convert it to sRGB")
    elif image.getexif().get_ifd(ExifTags.IFD.Interop).get(1) == "R03" and "icc_profile" not in info:
        raise Unreadable("Adobe RGB (by its EXIF data) without an ICC profile; convert it to sRGB")


def _check_code_points(primaries: int, transfer: int) -> None:
    """Raise Unreadable unless code points (ITU-T H.273) are BT.709's or unspecified."""
    if primaries not in (1, 2) or transfer not in (1, 2, 6, 13, 14, 15):
        raise Unreadable(f"colours of code points {primaries}/{transfer} (HDR?) without an ICC profile")


def _profile(image: Image.Image, content: bytes) -> bytes | None:
    if image.format == "JPEG2000" and (place := content.find(b"colr\x02")) >= 4:  # Pillow ignores it
        return content[place + 7 : place - 4 + int.from_bytes(content[place - 4 : place])]
    if image.info.get("icc_profile", b"") is None:
        raise Unreadable("a damaged ICC profile")
    return image.info.get("icc_profile")


def _mend_transparency(image: Image.Image, bits: int) -> None:
    """Scale the transparent colour of a PNG file from the file's bit depth to that of Pillow's pixels."""
    transparent = image.info.get("transparency")
    if transparent is None:
        return
    if image.mode == "L":
        image.info["transparency"] = transparent * 255 // (2**bits - 1)
    elif image.mode == "RGB" and bits == 16:
        raise Unreadable("16-bit RGB with a transparent colour, which Pillow cannot read; save it with alpha")
