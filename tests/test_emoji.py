"""data/emoji.py: the npm package as an archive with labels."""

import importlib.util
import io
import json
import tarfile
from pathlib import Path

import pytest

from diffusion.sources.sources import open_source
from tests.fuzz import IMAGES

ROOT = Path(__file__).parents[1]
SPEC = importlib.util.spec_from_file_location("emoji", ROOT / "data" / "emoji.py")
assert SPEC
assert SPEC.loader
emoji = importlib.util.module_from_spec(SPEC)
SPEC.loader.exec_module(emoji)

FACTS = [
    {"image": "1.png", "category": "Animals & Nature"},
    {"image": "2.png", "category": "People, Body", "skin_variations": {"1F3FB": {"image": "3.png"}}},
]


def package(path: Path, files: dict[str, bytes]) -> Path:
    with tarfile.open(path, "w:gz") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def test_pictures_have_the_category_of_their_emoji(tmp_path: Path) -> None:
    pictures = {f"img/google/64/{number}.png": IMAGES["png"] for number in range(1, 5)}
    others = {"img/google/sheets/64.png": IMAGES["png"], "emoji.json": json.dumps(FACTS).encode()}
    source = package(tmp_path / "a.tgz", pictures | others)
    assert emoji.pack(source, tmp_path / "a.zip") == 4
    found = open_source(tmp_path / "a.zip")
    classes = {sample.file: sample.label for sample in found}
    assert found.classes == ("Animals & Nature", "People, Body")
    assert classes == {"1.png": 0, "2.png": 1, "3.png": 1, "4.png": None}
    emoji.pack(source, tmp_path / "b.zip")
    assert (tmp_path / "b.zip").read_bytes() == (tmp_path / "a.zip").read_bytes()


@pytest.mark.parametrize("content", [b"no archive", b"\x1f\x8b\x08\0cut", None])
def test_another_file_gets_one_line(
    tmp_path: Path, content: bytes | None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    source = package(tmp_path / "a.tgz", {"index.js": b""})
    if content:
        source.write_bytes(content)
    monkeypatch.setattr("sys.argv", ["emoji.py", str(source), str(tmp_path / "a.zip")])
    assert emoji.main() == 1
    assert capsys.readouterr().err.startswith(f"data/emoji.py: {source}: not the package emoji-datasource-google (")
