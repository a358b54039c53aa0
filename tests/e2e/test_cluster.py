"""The stages shard and pairs on a Dask cluster whose workers have neither the images nor the credentials for them."""

import signal
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.pairs import blocks
from flows.workers import SCHEDULER
from tests.e2e.conftest import upload, wait_for
from tests.storage.cluster import Cluster, cluster
from tests.training import trees

distributed = pytest.importorskip("distributed")
pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore::DeprecationWarning:distributed")]
CHANGES = {"shard": {"source": "pictures"}, "pairs": {"channels": 3, "height": 12, "width": 12}}
# Makes files below a folder unreadable, as they are on another machine.
GUARD = """
import sys
def refuse(event, arguments):
    if event == "open" and str(arguments[0]).startswith({folder!r}):
        raise PermissionError(13, "of another machine", arguments[0])
sys.addaudithook(refuse)
"""


@pytest.fixture(scope="module")
def tree(tmp_path_factory: pytest.TempPathFactory, root: Path) -> Path:
    """A tree with images after both stages in their own process."""
    tree = tmp_path_factory.mktemp("main") / "tree"
    (tree / "data" / "raw").mkdir(parents=True)
    (tree / "params.yaml").write_bytes((root / "params.yaml").read_bytes())
    trees.change(tree, trees.TINY | CHANGES)
    pixels = np.random.default_rng(0).integers(0, 256, (300, 12, 14, 3), dtype=np.uint8)
    for number, picture in enumerate(pixels):
        path = tree / "pictures" / ("cat" if number % 3 else "dog") / f"{number:03}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture).save(path, compress_level=1)
    (tree / "pictures" / "cat" / "broken.jpg").write_bytes(b"\xff\xd8 no picture")
    for stage in ("shard", "pairs"):
        done = trees.run(tree, stage)
        assert done.returncode == 0, done.stderr
    return tree


@pytest.fixture(scope="module")
def workers(tree: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Cluster]:
    """Three workers, of which two are killed by tests. They cannot open the files of the tree."""
    directory = tmp_path_factory.mktemp("cluster")
    guard = directory / "guard.py"
    guard.write_text(GUARD.format(folder=str(tree)))
    with cluster(directory, 3, [f"--preload={guard}"]) as found:
        yield found


def written(tree: Path) -> dict[str, str]:
    """The digests of what both stages wrote; the manifest of the shards names the source."""
    found = trees.digests(tree, "data/shards", "data/pairs")
    return {name: digest for name, digest in found.items() if name.endswith(".tar")}


@pytest.mark.parametrize("source", ["pictures", "s3://images/cluster"])
def test_workers_without_the_images_write_the_same_files(
    tree: Path, workers: Cluster, server: dict[str, str], monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    before = written(tree)
    monkeypatch.setattr(blocks, "PART_BYTES", 10_000)
    monkeypatch.setenv(SCHEDULER, workers.address)
    if source != "pictures":
        upload(server, tree / "pictures", "cluster")
        for name, value in server.items():
            monkeypatch.setenv(name, value)
    trees.change(tree, {"shard": {"source": source}})
    for stage in ("shard", "pairs"):
        done = trees.run(tree, stage)
        assert done.returncode == 0, done.stderr
    assert written(tree) == before
    assert len(before) == 6
    assert not list((tree / ".ddpm").glob(".remote.*"))


@pytest.mark.parametrize("stage", ["shard", "pairs"])
def test_a_killed_worker_costs_nothing_but_time(tree: Path, workers: Cluster, stage: str) -> None:
    before = written(tree)
    trees.change(tree, CHANGES)
    alive = {number: worker for number, worker in enumerate(workers.workers) if worker.poll() is None}
    with distributed.Client(workers.address) as client:
        client.wait_for_workers(len(alive))
        numbers = {address: facts["name"] for address, facts in client.scheduler_info()["workers"].items()}
        for worker in alive.values():
            worker.send_signal(signal.SIGSTOP)  # so that one has tasks that it will not finish
        running = trees.start(tree, sys.executable, "-m", "flows", stage, **{SCHEDULER: workers.address})
        try:
            wait_for(lambda: any(client.processing().values()) or running.poll() is not None, 120)
            busy = [numbers[address] for address, tasks in client.processing().items() if tasks]
            if busy:
                alive.pop(busy[0]).kill()
            for worker in alive.values():
                worker.send_signal(signal.SIGCONT)
            _, said = running.communicate(timeout=120)
        finally:
            running.kill()
    assert busy, said
    assert running.returncode == 0, said
    assert written(tree) == before
