"""`ddpm sample` through the command line, with a tiny model of random weights."""

import os
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image

from diffusion.evaluation import plots
from diffusion.model import Config, load_model, save_model
from diffusion.pairs.pixels import Fit
from diffusion.process import build as processes
from diffusion.process.build import ProcessOptions
from diffusion.samples import draw_samples, grid_png
from diffusion.sampling.build import SampleOptions
from flows import yaml_files
from flows.__main__ import main
from flows.commands import sample
from flows.params import Pairs, Shard
from flows.yaml_files import read_yaml, write_yaml
from tests.nn.networks import network, options, randomize

ROOT = Path(__file__).parents[3]
CPU = torch.device("cpu")
PROCESS = ProcessOptions(
    schedule="cosine",
    num_timesteps=40,
    zero_terminal_snr=False,
    parameterization="v",
    learned_variance=False,
    weighting="simple",
    loss="mse",
)
SETTINGS = SampleOptions(
    sampler={"kind": "ddim", "eta": 0.5},
    steps=6,
    spacing="linspace",
    variance="fixed-small",
    threshold="clip",
    guidance=2.0,
    count=5,
)
CLASSES = ("zero", "one", "two")


def save(directory: Path, shape: tuple[int, int, int] = (1, 8, 8), classes: tuple[str, ...] = CLASSES) -> None:
    net = randomize(network(shape, "unet", "film", classes=bool(classes)))
    described = options("unet", "film", classes=bool(classes))
    config = Config(shape=shape, classes=classes, network=described, process=PROCESS, x_0_mse=None)
    save_model(directory, net, config)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("models") / "ddpm"
    save(directory)
    return directory


@pytest.fixture
def tree(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working tree, and the current directory, with a model, parameters, two images and a mask."""
    (tmp_path / "models").mkdir()
    (tmp_path / "models/ddpm").symlink_to(model)
    document = {"seed": 3, "device": "cpu", "sample": SETTINGS.model_dump()}
    yaml_files.write_yaml(tmp_path / "params.yaml", document)
    values = np.random.default_rng(0).integers(256, size=(2, 8, 8), dtype=np.uint8)
    for name, image in zip(("a", "b"), values, strict=True):
        Image.fromarray(image).save(tmp_path / f"{name}.png")
    mask = np.zeros((8, 8), np.uint8)
    mask[2:6, 3:] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pictures(*arguments: str) -> NDArray[np.uint8]:
    """What the command makes, (N, H, W, C)."""
    assert main(["sample", "--out", "made.npz", *arguments]) == 0
    with np.load("made.npz") as arrays:
        return arrays["images"]


def same(some: NDArray[np.uint8], others: NDArray[np.uint8]) -> bool:
    """Whether pictures are the same, but for how float32 sums round in batches of different sizes."""
    return int(np.abs(some.astype(int) - others).max()) <= 1


def test_all_from_params_as_a_grid(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample"]) == 0
    expected = draw_samples(load_model(tree / "models/ddpm", CPU), SETTINGS, 3, CPU)
    assert (tree / "samples.png").read_bytes() == grid_png(expected)
    assert "sample: 6/6 steps" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("sampler", "spacing"),
    [
        *((sampler, "quadratic") for sampler in ("ddpm", "dpm-solver++", "heun")),
        *((sampler, "angle") for sampler in ("ddim", "dpm-solver++-sde", "consistency")),
    ],
)
def test_options_lie_over_params(tree: Path, sampler: str, spacing: str) -> None:
    fields = {"ddim": {"eta": 0.7}, "consistency": {"gamma": 0.7}}.get(sampler, {})
    changes = {"spacing": spacing, "steps": 4, "threshold": "dynamic", "guidance": float(sampler == "consistency")}
    given = [
        text for name, value in ({"sampler": sampler} | changes | fields).items() for text in (f"--{name}", str(value))
    ]
    options = SampleOptions.model_validate(SETTINGS.model_dump() | changes | {"sampler": {"kind": sampler} | fields})
    expected = draw_samples(load_model(tree / "models/ddpm", CPU), options, 8, CPU)
    assert (pictures("--seed", "8", *given) == expected.transpose(0, 2, 3, 1)).all()


@pytest.mark.parametrize("shape", [(1, 8, 8), (3, 6, 9)])
def test_grid_archive_and_folder_hold_the_same(tree: Path, shape: tuple[int, int, int]) -> None:
    save(tree / "other", shape, classes=())
    made = pictures("--model", "other")
    assert made.shape == (5, *shape[1:], shape[0])
    assert "labels" not in np.load("made.npz")
    for out in ("new.folder/", "new.folder", "folder/", "grid.PNG"):
        assert main(["sample", "--model", "other", "--out", out]) == 0
    for folder in ("new.folder", "folder"):
        files = sorted((tree / folder).iterdir())
        assert [file.name for file in files] == [f"{number:05}.png" for number in range(5)]
        read = [np.asarray(Image.open(file)).reshape(made.shape[1:]) for file in files]
        assert (np.stack(read) == made).all()
    assert (tree / "grid.PNG").read_bytes() == grid_png(made.transpose(0, 3, 1, 2))


@pytest.mark.parametrize("how", [(), ("--from", "a.png"), ("--from", "a.png", "--mask", "mask.png", "--rounds", "2")])
def test_a_picture_is_the_same_in_any_batch_and_number(
    tree: Path,  # noqa: ARG001
    monkeypatch: pytest.MonkeyPatch,
    how: tuple[str, ...],
) -> None:
    many = pictures("--count", "9", *how)
    monkeypatch.setattr(sample, "BATCH", 4)
    assert same(pictures("--count", "9", *how), many)
    assert same(pictures("--count", "2", *how), many[:2])
    assert not same(many[3:6], many[6:9])
    assert not same(pictures("--count", "2", "--seed", "4", *how), many[:2])


def test_classes_by_name_and_number_in_turn(tree: Path) -> None:  # noqa: ARG001
    made = pictures()
    assert np.load("made.npz")["labels"].tolist() == [0, 1, 2, 0, 1]
    chosen = pictures("--class", "two, 1", "--class", "1")
    assert np.load("made.npz")["labels"].tolist() == [2, 1, 1, 2, 1]
    assert same(chosen[[1, 4]], made[[1, 4]])
    assert all(not same(chosen[index], made[index]) for index in (0, 2, 3))


def test_guidance(tree: Path) -> None:  # noqa: ARG001
    ignored, heeded, overdone = (pictures("--guidance", value) for value in "013")
    assert not same(ignored, heeded)
    assert not same(heeded, overdone)
    assert same(ignored, pictures("--guidance", "0", "--class", "two"))


def test_an_image_is_the_less_kept_the_more_noise_is_added(tree: Path) -> None:
    image = np.asarray(Image.open(tree / "a.png"))[..., None]
    distances = []
    for at in ("0", "10", "39"):
        made = pictures("--from", "a.png", "--at", at, "--steps", "40")
        assert not same(made[0], made[1])
        distances.append(np.abs(made.astype(int) - image).mean())
    assert distances[0] < 10 < distances[1] < distances[2]
    half = str(int((processes.process(PROCESS).schedule.alpha_bar >= 0.5).sum()) - 1)
    assert (pictures("--from", "a.png") == pictures("--from", "a.png", "--at", half)).all()


def test_a_given_image_has_the_class_that_is_asked_for_or_none(tree: Path) -> None:  # noqa: ARG001
    assert not same(pictures("--from", "a.png"), pictures("--from", "a.png", "--class", "1"))
    assert same(pictures("--from", "a.png"), pictures("--from", "a.png", "--class", "1", "--guidance", "0"))


def test_an_interpolation_goes_from_one_image_to_the_other(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: ARG001
    """Its ends are what the images alone give, of the same noise."""
    monkeypatch.setattr(sample, "BATCH", 4)
    made = pictures("--from", "a.png", "b.png")
    assert same(made[0], pictures("--from", "a.png", "--count", "1")[0])
    assert same(made[4], pictures("--from", "b.png", "--count", "1")[0])
    steps = np.abs(np.diff(made.astype(int), axis=0)).mean(axis=(1, 2, 3))
    assert 0 < steps.max() < np.abs(made[0].astype(int) - made[4]).mean()


def test_inpainting_keeps_what_the_mask_leaves_dark(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = pictures("--from", "a.png", "--mask", "mask.png", "--jump", "4", "--rounds", "3")
    assert "sample: 18/18 steps" in capsys.readouterr().err
    image, mask = (np.asarray(Image.open(tree / f"{name}.png")) for name in ("a", "mask"))
    assert (made[:, mask == 0, 0] == image[mask == 0]).all()
    assert all(not same(picture[mask > 0, 0], image[mask > 0]) for picture in made)
    assert not same(made[0], made[1])


def test_images_and_masks_are_fitted_to_the_model(tree: Path) -> None:
    for name in ("a", "mask"):
        Image.open(tree / f"{name}.png").convert("RGB").resize((16, 16), Image.Resampling.NEAREST).save(
            tree / f"large-{name}.webp", lossless=True
        )
    made = pictures("--from", "large-a.webp", "--mask", "large-mask.webp", "--rounds", "1")
    image = Fit(1, 8, 8)(Image.open(tree / "large-a.webp"))[0]
    kept = np.asarray(Image.open(tree / "mask.png")) == 0
    assert (made[:, kept, 0] == image[kept]).all()
    assert not same(made[0, ~kept, 0], image[~kept])


def test_images_to_edit_are_read_and_resized_as_in_training(tree: Path) -> None:
    sections = {"pairs": Pairs(resize="pad", background="#808080"), "shard": Shard(value_range=(0, 4095))}
    document = read_yaml(tree / "params.yaml")
    document |= {name: section.model_dump(mode="json") for name, section in sections.items()}
    write_yaml(tree / "params.yaml", document)
    image = np.zeros((8, 16), np.uint16)
    image[:, 8:] = 4095
    Image.fromarray(image).save(tree / "deep.png")
    Image.new("L", (16, 8), 0).save(tree / "dark.png")
    (made,) = pictures("--from", "deep.png", "--mask", "dark.png", "--rounds", "1", "--count", "1")[:1]
    expected = Fit(1, 8, 8, "pad", "#808080")(Image.fromarray((image // 4095 * 255).astype(np.uint8)))[0]
    assert (expected[0] == 128).all()
    np.testing.assert_array_equal(made[..., 0], expected)


@pytest.mark.parametrize("asked", [(), ("--class", "1,2,0", "--guidance", "3", "--count", "7")])
def test_the_filmstrip_ends_with_the_images(tree: Path, asked: tuple[str, ...]) -> None:
    with patch.object(plots, "filmstrip", wraps=plots.filmstrip) as draws:
        made = pictures("--filmstrip", "way.png", *asked)
    assert (tree / "way.png").read_bytes() == plots.filmstrip(*draws.call_args.args)
    assert same(draws.call_args.args[0][-1].x_t.transpose(0, 2, 3, 1), made[:4])


def test_a_field_that_params_lacks_is_named(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tree / "params.yaml"
    document = yaml_files.read_yaml(path)
    del document["sample"]["spacing"]
    yaml_files.write_yaml(path, document)
    assert main(["sample"]) == 1
    assert "sample.spacing: missing; `ddpm params --update` adds what is missing" in capsys.readouterr().err


def test_without_params_all_must_be_given(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = pictures()
    (tree / "params.yaml").unlink()
    plain = SETTINGS.model_dump() | {"sampler": "ddim"}
    given = [text for name, value in plain.items() for text in (f"--{name}", str(value))]
    assert (pictures("--seed", "3", "--eta", "0.5", *given) == made).all()
    capsys.readouterr()
    assert main(["sample", *given[2:]]) == 1
    message = "params.yaml: no such file here; without it, these must be given: --sampler, --seed"
    assert capsys.readouterr().err == f"ddpm sample: error: {message}\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--steps 0", "--steps: input should be greater than or equal to 1"),
        ("--steps 41", "--steps: must be at most 40, the model's number of timesteps (got 41)"),
        ("--eta 2", "--eta: input should be less than or equal to 1 (got 2.0)"),
        ("--sampler heun --eta 0.1", "--eta: the sampler heun does not have it; add --sampler ddim"),
        ("--sampler ddim --gamma 1", "--gamma: the sampler ddim does not have it; add --sampler consistency"),
        ("--seed -1 --steps 0", "--seed: input should be greater than or equal to 0 (got -1); --steps: input"),
        ("--device gpu", "--device: input should be auto, cpu, cuda, cuda:N, mps, xpu or xpu:N (got 'gpu')"),
        ("--sampler ddpm --variance learned", "sample.variance: learned needs a model trained with"),
        ("--sampler ddpm --variance analytic", "sample.variance: analytic needs an estimate that this model does not"),
        ("--model nowhere", "nowhere/config.json: No such file or directory"),
        ("--out made.gif", "--out: 'made.gif' must end in .png, in .npz, or in / for a folder"),
        ("--out made", "--out: 'made' must end in .png, in .npz, or in / for a folder"),
        ("--out .png", "--out: '.png' must end in"),
        ("--out a.png/", "--out: a.png is a file, not a folder; choose another"),
        ("--out a.png/b.png", "--out: a.png is a file, not a folder; choose another"),
        ("--out used/", "--out: used/ contains other files, such as 00005.png; choose a new folder, or empty it"),
        ("--filmstrip a.png/b.png", "--filmstrip: a.png is a file, not a folder; choose another"),
        ("--count 1000001", "--count: input should be less than or equal to 1000000"),
        ("--model=", "--model: must not be empty"),
        (
            "--class four",
            "--class: 'four' is not a class of the model; available: zero, one, two, or their numbers from 0",
        ),
        ("--class 3", "--class: '3' is not a class of the model"),
        ("--class one,", "--class: '' is not a class of the model"),
        ("--model plain --class 0", "--class: the model has no classes"),
        ("--from c.png", "c.png: cannot be read (No such file or directory)"),
        (
            "--from params.yaml",
            "params.yaml: not a readable image (not an image, or of a kind that Pillow cannot read)",
        ),
        ("--from a.png b.png a.png", "--from: takes one image, or two to interpolate between (got 3)"),
        ("--from a.png --at 40", "--at: must be a timestep from 0 to 39 (got 40)"),
        ("--from a.png --at -1", "--at: must be a timestep from 0 to 39 (got -1)"),
        ("--at 5", "--at: needs --from, and cannot be combined with --mask"),
        ("--mask mask.png", "--mask: needs the image to inpaint; pass it with --from"),
        ("--from a.png --mask small.png", "small.png: the mask has 5x4 pixels, but its image 8x8"),
        ("--from a.png --mask mask.png --at 5", "--at: needs --from, and cannot be combined with --mask"),
        ("--from a.png --filmstrip way.png", "--filmstrip: shows images from noise; omit --from"),
        ("--from a.png --mask mask.png --jump 0", "--jump: must be from 1 to 1000 (got 0)"),
        ("--from a.png --mask mask.png --rounds 9999999999999999999999", "--rounds: must be from 1 to 1000 (got 9"),
        ("--filmstrip samples.png", "--filmstrip: samples.png is a folder or the file of --out; choose another name"),
    ],
)
def test_what_is_wrong_gets_one_line(
    tree: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    save(tree / "plain", classes=())
    Image.new("L", (5, 4)).save(tree / "small.png")
    (tree / "used").mkdir()
    for name in ("00000.png", "00005.png"):  # params.yaml asks for five images, of which the last is 00004.png
        (tree / "used" / name).touch()
    assert main(["sample", *arguments.split()]) == (2 if message.startswith("--") else 1)
    (error,) = capsys.readouterr().err.splitlines()
    assert error.startswith("ddpm sample: error: ")
    assert message in error
    assert not (tree / "samples.png").exists()


@pytest.mark.parametrize("sampler", ["", "nosuch", "[1]", "{eta: 1}", "2020-01-01"])
def test_a_wrong_sampler_in_params_is_not_blamed_on_an_option(
    tree: Path, sampler: str, capsys: pytest.CaptureFixture[str]
) -> None:
    document = yaml_files.read_yaml(tree / "params.yaml")
    document["sample"]["sampler"] = "PLACE"
    yaml_files.write_yaml(tree / "params.yaml", document)
    text = (tree / "params.yaml").read_text().replace("PLACE", sampler)
    (tree / "params.yaml").write_text(text)
    assert main(["sample", "--eta", "0.5"]) == 1
    assert capsys.readouterr().err.startswith("ddpm sample: error: params.yaml: sample.sampler")


def test_wrong_names_list_the_right_ones(capsys: pytest.CaptureFixture[str]) -> None:
    for option, right in (("--sampler", "dpm-solver++"), ("--spacing", "log-snr"), ("--threshold", "dynamic")):
        assert main(["sample", option, "other"]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith(f'ddpm sample: error: Invalid value "other" for {option}. Choose from: ')
        assert right in line


def test_the_command_itself(tree: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["sample", "--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"--{name} " in shown for name in (*SampleOptions.model_fields, "class", "from", "mask", "out", "seed"))
    command = [sys.executable, "-m", "flows", "sample", "--count", "1", "--out", "one.png"]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tree / "one.png").exists()
