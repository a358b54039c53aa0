"""A short run of fuzz.py; the long one is a command of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests import fuzz

ROOT = Path(__file__).parents[1]


def test_no_damaged_data_set_breaks_a_reader() -> None:
    command = [sys.executable, str(ROOT / "tests" / "fuzz.py"), "--count", "40"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith(f"{40 * len(fuzz.KINDS)} inputs, 0 failures, ")


@pytest.mark.parametrize("name", fuzz.KINDS)
def test_the_undamaged_data_sets_are_read(name: str, tmp_path: Path) -> None:
    kind = fuzz.KINDS[name]
    found = fuzz.check(kind, kind.content, tmp_path / "data")
    assert found["kept"] > 0
    assert not found["refused"]
