"""benchmarks/reading.py: what it compares reads the same, and the command runs."""

import json
import subprocess
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests import command

ROOT = Path(__file__).parents[1]
pytestmark = [  # webdataset leaves files open
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def reading() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield import_module("reading")


@pytest.mark.parametrize("kind", ["shards", "pairs"])
def test_every_program_reads_each_item_once(reading: Any, pairs_tree: Path, kind: str) -> None:
    images, items = reading.count(kind, pairs_tree)
    assert items == (images if kind == "shards" else -(-images // 64))
    epochs = {name: program(kind, pairs_tree, images) for name, program in reading.PROGRAMS.items()}
    read = {name: list(epoch(0)) for name, epoch in epochs.items()}
    assert all(sorted(each) == list(range(items)) for each in read.values())
    assert read["memory map"] == read["tarfile"] != list(range(items))
    for name in ("memory map", "tarfile"):
        assert list(epochs[name](items // 2)) == read[name][items // 2 :]
    assert list(reading.by_webdataset(kind, pairs_tree, 1)(2)) == list(range(items))[2:]


@pytest.mark.parametrize("kind", ["shards", "pairs"])
def test_every_program_reads_the_same(
    reading: Any, pairs_tree: Path, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = dict[str, dict[int, Any]]()
    parse = reading.KINDS[kind].parse
    for name in ("tarfile", "webdataset"):
        seen = list[Any]()
        keeping = reading.KINDS[kind]._replace(parse=lambda sample, seen=seen: seen.append(parse(sample)) or True)
        monkeypatch.setitem(reading.KINDS, kind, keeping)
        found[name] = dict(zip(reading.PROGRAMS[name](kind, pairs_tree, 1)(0), seen, strict=True))
    if kind == "shards":
        folder = pairs_tree / "data" / "shards"
        stored = reading.Images(folder, reading.Manifest.read(folder / "manifest.json").splits["train"])
        found["memory map"] = {number: stored[number] for number in range(len(stored))}
    else:
        pairs = reading.Pairs(pairs_tree / "data" / "pairs", "train")
        found["memory map"] = {block: (pairs.x_0(block), pairs.labels(block)) for block in range(pairs.blocks)}
    for number, (image, label) in found["memory map"].items():
        for each in found.values():
            np.testing.assert_array_equal(np.asarray(each[number][0]), np.asarray(image))
            np.testing.assert_array_equal(each[number][1], label)


@pytest.mark.slow
def test_the_command(reading: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Each program is measured once in a process of its own, and otherwise, like the stages, in that of the tests."""
    processes, measured = subprocess.run, set[str]()

    def run(words: list[str], **options: Any) -> "subprocess.CompletedProcess[str]":
        if "flows" in words:
            done = command.ddpm(options["cwd"], words[-1], environment=options["env"])
            assert done.returncode == 0, done.stderr
            return done
        if "--measure" not in words:
            return processes(words, **options)
        kind, program, buffer, tree = words[-4:]
        if program not in measured:
            measured.add(program)
            return processes(words, **options)
        found = reading.measure(kind, program, int(buffer), Path(tree), 0.05)
        return subprocess.CompletedProcess(words, 0, json.dumps(found))

    monkeypatch.setattr(subprocess, "run", run)
    options = ("--images", "300", "--buffer", "100", "--rounds", "1", "--seconds", "0.05")
    monkeypatch.setattr(sys, "argv", ["reading.py", *options])
    reading.main()
    *table, line = capsys.readouterr().out.splitlines()
    rows = json.loads(line)["rows"]
    assert [(row["data"], row["program"], row["buffer"]) for row in rows] == [
        (data, program, buffer)
        for data in ("shards", "pairs")
        for program, buffer in (("memory map", 0), ("tarfile", 0), ("webdataset", 100), ("webdataset", 300))
    ]
    assert all(min(row["images_per_s"]) > 0 and min(row["cpu_us"]) > 0 for row in rows)
    assert [len(row.split("|")) for row in table] == [10] * len(rows)
