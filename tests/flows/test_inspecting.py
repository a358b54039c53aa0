"""What `ddpm import` finds out about images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import UserError
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
    assert found.describe(48, 48) == "41x70 to 640x480, colour (3 images looked at); at 48x48, 3 cropped and 1 enlarged"
    assert found.parameters(48) == {
        "pairs": {"height": 48, "width": 48, "channels": 3}, "network": {"classes": True},
    }  # fmt: skip
    found = Findings(SAME, colour=False, classes=False)
    assert found.describe(6, 8) == "8x6, greyscale (3 images looked at); at 8x6, none is cropped or enlarged"
    assert found.parameters(None)["pairs"] == {"height": 6, "width": 8, "channels": 1}


def folder(path: Path, modes: list[str]) -> Path:
    path.mkdir()
    for number, mode in enumerate(modes):
        Image.new(mode, (4, 4), number if mode == "L" else (number, 0, 9)).save(path / f"{number:03}.png")
    return path


def test_images_are_looked_at_evenly_without_those_that_cannot_be_read(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path / "many", ["L"] * 450 + ["RGB"]))
    assert len(look_at(source).sizes) == 113  # every fourth
    assert not look_at(source).colour
    source = open_source(folder(tmp_path / "few", ["L", "L", "RGB"]))
    (tmp_path / "few" / "001.png").write_bytes(b"")
    assert look_at(source) == Findings([(4, 4)] * 2, colour=True, classes=False)


def test_a_source_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path / "few", ["L", "L"]))
    for path in (tmp_path / "few").iterdir():
        path.write_bytes(b"")
    with pytest.raises(UserError, match=r"^none of the 2 images looked at can be read; the first: 000.png: not"):
        look_at(source)


def test_the_contact_sheet_shows_what_the_network_will_see(tmp_path: Path) -> None:
    source = open_source(folder(tmp_path / "many", ["RGB"] * 30))
    contact_sheet(source, {"channels": 3, "height": 2, "width": 2}, tmp_path / "sheets" / "many.png")
    sheet = np.asarray(Image.open(tmp_path / "sheets" / "many.png"))
    colours = {tuple(colour) for colour in sheet.reshape(-1, 3).tolist()} - {(128, 128, 128)}
    assert colours == {(number, 0, 9) for number in range(0, 24, 2)}  # the first twelve of every second
