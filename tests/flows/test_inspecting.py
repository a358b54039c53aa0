"""What `ddpm import` finds out about images."""

import io
import shutil
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import UserError
from diffusion.pairs.pixels import Fit
from diffusion.sources.reading import Reading
from diffusion.sources.sources import open_source
from flows.inspecting import Findings, contact_sheet, look_at

SAME, MIXED = [(8, 6)] * 3, [(640, 480), (50, 70), (41, 90)]


@pytest.mark.parametrize(
    ("sizes", "side", "right"),
    [
        (SAME, None, (6, 8)),
        (SAME, 16, (16, 16)),
        ([(64, 64)] * 2, None, (64, 64)),
        ([(65, 64)] * 2, None, (64, 64)),
        (MIXED, None, (48, 48)),  # the median of the shorter sides is 50
        ([(640, 480), (1000, 700)], None, (64, 64)),
        ([(5, 9), (9, 5)], None, (8, 8)),
    ],
)
def test_the_size_is_that_of_all_images_or_enlarges_few(
    sizes: list[tuple[int, int]], side: int | None, right: tuple[int, int]
) -> None:
    assert Findings(sizes, colour=False, classes=False).size(side) == right


def test_what_will_be_done_to_the_images_is_described() -> None:
    found = Findings(MIXED, colour=True, classes=True)
    assert found.describe(Fit(3, 48, 48)) == (
        "41 to 640 wide and 70 to 480 high, colour (3 images looked at); at 48x48, "
        "3 cropped by 36% of their area on average and 1 enlarged (pairs.resize: crop)"  # (1/4 + 2/7 + 49/90) / 3
    )
    assert found.describe(Fit(3, 48, 48, "stretch")).endswith("; at 48x48, 1 enlarged (pairs.resize: stretch)")
    assert found.parameters(48) == {
        "pairs": {"height": 48, "width": 48, "channels": 3}, "network": {"classes": True},
    }  # fmt: skip
    found = Findings(MIXED, colour=True, classes=True, rejected=("a.png: damaged", "b.png: damaged"))
    assert "colour (5 images looked at, of which 2 cannot be read, such as a.png: damaged); at 48x48" in found.describe(
        Fit(3, 48, 48)
    )
    found = Findings([(4000, 1), (1, 4000)], colour=False, classes=False)
    assert found.describe(Fit(1, 8, 8)) == (
        "1 to 4000 wide and 1 to 4000 high, greyscale (2 images looked at); at 8x8, "
        "2 cropped by over 99% of their area on average and 2 enlarged (pairs.resize: crop)"
    )
    found = Findings(SAME[:1], colour=False, classes=False)
    assert "(1 image looked at)" in found.describe(Fit(1, 6, 8))
    found = Findings(SAME, colour=False, classes=False)
    assert found.describe(Fit(1, 6, 8)) == "8x6, greyscale (3 images looked at); at 8x6, none is cropped or enlarged"
    assert found.parameters(None)["pairs"] == {"height": 6, "width": 8, "channels": 1}


def folder(path: Path, modes: list[str]) -> Path:
    path.mkdir()
    for number, mode in enumerate(modes):
        Image.new(mode, (4, 4), number if mode == "L" else (number, 0, 9)).save(path / f"{number:03}.png")
    return path


def test_some_images_are_looked_at_whatever_lies_between_them(tmp_path: Path) -> None:
    path = folder(tmp_path / "many", ["L", "RGB"] * 120)
    for image in list(path.iterdir()):
        image.with_suffix(".json").write_text("{}")
    found = look_at(open_source(path))
    assert len(found.sizes) == 100
    assert found.colour
    assert found == look_at(open_source(path))
    assert Image.open(io.BytesIO(contact_sheet(open_source(path), Fit(3, 4, 4)))).mode == "RGB"


@pytest.mark.parametrize(
    ("kind", "of"), [("zip", zipfile.ZipFile), ("tar", tarfile.TarFile), ("shard", tarfile.TarFile)]
)
def test_only_what_is_looked_at_is_read_from_an_archive(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, of: type
) -> None:
    path = folder(tmp_path / "many", ["L", "RGB"] * 60)
    if kind == "shard":
        for image in list(path.iterdir()):
            image.with_suffix(".cls").write_text(f"{int(image.stem) % 2}")
    archive = shutil.make_archive(str(tmp_path / "a"), kind.replace("shard", "tar"), path)
    source, opened = open_source(Path(archive)), list[Any]()
    name = "open" if kind == "zip" else "extractfile"
    original = getattr(of, name)
    monkeypatch.setattr(of, name, lambda self, member: (opened.append(member), original(self, member))[1])
    monkeypatch.setattr(of, "__init__", None)  # the archive is not opened again
    assert len(list(source)) == 120
    assert not opened
    found = look_at(source)
    assert len(found.sizes) == len(opened) == 100
    assert found == look_at(open_source(path))._replace(classes=kind == "shard")


def test_grey_images_in_colour_files_are_grey_and_one_class_is_none(tmp_path: Path) -> None:
    for number, mode in enumerate(("RGB", "LA", "RGBA", "L")):
        (tmp_path / "pictures" / "images").mkdir(parents=True, exist_ok=True)
        Image.new("LA", (4, 4), (number, 9)).convert(mode).save(tmp_path / "pictures" / "images" / f"{number}.png")
    source = open_source(tmp_path / "pictures")
    assert source.classes == ("images",)
    assert look_at(source) == Findings([(4, 4)] * 4, colour=False, classes=False, transparent=2)


def test_what_cannot_be_read_is_rejected(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path / "few", ["L", "L", "RGB"]))
    (tmp_path / "few" / "001.png").write_bytes(b"")
    reason = "001.png: not an image, or of a kind that Pillow cannot read"
    assert look_at(source) == Findings([(4, 4)] * 2, colour=True, classes=False, rejected=(reason,))


@pytest.mark.parametrize("name", ["000.png", "000.nef"])
def test_a_source_without_a_readable_image_is_refused(tmp_path: Path, name: str) -> None:
    (tmp_path / "few").mkdir()
    (tmp_path / "few" / name).write_bytes(b"")
    with pytest.raises(UserError, match=rf"^1 file, of which none can be read; the first: {name}: "):
        look_at(open_source(tmp_path / "few"))


def test_the_contact_sheet_shows_what_the_network_will_see(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path / "many", ["RGB"] * 30))
    sheet = np.asarray(Image.open(io.BytesIO(contact_sheet(source, Fit(3, 2, 2)))))
    colours = {tuple(colour) for colour in sheet.reshape(-1, 3).tolist()} - {(128, 128, 128)}
    assert len(colours) == 12
    assert colours < {(number, 0, 9) for number in range(30)}


def test_larger_images_than_allowed_are_not_looked_at(tmp_path: Path) -> None:
    Image.new("L", (4, 4)).save(tmp_path / "1.png")
    with pytest.raises(UserError, match=r"1 file, of which none can be read; .*more than shard\.max_pixels \(15\)"):
        look_at(open_source(tmp_path, Reading(max_pixels=15)))


def test_colour_is_what_is_seen(tmp_path: Path) -> None:
    image = Image.new("RGBA", (4, 4), (255, 0, 0, 0))
    image.putpixel((1, 1), (7, 7, 7, 255))
    image.save(tmp_path / "hidden.png")
    assert look_at(open_source(tmp_path)) == Findings([(4, 4)], colour=False, classes=False, transparent=1)
    assert look_at(open_source(tmp_path), "#204080").colour
