"""Training pairs (x_0, t, eps) in shuffled blocks, and an infinite stream of batches from them.

A pair is stored as a recipe: x_0, a timestep and a noise key determine x_t = sqrt(alpha_bar_t) x_0 +
sqrt(1 - alpha_bar_t) eps, on any machine and for any batch size and number of processes. The images of a block share a
noise stream, whose draw d gives the d-th (t, eps); there is no last one. Training epoch e uses the noise of draw e, and
with train.timesteps: stored also its t. data/README.md describes the files.
"""

import hashlib
from abc import ABC, abstractmethod
from array import array
from bisect import bisect
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import lru_cache, partial
from itertools import accumulate
from pathlib import Path
from threading import Lock
from typing import Literal, NamedTuple, TypeVar

import numpy as np
from numpy.typing import NDArray

from diffusion.errors import UserError
from diffusion.pairs import augmentation, blocks
from diffusion.pairs.blocks import LabelledImages
from diffusion.pairs.noise import BLOCK, Purpose, eps_from_key, eps_key, stream, timesteps
from diffusion.pairs.pixels import FIELDS, Filter, Fit, Resize, to_x_0
from diffusion.storage.executors import OWN_PROCESS, Executor
from diffusion.storage.files import write_json, write_sums
from diffusion.storage.tar import FORMAT, SPLITS, Facts, Split, Tar, Writer, members, open_maps

MANIFEST = "manifest.json"
MAX_TAR_BYTES = 256 * 2**20
Number = TypeVar("Number", bound=np.generic)


class Contents(Facts):
    """Contents of a split."""

    images: int
    blocks: int
    tars: tuple[Tar, ...]
    """Tar files in which each sample is a block."""


class Settings(Facts):
    """Everything that determines the pairs, besides the images."""

    channels: int
    height: int
    width: int
    resize: Resize = "crop"
    background: str = "white"
    filter: Filter = "bicubic"
    seed: int
    schedule: str
    num_timesteps: int
    draws: int
    """Number of draws of (t, noise key) stored for train."""
    heldout_draws: int
    """Number of draws of (t, x_t, eps) stored for val and test."""
    classes: tuple[str, ...]
    shards_sha256: str
    """SHA-256 of the shards' manifest."""

    @property
    def fit(self) -> Fit:
        """How the images were brought to one size."""
        return Fit(**self.model_dump(include=set(FIELDS)))


class Manifest(Settings):
    """manifest.json of data/pairs."""

    format: Literal[1] = FORMAT
    splits: dict[Split, Contents]
    alpha_bar: tuple[float, ...]
    """(T,), for reading the pairs without this code."""
    cropped: int = 0
    """Number of images of which something was cut off."""
    cropped_area: float = 0.0
    """The fraction of their area that was cut off, on average over these."""
    enlarged: int = 0
    """Number of images that were enlarged."""


class HeldOut(NamedTuple):
    """One draw of a held-out block."""

    t: NDArray[np.int64]
    """(n,)"""
    x_t: NDArray[np.float32]
    """(n, C, H, W)"""
    eps: NDArray[np.float32]
    """(n, C, H, W)"""


class Batch(NamedTuple):
    """A batch of training pairs."""

    x_0: NDArray[np.float32]
    """(B, C, H, W) in [-1, 1]"""
    t: NDArray[np.int64]
    """(B,)"""
    eps: NDArray[np.float32]
    """(B, C, H, W)"""
    y: NDArray[np.int64]
    """(B,), -1 where there is no label or it was dropped"""
    u: NDArray[np.float64]
    """(B,), uniform on [0, 1); for drawing timesteps other than t"""
    augmentation: NDArray[np.float32]
    """(B, 8), parameters of each image's augmentation; (B, 0) without augmentation"""


class BlockedImages(ABC):
    """Images in blocks with the recipes of their pairs, on disk (`Pairs`) or in memory (`memory.Blocks`)."""

    def __init__(self, images: int, shape: tuple[int, int, int], seed: int, split: Split, num_timesteps: int) -> None:
        self.images, self.shape = images, shape
        self.seed, self.split, self.num_timesteps = seed, split, num_timesteps
        self._cached = lru_cache(maxsize=6)(self.recipe)
        self._drawing = [Lock() for _ in range(16)]

    @abstractmethod
    def x_0(self, block: int) -> NDArray[np.uint8]:
        """Images of a block, (n, C, H, W)."""

    @abstractmethod
    def labels(self, block: int) -> NDArray[np.int64]:
        """Labels of a block, (n,); -1 where there is none."""

    def cached_recipe(self, block: int, draw: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """`recipe` with a cache, shared by threads that read parts of a block; do not modify the arrays."""
        with self._drawing[block % len(self._drawing)]:
            return self._cached(block, draw)

    def size(self, block: int) -> int:
        """Number of images in a block: BLOCK, or fewer in the last one."""
        return min(BLOCK, self.images - block * BLOCK)

    def recipe(self, block: int, draw: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Compute t (n,) and eps (n, C, H, W) of any draw of a block."""
        n = self.size(block)
        t = timesteps(self.seed, self.split, block, draw, self.num_timesteps)[:n]
        return t, eps_from_key(eps_key(self.seed, self.split, block, draw), self.shape)[:n]


def write(
    directory: Path,
    images: Mapping[Split, LabelledImages],
    settings: Settings,
    alpha_bar: NDArray[np.float64],
    advance: Callable[[int], None] = lambda _: None,
    executor: Executor = OWN_PROCESS,
) -> Manifest:
    """Write the pairs and their manifest into an empty directory.

    alpha_bar: (T,). `advance` is called with the number of images done. `executor` makes the blocks. Raises UserError
    if the process that makes a block is killed each time.
    """
    sizes = Counter[tuple[int, int]]()
    with ExitStack() as stack:
        writers = {split: stack.enter_context(Writer(directory, split, max_bytes=MAX_TAR_BYTES)) for split in SPLITS}
        for block in stack.enter_context(closing(blocks.make(images, settings, alpha_bar, executor))):
            writers[block.split].add(f"{block.number:08d}", block.files)
            sizes.update(block.sizes)
            advance(len(block.sizes))
    splits = {
        split: Contents(
            images=len(images[split]), blocks=sum(tar.samples for tar in writer.tars), tars=tuple(writer.tars)
        )
        for split, writer in writers.items()
    }
    manifest = Manifest(
        **settings.model_dump(), splits=splits, alpha_bar=tuple(alpha_bar.tolist()), **settings.fit.tally(sizes)
    )
    write_json(directory / MANIFEST, manifest.model_dump())
    write_sums(directory, {tar.name: tar.sha256 for contents in splits.values() for tar in contents.tars})
    return manifest


class Pairs(BlockedImages):
    """One split of data/pairs, with random access through memory maps; needs 40 bytes of memory per block.

    Raises UserError if the directory is missing, corrupt or from another version.
    """

    def __init__(self, directory: Path, split: Split) -> None:
        manifest = self.manifest = Manifest.read(directory / MANIFEST)
        contents = manifest.splits[split]
        shape = (manifest.channels, manifest.height, manifest.width)
        super().__init__(contents.images, shape, manifest.seed, split, manifest.num_timesteps)
        self.blocks = contents.blocks
        self._map = open_maps(directory, contents.tars)
        self._begins = list(accumulate((tar.samples for tar in contents.tars), initial=0))
        self._ends = defaultdict[str, "array[int]"](partial(array, "q"))
        for number in range(len(contents.tars)):
            for member in members(self._map(number)):  # block by block
                self._ends[member.extension].append(member.offset + member.size)

    @property
    def digest(self) -> str:
        """Digest of the split's files, which identifies what was evaluated."""
        return hashlib.sha256(self.manifest.splits[self.split].model_dump_json().encode()).hexdigest()

    def check_process(self, alpha_bar: NDArray[np.float64], shape: tuple[int, int, int] | None = None) -> None:
        """Raise UserError unless the pairs were made with this alpha_bar (T,) and, if given, shape (C, H, W)."""
        manifest = self.manifest
        if not np.array_equal(manifest.alpha_bar, alpha_bar) or self.shape != (shape or self.shape):
            raise UserError(
                f"the pairs (schedule {manifest.schedule}, {manifest.num_timesteps} timesteps, images {self.shape}) do "
                "not match the model's noise schedule or image shape; run `ddpm pairs` and `ddpm train` again"
            )

    def x_0(self, block: int) -> NDArray[np.uint8]:
        return self._view(block, "x_0", np.uint8, self.size(block), *self.shape).copy()

    def labels(self, block: int) -> NDArray[np.int64]:
        return self._view(block, "y", np.int64, self.size(block)).copy()

    def recipe(self, block: int, draw: int) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """Read from the stored table if it contains the draw, and otherwise computed the same way."""
        n, draws = self.size(block), self.manifest.draws
        if self.split != "train" or draw >= draws:
            return super().recipe(block, draw)
        t = self._view(block, "t", np.int64, draws, n)[draw].copy()
        return t, eps_from_key(self._view(block, "noise_key", np.uint64, draws, 6)[draw], self.shape)[:n]

    def heldout(self, block: int, draw: int) -> HeldOut:
        """Stored draw of a block of val or test; `draw` must be below manifest.heldout_draws."""
        n, draws = self.size(block), self.manifest.heldout_draws
        return HeldOut(
            self._view(block, "t", np.int64, draws, n)[draw].copy(),
            self._view(block, "x_t", np.float32, draws, n, *self.shape)[draw].copy(),
            self._view(block, "eps", np.float32, draws, n, *self.shape)[draw].copy(),
        )

    def _view(self, block: int, name: str, dtype: type[Number], *shape: int) -> NDArray[Number]:
        """A stored array as a view. An .npy member ends with the array's bytes."""
        number = bisect(self._begins, block) - 1
        count = int(np.prod(shape))
        offset = self._ends[f"{name}.npy"][block] - count * np.dtype(dtype).itemsize
        return np.frombuffer(self._map(number), dtype, count, offset).reshape(shape)


@dataclass(frozen=True)
class Batches:
    """The stream of training batches: calling it with k returns batch k, a pure function of k and these fields.

    The stream concatenates epochs e = 0, 1, 2, ..., each with all blocks in an order that depends on (seed, e), and
    their draw e. Batch k consists of its items [k B, (k + 1) B), of which process `rank` of `world` gets B / world.
    """

    pairs: BlockedImages
    seed: int
    size: int
    """B"""
    flip: bool = False
    """Whether x_0 is flipped horizontally at random, as a function of (seed, e, block)."""
    class_dropout: float = 0.0
    """Fraction of labels dropped at random, as a function of (seed, e, block)."""
    augment: float = 0.0
    """Probability of each of the transformations of `augmentation`, as a function of (seed, e, block)."""
    rank: int = 0
    world: int = 1

    def __call__(self, k: int) -> Batch:
        share, image = self.size // self.world, self.pairs.shape
        batch = Batch(
            x_0=np.empty((share, *image), np.float32),
            t=np.empty(share, np.int64),
            eps=np.empty((share, *image), np.float32),
            y=np.empty(share, np.int64),
            u=np.empty(share, np.float64),
            augmentation=np.empty((share, augmentation.PARAMETERS if self.augment else 0), np.float32),
        )
        first, done = k * self.size + self.rank * share, 0
        while done < share:
            epoch, offset = divmod(first + done, self.pairs.images)
            order, begins = _epoch(self.seed, epoch, self.pairs.images)
            place = int(np.searchsorted(begins, offset, side="right")) - 1
            block, start = int(order[place]), offset - int(begins[place])
            end = min(self.pairs.size(block), start + share - done)
            for name, items in self._items(epoch, block, slice(start, end))._asdict().items():
                getattr(batch, name)[done : done + end - start] = items
            done += end - start
        return batch

    def _items(self, epoch: int, block: int, items: slice) -> Batch:
        """Part of a block's items in an epoch."""

        def uniform(purpose: Purpose) -> NDArray[np.float64]:
            return stream(self.seed, purpose, high=epoch, low=block).random(BLOCK)[items]

        t, eps = self.pairs.cached_recipe(block, epoch)
        x_0, y = self.pairs.x_0(block)[items], self.pairs.labels(block)[items]
        if self.flip:
            x_0 = np.where(uniform(Purpose.FLIP)[:, None, None, None] < 0.5, x_0[..., ::-1], x_0)
        parameters = augmentation.draw(self.seed, epoch, block, self.augment)[items]
        x_0 = augmentation.transform(x_0, parameters)
        y = np.where(uniform(Purpose.CLASS_DROPOUT) < self.class_dropout, -1, y)
        u = uniform(Purpose.TIMESTEP_UNIFORMS)
        return Batch(to_x_0(x_0, np.float32), t[items], eps[items], y, u, parameters)


@lru_cache(maxsize=4)
def _epoch(seed: int, epoch: int, images: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Order of the blocks in an epoch, (blocks,), and the position at which each begins, (blocks + 1,)."""
    blocks = -(-images // BLOCK)
    order = stream(seed, Purpose.BLOCK_ORDER, high=epoch).permutation(blocks)
    sizes = np.minimum(BLOCK, images - order * BLOCK)
    return order, np.concatenate([[0], np.cumsum(sizes)])
