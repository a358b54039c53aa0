"""Image files to pixels: each kind of file against pixels that are known without the reader."""

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diffusion.data.images import Unreadable, digest, is_image, read_image
from tests.data.encoders import packed, png, tiff

CASES = Path(__file__).parent / "cases" / "images"
EXPECTED = np.load(CASES / "expected.npz")
REFUSED = {"f.pfm": "32 bits have no known black and white", "lab.tif": r"8-bit L\*a\*b\* pixels"}
W, H = 16, 12
RNG = np.random.default_rng(0)
DEEP = RNG.integers(0, 65536, (H, W)).astype(np.uint16)
BYTES = RNG.integers(0, 256, (H, W, 4), dtype=np.uint8)
PALETTE = RNG.integers(0, 256, (256, 3), dtype=np.uint8)


def rgba(pixels: NDArray[Any]) -> NDArray[np.int64]:
    """Grey, RGB or RGBA as RGBA."""
    pixels = np.asarray(pixels).astype(np.int64)
    if pixels.ndim == 2:
        pixels = np.repeat(pixels[..., None], 3, axis=2)
    if pixels.shape[2] == 3:
        pixels = np.concatenate([pixels, np.full_like(pixels[..., :1], 255)], axis=2)
    return pixels


def differ(image: Image.Image, expected: NDArray[Any]) -> int:
    """The largest difference in any channel; of colour, where it is visible."""
    assert image.mode in ("L", "RGB", "RGBA")
    found, wanted = rgba(np.asarray(image)), rgba(expected)
    assert found.shape == wanted.shape
    difference = np.abs(found - wanted)
    difference[..., :3][wanted[..., 3] == 0] = 0
    return int(difference.max())


def upright(pixels: NDArray[Any], orientation: int) -> NDArray[Any]:
    """Stored pixels as they are to be shown, by the table of the Exif standard: where row 0 and column 0 are."""
    rows = {1: "top", 2: "top", 3: "bottom", 4: "bottom"}
    columns = {1: "left", 2: "right", 3: "right", 4: "left"}
    if orientation in rows:
        pixels = pixels[::-1] if rows[orientation] == "bottom" else pixels
        return pixels[:, ::-1] if columns[orientation] == "right" else pixels
    pixels = pixels.swapaxes(0, 1)  # row 0 is a visual column
    pixels = pixels[:, ::-1] if orientation in (6, 7) else pixels  # row 0 is the right-hand side
    return pixels[::-1] if orientation in (7, 8) else pixels  # column 0 is the bottom


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
    y, cb, cr = np.moveaxis(colour.astype(float), -1, 0)
    jfif = np.stack([y + 1.402 * (cr - 128), y - 0.344136 * (cb - 128) - 0.714136 * (cr - 128), y + 1.772 * (cb - 128)])
    return {
        "1": (Image.fromarray(grey > 127), np.where(grey > 127, 255, 0)),
        "L": (Image.fromarray(grey), grey),
        "LA": (Image.fromarray(BYTES[..., :2]), BYTES[..., [0, 0, 0, 1]]),
        "P": (palette, PALETTE[grey]),
        "RGB": (Image.fromarray(colour), colour),
        "RGBA": (Image.fromarray(BYTES), BYTES),
        "CMYK": (Image.fromarray(BYTES, mode="CMYK"), (255 - inks[..., :3]) * (255 - inks[..., 3:]) / 255),
        "YCbCr": (luma, np.clip(np.moveaxis(jfif, 0, -1), 0, 255)),
        "I;16": (Image.fromarray(DEEP), DEEP / 257),
    }


CONTAINERS = {
    ".tif": ("1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I;16"),
    ".png": ("1", "L", "LA", "P", "RGB", "RGBA", "I;16"),
    ".webp": ("RGB", "RGBA"),
}
COMPRESSIONS = [None, "packbits", "tiff_lzw", "tiff_adobe_deflate"]
FILES = [(kind, mode, c) for kind, modes in CONTAINERS.items() for mode in modes for c in COMPRESSIONS]


@pytest.mark.filterwarnings("ignore:'mode' parameter is deprecated:DeprecationWarning")
@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize(("kind", "mode", "compression"), [f for f in FILES if f[0] == ".tif" or f[2] is None])
def test_every_mode_stands_upright(
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
def test_lossy_files_stand_upright(tmp_path: Path, kind: str, mode: str, orientation: int) -> None:
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


def test_channels_stored_apart(tmp_path: Path) -> None:
    planes = [BYTES[..., channel].tobytes() for channel in range(3)]
    (tmp_path / "a.tif").write_bytes(tiff(W, H, planes, [8] * 3, 2, {274: (3, [6])}))
    assert differ(read_image(tmp_path / "a.tif").image, upright(BYTES[..., :3], 6)) == 0


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


def save(path: Path, image: Image.Image, **options: Any) -> bytes:
    image.save(path, **options)
    return path.read_bytes()


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


def refused_files() -> dict[str, tuple[bytes, str]]:
    strip = BYTES[..., :3].tobytes()
    rgb16 = png(W, H, 16, 2, [row.tobytes() for row in DEEP.repeat(3, 1).astype(">u2")], {b"tRNS": bytes(6)})
    linear = {b"gAMA": (100000).to_bytes(4)}
    wide = {b"gAMA": (45455).to_bytes(4), b"cHRM": b"".join(n.to_bytes(4) for n in [31270, 32900, 68000, 32000] * 2)}
    rows = [row.tobytes() for row in BYTES[..., 0]]
    sub = {530: (3, [2, 2])}
    return {
        "photo.NEF": (tiff(W, H, [strip], [8] * 3, 2), "camera raw"),
        "photo.cr3": (b"anything", "camera raw"),
        "dng.tif": (tiff(W, H, [strip], [8] * 3, 2, {50706: (1, [1, 4, 0, 0])}), "camera raw"),
        "flag.tif": (tiff(W, H, [strip], [8] * 3, 2, {254: (4, [1])}), "its first page is the thumbnail of another"),
        "oldflag.tif": (tiff(W, H, [strip], [8] * 3, 2, {255: (3, [2])}), "its first page is the thumbnail"),
        "child.tif": (tiff(W, H, [strip], [8] * 3, 2, child=(4000, 3000)), "its first page is the thumbnail"),
        "signed.tif": (tiff(W, H, [strip[: W * H]], [8], 1, {339: (3, [2])}), "signed 8-bit"),
        "ycbcr.tif": (tiff(W, H, [strip], [8] * 3, 6, sub), "subsampled colour"),
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
