"""Decoding of image files, against pixels that are known independently of the decoder."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diffusion.sources.images import Unreadable, digest, read_image
from tests.sources.encoders import packed, png, tiff
from tests.sources.pixels import BYTES, DEEP, PALETTE, RNG, H, W, differ, from_ycbcr, rgba, save, upright

CASES = Path(__file__).parent / "cases" / "images"
EXPECTED = np.load(CASES / "expected.npz")
REFUSED = {"f.pfm": "32 bits have no known black and white", "lab.tif": r"8-bit L\*a\*b\* pixels"}


def test_every_case_is_there() -> None:
    assert {path.name for path in (CASES / "files").iterdir()} == set(EXPECTED.files)
    assert len(EXPECTED.files) == 48


@pytest.mark.parametrize("name", sorted(EXPECTED.files))
def test_cases(name: str) -> None:
    path = CASES / "files" / name
    if name in REFUSED:
        with pytest.raises(Unreadable, match=REFUSED[name]):
            read_image(path)
        return
    picture = read_image(path)
    assert differ(picture.image, EXPECTED[name]) <= (8 if name.startswith("icc_") else 3)
    assert picture.several == name.startswith("anim.")
    assert picture.warnings == ()
    assert type(picture.image) is Image.Image
    assert picture.image.info == {}


def pictures() -> dict[str, tuple[Image.Image, NDArray[Any]]]:
    """A picture in each of Pillow's modes, and its pixels by arithmetic."""
    grey, colour = BYTES[..., 0], BYTES[..., :3]
    palette = Image.fromarray(grey)
    palette.putpalette(PALETTE.tobytes())
    inks = BYTES.astype(int)
    luma = Image.fromarray(colour, mode="YCbCr")
    return {
        "1": (Image.fromarray(grey > 127), np.where(grey > 127, 255, 0)),
        "L": (Image.fromarray(grey), grey),
        "LA": (Image.fromarray(BYTES[..., :2]), BYTES[..., [0, 0, 0, 1]]),
        "P": (palette, PALETTE[grey]),
        "RGB": (Image.fromarray(colour), colour),
        "RGBA": (Image.fromarray(BYTES), BYTES),
        "CMYK": (Image.fromarray(BYTES, mode="CMYK"), (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255),
        "YCbCr": (luma, from_ycbcr(colour)),
        "I;16": (Image.fromarray(DEEP), DEEP / 257),
    }


CONTAINERS = {
    ".tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"),
    ".png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    ".webp": ("RGB", "RGBA"),
}
COMPRESSIONS = [None, "packbits", "tiff_lzw", "tiff_adobe_deflate"]
FILES = [(kind, mode, c) for kind, modes in CONTAINERS.items() for mode in modes for c in COMPRESSIONS]


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "mode", "compression"), [f for f in FILES if f[0] == ".tif" or f[2] is None])
def test_every_mode_is_turned_upright(
    tmp_path: Path, kind: str, mode: str, compression: str | None, orientation: int
) -> None:
    image, expected = pictures()[mode]
    exif = Image.Exif()
    exif[0x0112] = orientation
    options: dict[str, Any] = {".tif": {"compression": compression}, ".webp": {"lossless": True, "exact": True}}
    path = tmp_path / f"a{kind}"
    image.save(path, exif=exif, **options.get(kind, {}))
    picture = read_image(path)
    assert picture.mode in (mode, "RGB" if mode == "YCbCr" else mode)
    assert differ(picture.image, upright(expected, orientation)) <= 1


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(
    ("kind", "mode"), [(kind, mode) for kind in (".jpg", ".tif") for mode in ("L", "RGB", "CMYK")] + [(".avif", "RGB")]
)
def test_lossy_files_are_turned_upright(tmp_path: Path, kind: str, mode: str, orientation: int) -> None:
    ramp = (np.arange(H)[:, None] * 12 + np.arange(W) * 3).astype(np.uint8)
    stored = np.stack([ramp] * {"L": 1, "RGB": 3, "CMYK": 4}[mode], axis=-1)
    if mode == "CMYK":
        stored[..., 3] = 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = Image.frombytes(mode, (W, H), stored.tobytes())
    options = {"compression": "jpeg"} if kind == ".tif" else {}
    image.save(tmp_path / f"a{kind}", quality=100, exif=exif, **options)
    expected = 255 - stored[..., :3] if mode == "CMYK" else stored[..., 0]
    assert differ(read_image(tmp_path / f"a{kind}").image, upright(expected, orientation)) <= 3


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("photometric", [0, 1])
@pytest.mark.parametrize("bits", [1, 2, 4, 8, 12, 16])
def test_grey_tiff_files_of_every_depth(
    tmp_path: Path, bits: int, photometric: int, order: str, orientation: int
) -> None:
    values = DEEP >> (16 - bits)
    strip = values.astype(f"{order}u2").tobytes() if bits == 16 else b"".join(packed(row, bits) for row in values)
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(W, H, [strip], [bits], photometric, {274: (3, [orientation])}, order))
    share = values / (2**bits - 1)
    expected = 255 * (1 - share if photometric == 0 else share)
    if (bits, photometric, order) in {(12, 0, "<"), (12, 0, ">"), (12, 1, ">"), (16, 0, ">")}:
        with pytest.raises(Unreadable, match="of a kind that Pillow cannot read"):
            read_image(path)
    else:
        assert differ(read_image(path).image, upright(expected, orientation)) <= 1


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("compression", [None, "tiff_lzw", "tiff_adobe_deflate"])
def test_compressed_white_is_zero(tmp_path: Path, order: str, compression: str | None) -> None:
    path = tmp_path / "a.tif"
    image = Image.frombytes("I;16" if order == "<" else "I;16B", (W, H), DEEP.astype(f"{order}u2").tobytes())
    image.save(path, compression=compression, tiffinfo={262: 0})
    if path.read_bytes()[:2] == b"MM":
        with pytest.raises(Unreadable, match="of a kind that Pillow cannot read"):
            read_image(path)
    else:
        assert differ(read_image(path).image, 255 - DEEP / 257) <= 1


@pytest.mark.parametrize("order", ["<", ">"])
def test_premultiplied_colour_is_divided_by_alpha(tmp_path: Path, order: str) -> None:
    alpha = np.maximum(BYTES[..., 3:], 128)
    colour = BYTES[..., :3] / 255 * alpha
    for channels, photometric in ((1, 1), (3, 2)):
        stored = np.concatenate([colour[..., :channels].round(), alpha], axis=2).astype(np.uint8)
        path = tmp_path / f"{channels}.tif"
        content = tiff(W, H, [stored.tobytes()], [8] * (channels + 1), photometric, {338: (3, [1])}, order)
        path.write_bytes(content)
        expected = np.concatenate([BYTES[..., [0] * 3] if channels == 1 else BYTES[..., :3], alpha], axis=2)
        assert differ(read_image(path).image, expected) <= 2


@pytest.mark.parametrize("orientation", range(1, 9))
def test_strips_and_bilevel_compression(tmp_path: Path, orientation: int) -> None:
    path, rows = tmp_path / "a.tif", 5
    strips = [BYTES[top : top + rows, :, 0].tobytes() for top in range(0, H, rows)]
    tags = {278: (4, [rows]), 279: (4, [*map(len, strips)]), 273: (4, [8, 8 + rows * W, 8 + 2 * rows * W])}
    path.write_bytes(tiff(W, H, [b"".join(strips)], [8], 1, tags | {274: (3, [orientation])}))
    assert differ(read_image(path).image, upright(BYTES[..., 0], orientation)) == 0
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(BYTES[..., 0] > 127).save(path, compression="group4", exif=exif)
    assert differ(read_image(path).image, upright(np.where(BYTES[..., 0] > 127, 255, 0), orientation)) == 0


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize(
    ("depth", "channels", "photometric"), [(8, 3, 2), (16, 3, 2), (8, 4, 2), (8, 4, 5), (16, 4, 2)]
)
def test_channels_stored_apart(tmp_path: Path, depth: int, channels: int, photometric: int, order: str) -> None:
    stored = BYTES[..., :channels] if depth == 8 else (BYTES[..., :channels].astype(np.uint16) * 257)
    planes = [stored[..., channel].astype(f"{order}u{depth // 8}").tobytes() for channel in range(channels)]
    tags = {274: (3, [6])} | ({338: (3, [2])} if (channels, photometric) == (4, 2) else {})
    (tmp_path / "a.tif").write_bytes(tiff(W, H, planes, [depth] * channels, photometric, tags, order))
    expected = pictures()["CMYK"][1] if photometric == 5 else BYTES[..., :channels]
    assert differ(read_image(tmp_path / "a.tif").image, upright(expected, 6)) <= 1


@pytest.mark.parametrize("tags", [{}, {530: (3, [2, 2])}])
def test_uncompressed_subsampled_colour(tmp_path: Path, tags: dict[int, Any]) -> None:
    luma = BYTES[..., 0]
    cb, cr = (BYTES[: H // 2, : W // 2, channel] // 4 + 96 for channel in (1, 2))
    blocks = luma.reshape(H // 2, 2, W // 2, 2).swapaxes(1, 2).reshape(H // 2, W // 2, 4)
    strip = np.concatenate([blocks, cb[..., None], cr[..., None]], axis=2).astype(np.uint8).tobytes()
    (tmp_path / "a.tif").write_bytes(tiff(W, H, [strip], [8] * 3, 6, tags))
    colour = np.stack([luma, cb.repeat(2, 0).repeat(2, 1), cr.repeat(2, 0).repeat(2, 1)], axis=-1)
    assert differ(read_image(tmp_path / "a.tif").image, from_ycbcr(colour)) <= 1


@pytest.mark.parametrize("bits", [1, 2, 4, 8, 16])
def test_transparent_grey_of_every_depth(tmp_path: Path, bits: int) -> None:
    values = DEEP >> (16 - bits)
    rows = [row.astype(">u2").tobytes() if bits == 16 else packed(row, bits) for row in values]
    transparent = int(values[3, 5])
    path = tmp_path / "a.png"
    path.write_bytes(png(W, H, bits, 0, rows, {b"tRNS": transparent.to_bytes(2)}))
    expected = rgba((values.astype(float) * 255 / (2**bits - 1)).round())
    expected[values == transparent, 3] = 0
    assert 0 < (values == transparent).sum() < values.size
    assert differ(read_image(path).image, expected) <= 1


def test_other_transparent_pixels(tmp_path: Path) -> None:
    colour = BYTES[..., :3]
    clear = rgba(colour)
    clear[2, 3, 3] = 0
    rows = [row.tobytes() for row in colour]
    transparent = b"".join(int(value).to_bytes(2) for value in colour[2, 3])
    (tmp_path / "rgb.png").write_bytes(png(W, H, 8, 2, rows, {b"tRNS": transparent}))
    assert differ(read_image(tmp_path / "rgb.png").image, clear) == 0
    alphas = RNG.integers(0, 256, 16, dtype=np.uint8)
    for bits in (1, 2, 4, 8):
        values = BYTES[..., 0] >> (8 - bits)
        chunks = {b"PLTE": PALETTE[: 2**bits].tobytes(), b"tRNS": alphas[: 2**bits].tobytes()}
        path = tmp_path / f"p{bits}.png"
        path.write_bytes(png(W, H, bits, 3, [packed(row, bits) for row in values], chunks))
        opacity = np.concatenate([alphas, np.full(240, 255)])
        assert differ(read_image(path).image, np.dstack([PALETTE[values], opacity[values]])) == 0
    deep = np.dstack([DEEP, DEEP[::-1]]).astype(">u2")
    (tmp_path / "la16.png").write_bytes(png(W, H, 16, 4, [row.tobytes() for row in deep], {}))
    expected = np.dstack([DEEP / 257] * 3 + [DEEP[::-1] / 257])
    assert differ(read_image(tmp_path / "la16.png").image, expected) <= 1


def test_the_first_of_several_is_taken(tmp_path: Path) -> None:
    first, second = (Image.new("RGB", (W, H), colour) for colour in ("#ff0000", "#0000ff"))
    for name in ("a.gif", "a.png", "a.webp", "a.tif", "a.avif"):
        options = {"quality": 100} if name.endswith("avif") else {}
        save(tmp_path / name, first, save_all=True, append_images=[second], **options)
        picture = read_image(tmp_path / name)
        assert picture.several, name
        assert differ(picture.image, np.asarray(first)) <= 3
    save(tmp_path / "one.gif", first)
    assert not read_image(tmp_path / "one.gif").several


def test_a_decoders_warnings_come_with_the_picture(tmp_path: Path) -> None:
    path = tmp_path / "a.tif"
    path.write_bytes(tiff(W, H, [BYTES[..., :3].tobytes()], [8] * 3, 2, {274: (3, [1, 1])}))
    picture = read_image(path)
    assert picture.warnings == ("Metadata Warning, tag 274 had too many entries: 2, expected 1",)
    assert differ(picture.image, BYTES[..., :3]) == 0


def test_the_digest_is_of_what_is_seen() -> None:
    image = Image.fromarray(BYTES)
    hidden, seen = BYTES.copy(), BYTES.copy()
    hidden[0, 0], seen[0, 1] = (1, 2, 3, 0), (1, 2, 3, 1)
    other = BYTES.copy()
    other[0, 0], other[0, 1] = (9, 9, 9, 0), (1, 2, 3, 1)
    assert digest(Image.fromarray(hidden)) != digest(image)
    hidden[0, 1] = (1, 2, 3, 1)
    assert digest(Image.fromarray(hidden)) == digest(Image.fromarray(other))
    grey = Image.fromarray(BYTES[..., 0])
    assert digest(grey) == digest(grey.convert("RGB")) == digest(grey.convert("RGBA"))
    assert digest(grey) != digest(grey.transpose(Image.Transpose.TRANSPOSE))
    assert digest(Image.new("L", (2, 3))) != digest(Image.new("L", (3, 2)))
    buffer = io.BytesIO()
    grey.save(buffer, "BMP")
    assert digest(Image.open(buffer)) == digest(grey)
