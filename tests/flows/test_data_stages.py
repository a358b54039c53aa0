"""The stages shard and pairs, run from the command line."""

import hashlib
import json
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from diffusion.pairs.pairs import Pairs
from diffusion.process import build
from flows.params import Params
from flows.stages import STAGES
from tests.training import trees


def digests(directory: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.iterdir()}


def test_the_pairs_of_the_digits_are_reproducible(digits_tree: Path, params: Params) -> None:
    made = []
    for _ in range(2):  # the second run overwrites the results of the first
        shard, pairs = trees.run(digits_tree, "shard"), trees.run(digits_tree, "pairs")
        assert shard.stderr.splitlines()[-1] == (
            "shard: 1452 train, 163 val, 182 test images in 3 shards; 0 files rejected"
        ), shard.stderr
        assert pairs.stderr.splitlines()[-1] == (
            "pairs: 1452 train, 163 val, 182 test images of 1x8x8 in blocks of 64"
        ), pairs.stderr
        made.append(digests(digits_tree / "data" / "shards") | digests(digits_tree / "data" / "pairs"))
    assert made[0] == made[1]

    raw = np.load(digits_tree / "data" / "raw" / "digits.npz")
    expected = {(image.tobytes(), int(label)) for image, label in zip(raw["images"], raw["labels"], strict=True)}
    found = set()
    for split in ("train", "val", "test"):
        part = Pairs(digits_tree / "data" / "pairs", split)
        for block in range(part.blocks):
            found |= {(x.tobytes(), int(y)) for x, y in zip(part.x_0(block), part.labels(block), strict=True)}
    assert found == expected

    val = Pairs(digits_tree / "data" / "pairs", "val")
    assert val.manifest.shards_sha256 == digests(digits_tree / "data" / "shards")["manifest.json"]
    t, x_t, eps = val.heldout(0, 0)
    alpha_bar = build.process(params.process).schedule.alpha_bar.numpy()[t].reshape(-1, 1, 1, 1)
    x_0 = val.x_0(0) / 127.5 - 1
    np.testing.assert_allclose(x_t, np.sqrt(alpha_bar) * x_0 + np.sqrt(1 - alpha_bar) * eps, rtol=1e-5, atol=1e-6)


def test_the_contents_of_a_folder_are_summarized(digits_tree: Path) -> None:
    images = np.load(digits_tree / "data" / "raw" / "digits.npz")["images"]
    for index, image in enumerate([*images[:40], images[0]]):
        path = digits_tree / "data" / "raw" / "own" / "ab"[index % 2] / f"{index:02}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    frames = [Image.fromarray(image) for image in images[40:42]]
    frames[0].save(path.with_name("film.gif"), save_all=True, append_images=frames[1:])
    for number in range(7):
        path.with_name(f"note{number}.txt").write_text("no image")
    text = (digits_tree / "params.yaml").read_text()
    (digits_tree / "params.yaml").write_text(text.replace("data/raw/digits.npz", "data/raw/own"))
    done = trees.run(digits_tree, "shard")
    assert done.returncode == 0, done.stderr
    reason = "not an image by its name or content"
    assert [line for line in done.stderr.splitlines() if not re.match(r"shard: \d+/", line)][:-1] == [
        *(f"shard: rejected: a/note{number}.txt: {reason}" for number in range(5)),
        "shard: rejected: 2 more, listed in data/shards/manifest.json",
        "shard: files with several pages or frames, of which only the first is used: 1",
        "shard: exact copies of other images: 1; all copies of an image are in the same split",
        "shard: 2 classes: a 22, b 20",
        "shard: splits: train, val and test by a hash of each image's pixels",
    ]
    manifest = json.loads((digits_tree / "data" / "shards" / "manifest.json").read_text())
    assert manifest["rejected"] == [{"file": f"a/note{number}.txt", "reason": reason} for number in range(7)]
    assert (manifest["copies"], manifest["multipage"], manifest["own_splits"]) == (1, 1, {})
    assert np.sum([part["per_class"] for part in manifest["splits"].values()], axis=0).tolist() == [22, 20]


def own(tree: Path, **numbers: range) -> Path:
    """A folder of digits in sub-folders, to be the source; `__` stands for `/`."""
    images, folder = np.load(tree / "data" / "raw" / "digits.npz")["images"], tree / "data" / "raw" / "own"
    for name, found in numbers.items():
        for index in found:
            path = folder / name.replace("__", "/") / f"{index:02}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(images[index]).save(path)
    trees.change(tree, {"shard": {"source": "data/raw/own"}})
    return folder


def test_a_stage_that_would_lose_most_images_stops(digits_tree: Path) -> None:
    folder = own(digits_tree, a=range(40))
    for index in range(4):
        (folder / "a" / f"{index}.heic").write_bytes(b"")
    shards, reports = digits_tree / "data" / "shards", digits_tree / "reports"
    shards.mkdir()
    done = trees.run(digits_tree, "shard")
    assert (done.returncode, done.stderr) == (
        1,
        "ddpm shard: error: data/raw/own: 4 of 44 images cannot be used, more than shard.max_rejected (0.05) allows: "
        "repair or remove them, or increase it; 'a/0.heic' and 3 more: HEIC, which Pillow cannot read; convert it to "
        "PNG or JPEG; reports/rejected.csv lists all rejected files\n",
    )
    assert (reports / "rejected.csv").read_text().count(".heic") == 4
    assert ([*shards.iterdir()], [path.name for path in reports.iterdir()]) == ([], ["rejected.csv"])
    trees.change(digits_tree, {"shard": {"max_rejected": 0.1}})
    assert trees.run(digits_tree, "shard").returncode == 0
    assert {path.name for path in reports.iterdir()} == {"data.html", "made_with"}
    assert (reports / "data.html").read_text().count("<td>HEIC, which") == 1 + 4


def test_near_duplicates_and_classes_that_are_not_trained_on_are_named(digits_tree: Path) -> None:
    folder = own(digits_tree, train__a=range(4), val__a=range(4, 6), test__b=range(6, 8))
    for split in ("train", "test"):
        rng = np.random.default_rng(0)
        pixels = rng.integers(0, 200, (40, 40), dtype=np.uint8) + (split == "test")  # one grey level lighter
        Image.fromarray(pixels).save(folder / split / "ab"[split == "test"] / "large.png")
    Image.fromarray(pixels[::-1]).save(folder / "val" / "a" / "large.png")
    done = trees.run(digits_tree, "shard")
    assert (
        "shard: near-duplicates in different splits: 1 of test resemble one of train; see reports/data.html\n"
    ) in done.stderr
    assert "shard: classes without an image to train on: b; add images, or decrease shard.val_fraction" in done.stderr


@pytest.mark.slow
def test_three_images_in_all_are_enough_for_every_stage(digits_tree: Path) -> None:
    own(digits_tree, train=range(1), val=range(1, 2), test=range(2, 3))
    trees.change(digits_tree, trees.TINY)
    train = {"steps": 2, "preview_every": 2, "log_every": 2}
    trees.change(
        digits_tree, {"process": {"num_timesteps": 10}, "train": train, "export": {"variants": [], "steps": 4}}
    )
    for stage in STAGES:
        done = trees.run(digits_tree, stage)
        assert done.returncode == 0, done.stderr
        for split in ("val", "test"):
            told = f"evaluate: {split} has one image, whose figures have no interval; give it more" in done.stderr
            assert told == (stage == "evaluate")
    assert "A single image gives no interval" in (digits_tree / "reports" / "report.html").read_text()


def test_a_linked_folder_is_rejected(digits_tree: Path) -> None:
    for name in ("elsewhere", "data/raw/own/cat"):
        (digits_tree / name).mkdir(parents=True)
        Image.new("L", (4, 4)).save(digits_tree / name / "1.png")
    (digits_tree / "data" / "raw" / "own" / "dog").symlink_to(digits_tree / "elsewhere")
    text = (digits_tree / "params.yaml").read_text()
    (digits_tree / "params.yaml").write_text(text.replace("data/raw/digits.npz", "data/raw/own"))
    done = trees.run(digits_tree, "shard")
    assert done.returncode == 1
    assert done.stderr.startswith(
        "ddpm shard: error: data/raw/own/dog: a link to a folder, whose changes DVC would not"
    )
    assert done.stderr.count("\n") == 1


def test_a_missing_source_gives_one_line_and_keeps_the_old_shards(digits_tree: Path) -> None:
    (digits_tree / "data" / "shards").mkdir()
    (digits_tree / "data" / "raw" / "digits.npz").unlink()
    done = trees.run(digits_tree, "shard")
    assert (done.returncode, done.stderr) == (
        1,
        "ddpm shard: error: data/raw/digits.npz: no such file or folder\n",
    )
    assert {path.name for path in (digits_tree / "data").iterdir()} == {"shards", "raw"}


def test_missing_shards_give_one_line(digits_tree: Path) -> None:
    done = trees.run(digits_tree, "pairs")
    assert done.returncode == 1
    assert done.stderr == (
        "ddpm pairs: error: data/shards/manifest.json: No such file or directory; `dvc repro shard` writes it\n"
    )
