"""Stored pairs and the stream of training batches."""

import io
import re
import tarfile
from collections.abc import Callable, Generator, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, Self

import numpy as np
import pytest
from numpy.typing import NDArray
from PIL import Image

from diffusion.errors import UserError
from diffusion.pairs import pairs as module
from diffusion.pairs.blocks import PART_BYTES
from diffusion.pairs.noise import BLOCK
from diffusion.pairs.pairs import Batches, Manifest, Pairs, Settings, write
from diffusion.storage.executors import OWN_PROCESS, Executor, OwnProcess
from diffusion.storage.processes import Processes
from diffusion.storage.tar import SPLITS, Split

SIZES: dict[Split, int] = {"train": 150, "val": 70, "test": 64}
T = 200
ALPHA_BAR = np.cumprod(1 - np.linspace(1e-4, 0.1, T), dtype=np.float64)
SETTINGS = Settings(
    channels=3, height=4, width=6, seed=5, schedule="linear", num_timesteps=T, draws=3, heldout_draws=2,
    classes=("a", "b"), shards_sha256="0",
)  # fmt: skip


@dataclass
class Noise:
    """Random images, of which the first pixel is their number; those of index 0 are unlabelled."""

    n: int

    def __len__(self) -> int:
        return self.n

    def reader(self, index: int) -> "Numbered":
        return Numbered(index)


class Numbered(NamedTuple):
    """The random image with a number."""

    number: int
    size: int = PART_BYTES // 3
    here: bool = True

    @property
    def label(self) -> int | None:
        return self.number or None

    def carried(self) -> Self:
        return self._replace(here=False)

    def read(self) -> Image.Image:
        pixels = np.random.default_rng(self.number).integers(0, 256, (4, 6, 3), dtype=np.uint8)
        pixels[0, 0, 0] = self.number
        return Image.fromarray(pixels)


def make(directory: Path, settings: Settings = SETTINGS, executor: Executor = OWN_PROCESS) -> Manifest:
    directory.mkdir()
    images = {split: Noise(n) for split, n in SIZES.items()}
    return write(directory, images, settings, ALPHA_BAR, executor=executor)


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("made") / "pairs"
    make(path)
    return path


def numbers(x_0: NDArray[Any]) -> list[int]:
    """Indices of these images."""
    first = x_0[:, 0, 0, 0]
    return [round(float(v)) for v in (first if x_0.dtype == np.uint8 else (first + 1) * 127.5)]


class Elsewhere(OwnProcess):
    """A machine without the images."""

    shares_files = False
    tasks = 0

    def map(
        self, function: Callable[[Any], Any], tasks: Iterable[Any], size: Callable[[Any], int]
    ) -> Generator[tuple[Any, Any]]:
        for task in tasks:
            assert not any(image.here for image in task.images)
            assert PART_BYTES < size(task) < 2 * PART_BYTES or len(task.images) < 4
            Elsewhere.tasks += 1
            yield task, function(task)


def test_a_machine_without_the_images_gets_parts_of_blocks(tmp_path: Path, directory: Path) -> None:
    make(tmp_path / "again", executor=Elsewhere())
    assert Elsewhere.tasks == sum(-(-size // 4) for n in SIZES.values() for size in [64] * (n // 64) + [n % 64])
    for path in directory.iterdir():
        assert (tmp_path / "again" / path.name).read_bytes() == path.read_bytes()


@pytest.mark.parametrize("executor", [OWN_PROCESS, Processes(2), Processes(3)], ids=str)
def test_same_images_same_bytes(tmp_path: Path, directory: Path, executor: Executor) -> None:
    make(tmp_path / "again", executor=executor)
    names = sorted(path.name for path in directory.iterdir())
    assert names == ["SHA256SUMS", "manifest.json", "test-000000.tar", "train-000000.tar", "val-000000.tar"]
    for name in names:
        assert (tmp_path / "again" / name).read_bytes() == (directory / name).read_bytes()


@pytest.mark.parametrize("split", SPLITS)
def test_every_image_is_there_once_with_its_label(directory: Path, split: Split) -> None:
    pairs = Pairs(directory, split)
    assert (pairs.images, pairs.blocks, pairs.shape) == (SIZES[split], -(-SIZES[split] // 64), (3, 4, 6))
    seen = []
    for block in range(pairs.blocks):
        x_0 = pairs.x_0(block)
        for image, number, label in zip(x_0, numbers(x_0), pairs.labels(block), strict=True):
            read = Noise(256).reader(number).read()
            np.testing.assert_array_equal(image.transpose(1, 2, 0), np.asarray(read))
            assert label == (number or -1)
        seen += numbers(x_0)
    assert sorted(seen) == list(range(SIZES[split]))
    assert seen != sorted(seen)


def test_stored_recipes_are_those_that_would_be_computed(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = Pairs(directory, "train")
    stored = [pairs.recipe(block, draw) for block in range(pairs.blocks) for draw in range(3)]
    monkeypatch.setattr(pairs, "manifest", SETTINGS.model_copy(update={"draws": 0}))  # nothing is stored
    computed = [pairs.recipe(block, draw) for block in range(pairs.blocks) for draw in range(3)]
    for (t, eps), (t_computed, eps_computed) in zip(stored, computed, strict=True):
        np.testing.assert_array_equal(t, t_computed)
        np.testing.assert_array_equal(eps, eps_computed)


def test_the_sequence_of_recipes_never_ends(directory: Path) -> None:
    pairs = Pairs(directory, "train")
    drawn = [pairs.recipe(2, draw) for draw in (0, 2, 3, 4, 10**6)]
    assert {(t.shape, eps.shape) for t, eps in drawn} == {((22,), (22, 3, 4, 6))}
    assert len({eps.tobytes() for _, eps in drawn}) == len({t.tobytes() for t, _ in drawn}) == 5


@pytest.mark.parametrize("split", ["val", "test"])
def test_heldout_tensors_follow_the_formula(directory: Path, split: Split) -> None:
    pairs = Pairs(directory, split)
    for block in range(pairs.blocks):
        for draw in range(2):
            t, x_t, eps = pairs.heldout(block, draw)
            t_recipe, eps_recipe = pairs.recipe(block, draw)
            np.testing.assert_array_equal(t, t_recipe)
            np.testing.assert_array_equal(eps, eps_recipe)
            x_0 = pairs.x_0(block).astype(np.float64) / 127.5 - 1
            for i in range(len(t)):
                a = ALPHA_BAR[t[i]]
                expected = a**0.5 * x_0[i] + (1 - a) ** 0.5 * eps[i].astype(np.float64)
                np.testing.assert_allclose(x_t[i], expected, rtol=1e-6, atol=1e-7)
            assert x_t.dtype == eps.dtype == np.float32


def test_manifest(directory: Path) -> None:
    manifest = Pairs(directory, "val").manifest
    assert Settings(**{name: getattr(manifest, name) for name in Settings.model_fields}) == SETTINGS
    assert manifest.alpha_bar == tuple(ALPHA_BAR.tolist())


def test_plain_webdataset_reads_them(
    directory: Path, webdataset_samples: Callable[[list[str]], list[dict[str, Any]]]
) -> None:
    train, val = (webdataset_samples([str(directory / f"{split}-000000.tar")]) for split in ("train", "val"))
    pairs = Pairs(directory, "train")
    assert [sample["__key__"] for sample in train] == ["00000000", "00000001", "00000002"]
    for block, sample in enumerate(train):
        np.testing.assert_array_equal(sample["x_0.npy"], pairs.x_0(block))
        np.testing.assert_array_equal(sample["y.npy"], pairs.labels(block))
        assert (sample["t.npy"].shape, sample["t.npy"].dtype) == ((3, pairs.size(block)), np.int64)
        assert (sample["noise_key.npy"].shape, sample["noise_key.npy"].dtype) == ((3, 6), np.uint64)
    np.testing.assert_array_equal(val[1]["x_t.npy"][1], Pairs(directory, "val").heldout(1, 1).x_t)
    assert val[0].keys() >= {"x_0.npy", "y.npy", "t.npy", "x_t.npy", "eps.npy"}


def test_the_readmes_snippet_makes_the_training_pairs(
    root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "data").mkdir()
    alpha_bar = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000), dtype=np.float64)
    settings = SETTINGS.model_copy(update={"num_timesteps": 1000})
    directory = tmp_path / "data" / "pairs"
    directory.mkdir()
    write(directory, {split: Noise(n) for split, n in SIZES.items()}, settings, alpha_bar)
    snippets = re.findall(r"```python\n(.*?)```", (root / "data" / "README.md").read_text(), flags=re.DOTALL)
    (snippet,) = [text for text in snippets if "noise_key" in text]
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(snippet, names)
    names["tar"].close()
    t, eps = Pairs(directory, "train").recipe(0, 0)
    np.testing.assert_array_equal(names["eps"], eps)
    a = alpha_bar[t].reshape(-1, 1, 1, 1)
    x_0 = Pairs(directory, "train").x_0(0) / 127.5 - 1
    np.testing.assert_allclose(names["x_t"], np.sqrt(a) * x_0 + np.sqrt(1 - a) * eps, rtol=1e-12)


def test_tars_are_of_limited_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "MAX_TAR_BYTES", 80_000)
    manifest = make(tmp_path / "pairs")
    assert len(manifest.splits["val"].tars) == 2
    pairs = Pairs(tmp_path / "pairs", "val")
    assert sorted(numbers(pairs.x_0(0)) + numbers(pairs.x_0(1))) == list(range(70))


def test_an_epoch_has_every_image_once_with_its_own_draw(directory: Path) -> None:
    pairs = Pairs(directory, "train")
    batches = [Batches(pairs, 1, 50)(step) for step in range(9)]  # three epochs of 150
    orders = []
    for epoch in range(3):
        part = batches[3 * epoch : 3 * epoch + 3]
        order = [number for batch in part for number in numbers(batch.x_0)]
        assert sorted(order) == list(range(150))
        orders.append(order)
        t = {n: t for batch in part for n, t in zip(numbers(batch.x_0), batch.t, strict=True)}
        for block in range(pairs.blocks):
            expected, _ = pairs.recipe(block, epoch)
            assert [t[n] for n in numbers(pairs.x_0(block))] == list(expected)
    assert orders[0] != orders[1] != orders[2]


def test_batches_of_any_size_cut_the_same_stream(directory: Path) -> None:
    pairs = Pairs(directory, "train")
    whole = Batches(pairs, 3, 480)(0)
    assert whole.x_0.shape == whole.eps.shape == (480, 3, 4, 6)
    assert [array.dtype for array in whole] == [np.float32, np.int64, np.float32, np.int64, np.float64, np.float32]
    assert whole.x_0.min() == -1
    assert whole.x_0.max() == 1
    for size in (1, 7, 64, 128, 200):
        parts = [Batches(pairs, 3, size)(step) for step in range(480 // size)]
        for name, array in whole._asdict().items():
            cut = np.concatenate([getattr(part, name) for part in parts])
            np.testing.assert_array_equal(cut, array[: len(cut)])


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("flip", [False, True])
def test_processes_share_a_batch(directory: Path, world: int, flip: bool) -> None:
    pairs = Pairs(directory, "train")
    whole = Batches(pairs, 0, 100, flip=flip)(5)
    shares = [Batches(Pairs(directory, "train"), 0, 100, flip=flip, rank=r, world=world)(5) for r in range(world)]
    for name, array in whole._asdict().items():
        np.testing.assert_array_equal(np.concatenate([getattr(share, name) for share in shares]), array)


def test_flip_mirrors_about_half_of_the_images_and_nothing_else(directory: Path) -> None:
    pairs = Pairs(directory, "train")
    plain, flipped = Batches(pairs, 0, 450)(0), Batches(pairs, 0, 450, flip=True)(0)
    same = (plain.x_0 == flipped.x_0).all(axis=(1, 2, 3))
    mirrored = (plain.x_0[..., ::-1] == flipped.x_0).all(axis=(1, 2, 3))
    assert (same ^ mirrored).all()
    assert 0.4 < mirrored.mean() < 0.6
    assert (mirrored[:150] != mirrored[150:300]).any()
    for name in ("t", "eps", "y"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(flipped, name))


def uniform(purpose: int, epoch: int, block: int) -> NDArray[np.float64]:
    """The numbers of seed 9 for a purpose, by its number in the library, straight from numpy."""
    return np.random.Generator(np.random.Philox(key=(9, purpose), counter=(0, 0, block, epoch))).random(64)


def test_labels_are_dropped_and_images_flipped_each_by_their_own_random_numbers(directory: Path) -> None:
    pairs = Pairs(directory, "train")
    plain = Batches(pairs, 9, 300)(0)  # two epochs
    y = Batches(pairs, 9, 300, class_dropout=0.3)(0).y
    flipped = (Batches(pairs, 9, 300, flip=True)(0).x_0 != plain.x_0).any(axis=(1, 2, 3))
    places = {
        number: (block, place)
        for block in range(pairs.blocks)
        for place, number in enumerate(numbers(pairs.x_0(block)))
    }
    for index, number in enumerate(numbers(plain.x_0)):
        (block, place), epoch = places[number], index // 150
        dropped = uniform(37, epoch, block)[place] < 0.3
        assert y[index] == (-1 if dropped or not number else number)
        assert flipped[index] == (uniform(34, epoch, block)[place] < 0.5)
        assert plain.u[index] == uniform(38, epoch, block)[place]
    assert 60 < (y == -1).sum() < 120


def test_changing_a_batch_does_not_change_the_pairs(directory: Path) -> None:
    pairs = Pairs(directory, "train")
    expected = [array.copy() for array in Batches(pairs, 0, 100)(0)]
    given: list[NDArray[Any]] = [*Batches(pairs, 0, 100)(0), *pairs.recipe(0, 0), pairs.x_0(0), pairs.labels(0)]
    for array in given:
        array[...] = 0
    for again, wanted in zip(Batches(pairs, 0, 100)(0), expected, strict=True):
        np.testing.assert_array_equal(again, wanted)


def test_damaged_pairs_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"manifest\.json: No such file or directory$"):
        Pairs(tmp_path / "pairs", "train")
    make(tmp_path / "pairs")
    path = tmp_path / "pairs" / "val-000000.tar"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"val-000000\.tar: damaged \(it does not match its digest in manifest\.json\)"):
        Pairs(tmp_path / "pairs", "val")
    assert Pairs(tmp_path / "pairs", "train").images == 150


def test_pairs_of_another_process_or_shape_are_refused(directory: Path) -> None:
    pairs = Pairs(directory, "train")
    pairs.check_process(ALPHA_BAR)
    pairs.check_process(ALPHA_BAR, (3, 4, 6))
    made_for = r"^the pairs \(schedule linear, 200 timesteps, images \(3, 4, 6\)\) do not match the model"
    for alpha_bar, shape in ((ALPHA_BAR[:-1], None), (0.9 * ALPHA_BAR, None), (ALPHA_BAR, (3, 6, 4))):
        with pytest.raises(UserError, match=made_for):
            pairs.check_process(alpha_bar, shape)


def test_arrays_need_no_pickle(directory: Path) -> None:
    for path in directory.glob("*.tar"):
        with tarfile.open(path) as tar:
            for member in tar:
                content = tar.extractfile(member)
                assert content is not None
                assert np.load(io.BytesIO(content.read()), allow_pickle=False).shape[0] <= BLOCK
