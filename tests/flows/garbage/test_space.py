"""Sizes of files with several links, against known sizes and du."""

import os
from pathlib import Path

from flows.garbage.space import Part, measure
from tests.flows.garbage.conftest import MB, disk_usage, write


def folders(*paths: Path) -> int:
    return sum(disk_usage(path) for path in paths)


def test_each_file_counts_once_and_is_freed_with_its_last_link() -> None:
    shared = write(Path("cache/shared"), 3 * MB)
    half = write(Path("cache/half"), MB)
    write(Path("cache/alone"), 2 * MB)
    for folder in ("one", "two"):
        Path("runs", folder).mkdir(parents=True)
        os.link(shared, Path("runs", folder, "shared"))
    os.link(half, "runs/one/half")
    write(Path("runs/one/own"), 5 * MB)
    write(Path("elsewhere/big"), 7 * MB)
    Path("runs/one/link").symlink_to(Path("elsewhere").absolute())
    Path("runs/two/link").symlink_to(Path("elsewhere/big").absolute())
    Path("runs/two/loop").symlink_to(Path("runs").absolute())

    cache, runs = Part("cache", [Path("cache")]), Part("runs", [Path("runs")])
    measure([cache, runs])
    assert cache.space.taken == disk_usage(Path("cache"))
    assert cache.space.taken + runs.space.taken == disk_usage(Path("cache"), Path("runs"))
    assert 6 * MB <= cache.space.taken < 7 * MB
    assert 5 * MB <= runs.space.taken < 6 * MB
    assert cache.space.freed == runs.space.freed == 0

    runs = Part("runs", [Path("runs/one"), Path("runs/two")], {Path("runs/one")})
    cache.going = [half]
    measure([cache, runs])
    assert (cache.space.freed, runs.space.freed // MB) == (MB, 5)  # shared: a link remains

    runs.going, cache.going = [Path("runs/one"), Path("runs/two")], [shared]
    measure([cache, runs])
    assert cache.space.freed == 3 * MB  # half: its link in the cache remains


def test_what_freeing_gains_is_what_du_says() -> None:
    write(Path("runs/one/a/b"), MB)
    write(Path("runs/two/c"), MB)
    os.link("runs/one/a/b", "runs/two/b")
    part = Part("runs", [Path("runs")], [Path("runs/two/b"), Path("runs/one")])
    measure([part])
    before = disk_usage(Path("runs"))
    for path in ("runs/two/b", "runs/one/a/b"):
        Path(path).unlink()
    Path("runs/one/a").rmdir()
    Path("runs/one").rmdir()
    assert part.space.freed == before - disk_usage(Path("runs")) > MB


def test_what_is_not_there_takes_nothing() -> None:
    part = Part("runs", [Path("absent")], [Path("absent/more")])
    measure([part])
    assert (part.space.taken, part.space.freed) == (0, 0)
