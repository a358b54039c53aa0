"""Geometric augmentation, against closed forms."""

import math
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.linalg import expm

from diffusion.pairs.augmentation import draw, transform
from diffusion.pairs.memory import Blocks, Images
from diffusion.pairs.pairs import Batches

FLIP, SCALE, COS, SIN, STRETCH, ACROSS, RIGHT, DOWN = range(8)


def parameters(**values: float) -> NDArray[np.float32]:
    """Parameters (1, 8) of an image: flip, scale, turn (degrees), stretch, across, right and down."""
    places = {"flip": FLIP, "scale": SCALE, "stretch": STRETCH, "across": ACROSS, "right": RIGHT, "down": DOWN}
    turn = math.radians(values.pop("turn", 0))
    found = np.zeros((1, 8), np.float32)
    found[0, [COS, SIN]] = math.cos(turn) - 1, math.sin(turn)
    for name, value in values.items():
        found[0, places[name]] = value
    return found


def random_images(n: int, height: int = 8, width: int = 8) -> NDArray[np.uint8]:
    return np.random.default_rng(0).integers(0, 256, (n, 3, height, width), dtype=np.uint8)


def test_each_transformation_is_drawn_with_its_probability_and_distribution() -> None:
    drawn = np.concatenate([draw(4, epoch, block, 0.2) for epoch in range(20) for block in range(20)])
    assert drawn.dtype == np.float32
    assert drawn.shape == (64 * 400, 8)
    groups = {FLIP: [FLIP], SCALE: [SCALE], COS: [COS, SIN], STRETCH: [STRETCH, ACROSS], RIGHT: [RIGHT, DOWN]}
    applied = {first: drawn[:, columns].any(axis=1) for first, columns in groups.items()}
    for first, columns in groups.items():
        assert applied[first].mean() == pytest.approx(0.2, abs=0.01)
        assert (drawn[~applied[first]][:, columns] == 0).all()
    assert (~np.any([*applied.values()], axis=0)).mean() == pytest.approx(0.8**5, abs=0.01)  # independent
    assert set(drawn[:, FLIP]) == {0, 1}
    cos, sin = 1 + drawn[applied[COS], COS], drawn[applied[COS], SIN]
    np.testing.assert_allclose(cos**2 + sin**2, 1, atol=1e-6)
    assert np.histogram(np.arctan2(sin, cos), 8, (-math.pi, math.pi))[0] == pytest.approx(len(cos) / 8, rel=0.15)
    stretch = drawn[applied[STRETCH]][:, [STRETCH, ACROSS]]
    angles = np.arctan2(stretch[:, 1], stretch[:, 0])
    assert np.histogram(angles, 8, (-math.pi, math.pi))[0] == pytest.approx(len(stretch) / 8, rel=0.15)
    normal = (drawn[applied[SCALE], SCALE], drawn[applied[RIGHT], RIGHT], drawn[applied[RIGHT], DOWN])
    for values in (*normal, np.hypot(*stretch.T) * np.sign(angles)):
        assert values.mean() == pytest.approx(0, abs=0.06)
        assert np.square(values).mean() == pytest.approx(1, abs=0.06)
        assert (values**4).mean() == pytest.approx(3, abs=0.5)


def test_drawn_parameters_depend_on_seed_epoch_and_block_alone() -> None:
    assert len({draw(*place, 0.5).tobytes() for place in [(0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1)]}) == 4
    np.testing.assert_array_equal(draw(3, 2, 1, 0.5), draw(3, 2, 1, 0.5))
    assert draw(3, 2, 1, 0.0).shape == (64, 0)


def shifted(x: NDArray[np.uint8], right: int, down: int) -> NDArray[np.uint8]:
    """The image that is read so many pixels further right and down."""
    height, width = x.shape[2:]
    padded = np.pad(x, ((0, 0), (0, 0), (height, height), (width, width)), mode="symmetric")
    return padded[..., height + down : 2 * height + down, width + right : 2 * width + right]


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, lambda x: x),
        ({"flip": 1}, lambda x: x[..., ::-1]),
        ({"turn": 180}, lambda x: x[..., ::-1, ::-1]),
        ({"flip": 1, "turn": 180}, lambda x: x[..., ::-1, :]),
        ({"right": 2, "down": -3}, lambda x: shifted(x, 2, -3)),
        ({"right": 4, "flip": 1}, lambda x: shifted(x, 4, 0)[..., ::-1]),
    ],
)
def test_transformations_that_only_move_pixels(given: dict[str, float], expected: Any) -> None:
    x = random_images(2, 6, 8)
    # Translations are pixels here, and an eighth of the side in the parameters.
    given = given | {name: 8 * given[name] / side for name, side in (("right", 8), ("down", 6)) if name in given}
    np.testing.assert_array_equal(transform(x, parameters(**given).repeat(2, axis=0)), expected(x))


def test_a_quarter_turn_of_a_square() -> None:
    x = random_images(1)
    np.testing.assert_array_equal(transform(x, parameters(turn=90)), np.rot90(x, -1, axes=(3, 2)))


def scene(x: NDArray[np.float64], y: NDArray[np.float64]) -> NDArray[np.float64]:
    """A smooth picture, at positions in pixels from the center."""
    return 128 + 60 * np.sin(x / 9 + 1) + 50 * np.cos(y / 7 + x / 20)


@pytest.mark.parametrize(
    "given",
    [
        {"scale": 0.7},
        {"scale": -1.2, "flip": 1},
        {"turn": 35},
        {"stretch": 1.1, "across": -0.6},
        {"right": 0.3, "down": -0.45},
        {"flip": 1, "scale": 0.5, "turn": -110, "stretch": -0.8, "across": 0.4, "right": -0.2, "down": 0.1},
    ],
)
def test_a_smooth_picture_is_read_at_the_transformed_positions(given: dict[str, float]) -> None:
    """Scale and stretch are matrix exponentials; an image that is not square is not distorted by a rotation."""
    height, width = 40, 60
    x, y = np.meshgrid(np.arange(width) - (width - 1) / 2, np.arange(height) - (height - 1) / 2)
    image = scene(x, y).round().astype(np.uint8)[None, None]
    value = {"flip": 0.0, "scale": 0.0, "turn": 0.0, "stretch": 0.0, "across": 0.0, "right": 0.0, "down": 0.0} | given
    turn, strength = math.radians(value["turn"]), math.log(2) / 5
    rotation = expm(np.array([[0, -turn], [turn, 0]]))
    stretch = np.array([[value["stretch"], value["across"]], [value["across"], -value["stretch"]]])
    matrix = np.diag([1 - 2 * value["flip"], 1]) @ rotation @ expm(strength * (stretch + value["scale"] * np.eye(2)))
    read_x, read_y = np.tensordot(matrix, np.stack([x, y]), 1)
    read_x, read_y = read_x + value["right"] * width / 8, read_y + value["down"] * height / 8
    inside = (abs(read_x) < width / 2 - 2) & (abs(read_y) < height / 2 - 2)
    assert inside.mean() > 0.4
    moved = transform(image, parameters(**given))[0, 0]
    np.testing.assert_allclose(moved[inside], scene(read_x, read_y)[inside], atol=2)


def test_a_white_background_stays_white() -> None:
    x = np.full((64, 3, 9, 7), 255, np.uint8)
    np.testing.assert_array_equal(transform(x, draw(0, 0, 0, 0.9)), x)


@pytest.fixture
def blocks() -> Blocks:
    """150 images in three blocks, of which the last is short."""
    return Blocks(Images(random_images(150), np.arange(150) % 3), 5, 1000)


def test_batches_are_augmented_and_otherwise_the_same(blocks: Blocks) -> None:
    plain, augmented = Batches(blocks, 5, 450)(0), Batches(blocks, 5, 450, augment=0.1)(0)  # three epochs
    assert plain.augmentation.shape == (450, 0)
    assert augmented.augmentation.shape == (450, 8)
    for name in ("t", "eps", "y", "u"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(augmented, name))
    pixels = [((x + 1) * 127.5).round().astype(np.uint8) for x in (plain.x_0, augmented.x_0)]
    np.testing.assert_array_equal(pixels[1], transform(pixels[0], augmented.augmentation))
    same = (pixels[0] == pixels[1]).all(axis=(1, 2, 3))
    np.testing.assert_array_equal(same, ~augmented.augmentation.any(axis=1))
    assert same.mean() == pytest.approx(0.9**5, abs=0.06)
    # Item by item, in whichever order the blocks come.
    drawn = {row.tobytes() for epoch in range(3) for block in range(3) for row in draw(5, epoch, block, 0.1)}
    assert {row.tobytes() for row in augmented.augmentation} <= drawn


@pytest.mark.parametrize("size", [1, 7, 64, 100])
def test_augmented_batches_of_any_size_cut_the_same_stream(blocks: Blocks, size: int) -> None:
    whole = Batches(blocks, 3, 450, augment=0.5)(0)
    parts = [Batches(blocks, 3, size, augment=0.5)(step) for step in range(450 // size)]
    for name, array in whole._asdict().items():
        cut = np.concatenate([getattr(part, name) for part in parts])
        np.testing.assert_array_equal(cut, array[: len(cut)])


@pytest.mark.parametrize("world", [2, 4])
def test_processes_share_an_augmented_batch(blocks: Blocks, world: int) -> None:
    whole = Batches(blocks, 0, 100, augment=0.5)(5)
    shares = [Batches(blocks, 0, 100, augment=0.5, rank=rank, world=world)(5) for rank in range(world)]
    for name, array in whole._asdict().items():
        np.testing.assert_array_equal(np.concatenate([getattr(share, name) for share in shares]), array)
