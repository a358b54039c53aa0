"""Decoding of image files to upright sRGB pixels. All image files are read here.

A file that cannot be decoded correctly raises Unreadable with the reason; nothing is guessed.
"""

import hashlib
import io
import re
import stat
import warnings
from collections.abc import Callable
from functools import lru_cache, partial
from pathlib import Path
from typing import IO, Literal, NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray
from PIL import ExifTags, Image, ImageCms, ImageOps, TiffImagePlugin, UnidentifiedImageError

from diffusion.errors import SystemFault
from diffusion.storage.files import reading

RAW = re.compile(
    r"\.(3fr|arw|cr2|cr3|crw|dcr|dng|erf|fff|gpr|iiq|kdc|mef|mos|mrw|nef|nrw|orf|pef|raf|raw|rw2|rwl|sr2|srf|srw|x3f)",
    re.IGNORECASE,
)
"""Suffixes of camera raw files, of which Pillow only reads the preview."""
NOT_DECODED = frozenset({"BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF"})
"""Formats that Pillow recognizes but does not decode itself. For EPS it would even run the PostScript program."""
RANGE_OF_16_BITS = frozenset({"PNG", "TIFF", "JPEG2000"})
"""Formats in which black is 0 and white 65535 in mode I;16; PPM has mode I instead."""
CAMERA_RAW = "camera raw; develop it to TIFF, PNG or JPEG first"
NO_IMAGE = "not an image, or of a kind that Pillow cannot read"
SRGB = ImageCms.createProfile("sRGB")
CLOSE_TO_SRGB = 2
"""Tolerance in grey levels (of 255): a profile that changes no colour by more is treated as sRGB, unconverted."""
PRIMARIES = (0.3127, 0.329, 0.64, 0.33, 0.3, 0.6, 0.15, 0.06)
"""Chromaticities (x, y) of white, red, green and blue in sRGB."""

# Also for uncompressed files: Pillow's own decoder gets 16-bit planes and subsampled colour wrong.
TiffImagePlugin.READ_LIBTIFF = True


class Unreadable(Exception):
    """An image cannot be used; the message is one line that does not name the file."""


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

    image: Image.Image
    """Upright, in sRGB, in mode L, RGB or RGBA with straight alpha."""
    mode: str
    """Pillow's mode of the file."""
    several: bool = False
    """Whether the file has more pages or frames than this first one."""
    warnings: tuple[str, ...] = ()
    """Warnings of the decoder, one line each."""


def read_image(path: File) -> Picture:
    """Decode an image file, the first page or frame if it has several.

    Raises:
        Unreadable: the file is not an image, or cannot be decoded correctly.
        SystemFault: the operating system cannot read the file.
    """
    if path.exists() and not path.is_file():
        raise Unreadable("not a file")  # reading a pipe would block
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("ignore")
            warnings.simplefilter("always", UserWarning)
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            picture = _read(path)
    except (MemoryError, SystemFault):
        raise
    except Exception as error:  # decoders raise arbitrary exceptions
        raise Unreadable(_reason(error)) from error
    return picture._replace(warnings=tuple(dict.fromkeys(_line(str(warning.message)) for warning in caught)))


def is_image(path: File) -> bool:
    """Whether a file claims to be an image by its suffix or content; it may still be corrupt or unsupported.

    Raises SystemFault if the operating system cannot read the file.
    """
    with reading(Path(str(path))):
        if path.suffix.lower() in _suffixes() or RAW.fullmatch(path.suffix):
            return not isinstance(path, Path) or stat.S_ISREG(path.stat().st_mode)
        try:
            with warnings.catch_warnings(action="ignore"), path.open("rb") as file:
                Image.open(file, formats=_formats())
                return True
        except Exception as error:  # as above
            if isinstance(error, OSError) and error.errno:
                raise
            return isinstance(error, Image.DecompressionBombError)


def raise_read_errors(file: IO[bytes]) -> None:
    """Read a file that Pillow rejects to the end, to raise read errors that Pillow mistakes for corruption."""
    while file.read(2**20):
        pass


def digest(image: Image.Image) -> int:
    """64-bit digest, equal for images of the same size with the same colour in all visible pixels."""
    pixels = np.array(image.convert("RGBA"))
    pixels[pixels[..., 3] == 0] = 0
    content = hashlib.blake2b(np.array(pixels.shape, "<u8").tobytes() + pixels.tobytes(), digest_size=8)
    return int.from_bytes(content.digest())


def _reason(error: Exception) -> str:
    if isinstance(error, UnidentifiedImageError):  # its message contains a memory address
        return NO_IMAGE
    return _line(str(error)) or type(error).__name__


def _line(text: str) -> str:
    return text.strip().split("\n")[0]


@lru_cache
def _formats() -> list[str]:
    Image.init()
    return sorted(Image.OPEN.keys() - NOT_DECODED)


@lru_cache
def _suffixes() -> set[str]:
    return {suffix for suffix, format in Image.registered_extensions().items() if format in _formats()}


def _read(path: File) -> Picture:
    if RAW.fullmatch(path.suffix):
        raise Unreadable(CAMERA_RAW)
    with reading(Path(str(path))), path.open("rb") as file:
        try:
            Image.open(file, formats=_formats())
        except Exception:
            raise_read_errors(file)
            raise
        file.seek(0)
        content = file.read()  # only images, never a video, are read into memory
    # Not by path: Pillow may memory-map an uncompressed file, and then scrambles rotated ones.
    with Image.open(io.BytesIO(content), formats=_formats()) as opened:
        mode = opened.mode
        several = opened.format != "PSD" and bool(getattr(opened, "is_animated", False))  # PSD has layers
        bits, negative = content[24] if opened.format == "PNG" else 8, False
        if isinstance(opened, TiffImagePlugin.TiffImageFile):
            _check_tiff(opened, content)
            bits = opened.tag_v2.get(258, (1,))[0]
            negative = mode.startswith("I;16") and opened.tag_v2.get(262, 0) == 0
        _check_colour(opened, content)
        opened.load()
        if opened.format == "PNG":
            _mend_transparency(opened, bits)
        image = ImageOps.exif_transpose(opened)
        profile = _profile(opened, content)
    if mode.startswith("I;16") or (mode == "I" and opened.format == "PPM"):
        if opened.format not in RANGE_OF_16_BITS | {"PPM"}:
            raise Unreadable(f"16-bit pixels in {opened.format}, whose black and white are not known")
        colour, alpha = _from_16_bits(image, 4095 if bits == 12 else 65535, negative)
    else:
        colour, alpha = _separate(image)
    return Picture(_join(_to_srgb(colour, profile, bits > 8), alpha), mode, several)


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


def _from_16_bits(image: Image.Image, white: int, negative: bool) -> tuple[Image.Image, Image.Image | None]:
    """Split 16-bit pixels into colour, in mode I;16 from 0 to 65535, and alpha."""
    values = np.asarray(image).astype(np.int64)
    transparent = image.info.get("transparency")
    alpha = None if transparent is None else Image.fromarray(np.where(values == transparent, 0, 255).astype(np.uint8))
    values = (values * 65535 + white // 2) // white
    return Image.fromarray((65535 - values if negative else values).astype(np.uint16)), alpha


def _separate(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Split an image into colour, in mode L, RGB or CMYK, and alpha."""
    if image.mode in ("La", "RGBa"):
        image = image.convert({"La": "LA", "RGBa": "RGBA"}[image.mode])
    grey = image.mode in ("1", "L", "LA")
    if image.has_transparency_data:
        image = image.convert("RGBA")
        return image.convert("L" if grey else "RGB"), image.getchannel("A")
    if image.mode in ("L", "RGB", "CMYK"):
        return image, None
    if image.mode in ("1", "P", "YCbCr", "HSV", "RGBX"):
        return image.convert("L" if grey else "RGB"), None
    if image.mode == "LAB":
        raise Unreadable(
            "8-bit L*a*b* pixels, which are too coarse for sRGB; convert it to sRGB with the program that made it"
        )
    raise Unreadable(f"mode {image.mode}: pixels of 32 bits have no known black and white")


def _to_srgb(colour: Image.Image, profile: bytes | None, deep: bool) -> Image.Image:
    """Convert colour to sRGB in mode L or RGB, 8 bits per channel. `deep`: whether the file has more bits."""
    grey = colour.mode in ("L", "I;16")
    if profile:
        colour = _as_described(colour, profile)
        if (convert := _conversion(profile, colour.mode)) is not None:
            if deep and colour.mode == "RGB" and _steepest(convert) > 6:
                raise Unreadable(
                    "16-bit pixels in a linear RGB space, of which only 8 bits are read; convert it to sRGB"
                )
            colour = convert(colour)
    return _eight_bits(colour).convert("L" if grey else "RGB")


def _as_described(colour: Image.Image, profile: bytes) -> Image.Image:
    """Convert colour to the mode that an ICC profile describes; raises Unreadable if they do not match."""
    try:
        space = ImageCms.ImageCmsProfile(io.BytesIO(profile)).profile.xcolor_space.strip()
    except OSError:
        raise Unreadable("a damaged ICC profile") from None
    if space == "RGB" and colour.mode in ("L", "I;16"):
        return _eight_bits(colour).convert("RGB")
    if space == "GRAY" and colour.mode == "RGB" and not np.ptp(np.asarray(colour), axis=2).any():
        return colour.convert("L")
    if {"GRAY": "L", "RGB": "RGB", "CMYK": "CMYK"}.get(space) != colour.mode.replace("I;16", "L"):
        raise Unreadable(f"its ICC profile is for {space} pixels, but it has {colour.mode} pixels")
    return colour


@lru_cache(maxsize=32)
def _conversion(profile: bytes, mode: str) -> Callable[[Image.Image], Image.Image] | None:
    """Conversion from an ICC profile to sRGB for pixels of a mode; None if the profile is practically sRGB."""
    try:
        source = ImageCms.ImageCmsProfile(io.BytesIO(profile))
        intent = ImageCms.Intent(source.profile.rendering_intent)
        # Little CMS's optimizations are only exact for matrix profiles; they lose 30 levels in dark linear grey.
        exact = mode != "RGB" or not source.profile.is_matrix_shaper
        flags = ImageCms.Flags.NOOPTIMIZE if exact else ImageCms.Flags.NONE
        transform = ImageCms.ImageCmsTransform(
            source, ImageCms.ImageCmsProfile(SRGB), mode, "RGB", intent=intent, flags=flags
        )
    except (OSError, ValueError):
        raise Unreadable("an ICC profile that cannot be applied") from None
    if mode == "CMYK":
        return transform.apply
    if mode == "RGB":
        steps = np.arange(0, 256, 15, dtype=np.uint8)
        probe = np.stack(np.meshgrid(steps, steps, steps), axis=-1).reshape(1, -1, 3)
        change = np.asarray(transform.apply(Image.fromarray(probe))).astype(int) - probe
        return transform.apply if np.abs(change).max() > CLOSE_TO_SRGB else None
    ramp = np.arange(256, dtype=np.uint8) if mode == "L" else np.arange(65536, dtype=np.uint16)
    table = np.asarray(transform.apply(Image.fromarray(ramp[None])).convert("L"))[0]
    change = table - ramp * (255 / ramp[-1])
    return partial(_by_table, table) if np.abs(change).max() > CLOSE_TO_SRGB else None


def _by_table(table: NDArray[np.uint8], image: Image.Image) -> Image.Image:
    return Image.fromarray(table[np.asarray(image)])


def _steepest(convert: Callable[[Image.Image], Image.Image]) -> int:
    """The largest output step between neighbouring 8-bit greys."""
    ramp = np.repeat(np.arange(256, dtype=np.uint8)[None, :, None], 3, axis=2)
    return int(np.diff(np.asarray(convert(Image.fromarray(ramp))).astype(int), axis=1).max())


def _eight_bits(colour: Image.Image) -> Image.Image:
    if colour.mode != "I;16":
        return colour
    return Image.fromarray(((np.asarray(colour).astype(np.int64) + 128) // 257).astype(np.uint8))


def _join(colour: Image.Image, alpha: Image.Image | None) -> Image.Image:
    if alpha is not None:
        colour = colour.convert("RGB")
        colour.putalpha(alpha)
    image = colour.copy()
    image.info = {}  # otherwise PNG files would contain profiles, dates and comments
    return image
