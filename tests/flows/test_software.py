"""Comparing the installed packages with a lock file."""

from importlib.metadata import version
from pathlib import Path

from flows import software

ROOT = Path(__file__).parents[2]


def test_what_differs_is_named(tmp_path: Path) -> None:
    lock = tmp_path / "requirements.lock"
    numpy = version("numpy")
    lock.write_text(f"# comment\nnumpy=={numpy}\nPillow==0.1\nnever-there==1.5\nabsent==1 ; sys_platform == 'none'\n")
    pillow = version("pillow")
    assert software.differences(lock) == [
        f"Pillow is {pillow} here, and 0.1 in requirements.lock",
        "never-there is missing here, and 1.5 in requirements.lock",
    ]


def test_a_build_for_one_kind_of_machine_is_the_same_version() -> None:
    """torch 2.13.0+cpu is 2.13.0."""
    assert software.differences(ROOT / "requirements.lock") == []
