"""Images given to `ddpm sample` are read as those of data/raw are."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.errors import UserError
from flows.commands.pictures import read_image

CASES = Path(__file__).parents[2] / "sources" / "cases" / "images"
EXPECTED = np.load(CASES / "expected.npz")


@pytest.mark.parametrize(
    "name", ["g16_exif6.tif", "g16_trns.png", "w0_16.tif", "icc_adobe.png", "exif6.tif", "cmyk.jpg"]
)
def test_pixels_are_right(name: str) -> None:
    found, expected = np.asarray(read_image(CASES / "files" / name)).astype(int), EXPECTED[name].astype(int)
    visible = expected[..., 3:] > 0 if expected.shape[2:] == (4,) else np.bool_(True)
    assert found.shape == expected.shape
    assert np.abs((found - expected) * visible).max() <= 3


def test_one_frame_of_several_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    frames = [Image.new("L", (4, 4), value) for value in (0, 255)]
    frames[0].save(tmp_path / "a.gif", save_all=True, append_images=frames[1:])
    assert not np.asarray(read_image(tmp_path / "a.gif")).any()
    assert capsys.readouterr().err == f"sample: {tmp_path}/a.gif has several pages or frames; the first is used\n"


def test_what_cannot_be_read_is_an_error_that_names_it(tmp_path: Path) -> None:
    (tmp_path / "a.nef").write_bytes((CASES / "files" / "g16.tif").read_bytes())
    with pytest.raises(UserError, match=r"a\.nef: not a readable image \(camera raw; develop it"):
        read_image(tmp_path / "a.nef")
