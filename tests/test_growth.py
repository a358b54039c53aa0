"""The page on growth, and that what it says of memory and files holds."""

import json
import os
import sys
import tracemalloc
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from diffusion.errors import UserError
from diffusion.sources.shards import MANIFEST, Contents, Images, Manifest
from diffusion.storage import tar
from diffusion.storage.tar import Tar, Writer

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "growth.json"


@pytest.fixture(scope="module", name="page")
def load_page() -> Iterator[Any]:
    """The module that makes the tables; only scripts have its folder on their path."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield import_module("growing.page")


@pytest.fixture(scope="module", name="images")
def load_images() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "benchmarks")
        yield import_module("growing.images")


def test_the_tables_are_those_of_the_results(page: Any) -> None:
    text, results = (ROOT / "docs" / "growth.md").read_text(), json.loads(RESULTS.read_text())
    assert page.fill(text, results) == text
    assert text.count("<!-- end -->") == 4
    results["one_process"]["shard_us"] *= 2
    assert page.fill(text, results) != text


@pytest.mark.parametrize(
    ("seconds", "text"), [(2e-6, "2.0 µs"), (0.0123, "12 ms"), (90, "90 s"), (7200, "2.0 h"), (1e6, "12 d")]
)
def test_durations(page: Any, seconds: float, text: str) -> None:
    assert page._time(seconds) == text


@pytest.mark.parametrize(("count", "text"), [(67, "67 B"), (3210, "3.2 kB"), (4.1e12, "4.1 TB")])
def test_sizes(page: Any, count: float, text: str) -> None:
    assert page._bytes(count) == text


def test_a_manifest_of_10_to_the_8_images_is_read_without_work_for_each_shard(tmp_path: Path, images: Any) -> None:
    """The number of calls in Python does not depend on the number of shards."""

    def read(count: int) -> tuple[Manifest, int]:
        calls = 0

        def profile(_frame: object, event: str, _argument: object) -> None:
            nonlocal calls
            calls += event == "call"

        images.manifest(tmp_path, count, 10_000, 0)
        sys.setprofile(profile)
        try:
            return Manifest.read(tmp_path / MANIFEST), calls
        finally:
            sys.setprofile(None)

    _, few = read(10**5)
    manifest, many = read(10**8)
    shards = manifest.splits["train"].shards
    assert (len(shards), sum(shard.samples for shard in shards)) == (10_000, 10**8)
    assert shards[-1].name == "train-009999.tar"
    assert many == few


@pytest.fixture(name="many")
def many_shards(tmp_path: Path) -> Contents:
    """60 shards of 100 samples, which are all the same file."""
    with Writer(tmp_path, "train") as writer:
        for number in range(100):
            record = json.dumps({"label": number, "source": f"{number}.png"}).encode()
            writer.add(f"{number}", {"json": record, "png": b"-" * number})
    (first,) = writer.tars
    tars = [first.model_copy(update={"name": f"copy-{number:06d}.tar"}) for number in range(60)]
    for each in tars:
        os.link(tmp_path / first.name, tmp_path / each.name)
    return Contents(samples=6000, per_class=(), shards=tuple(tars))


def test_any_number_of_shards_needs_few_open_files_and_8_bytes_for_an_image(
    tmp_path: Path, many: Contents, monkeypatch: pytest.MonkeyPatch
) -> None:
    opened, verified, open_map = 0, 0, tar.open_map

    def counting(directory: Path, each: Tar, verify: bool = True) -> Any:
        nonlocal opened, verified
        opened, verified = opened + 1, verified + verify
        return open_map(directory, each, verify)

    monkeypatch.setattr(tar, "open_map", counting)
    monkeypatch.setattr(tar, "MAX_OPEN", 20)
    files = _open_files()
    tracemalloc.start()
    try:
        images = Images(tmp_path, many)
        kept, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert kept < 16 * len(images)
    assert (len(images), opened, verified) == (6000, 60, 60)
    for index in (0, 99, 100, 3042, 5999):
        reader = images.reader(index)
        assert (reader.label, reader.size, images.source(index)) == (index % 100, index % 100, f"{index % 100}.png")
        assert reader.path == tmp_path / f"copy-{index // 100:06d}.tar"
        assert reader.carried().content == b"-" * (index % 100)
    assert verified == 60  # not again
    assert _open_files() <= files + tar.MAX_OPEN


def _open_files() -> int:
    return len(list(Path("/proc/self/fd").iterdir())) if sys.platform == "linux" else 0


def test_a_shard_that_was_replaced_is_not_read(tmp_path: Path, many: Contents, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tar, "MAX_OPEN", 1)
    images = Images(tmp_path, many)
    path = tmp_path / "copy-000007.tar"
    content = path.read_bytes()
    path.unlink()
    path.write_bytes(content[512:])
    with pytest.raises(
        UserError, match=rf"^{path}: damaged \(it has {len(content) - 512} bytes, but {len(content)} in m"
    ):
        images.reader(700)
