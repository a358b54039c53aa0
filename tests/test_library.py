"""The library without the pipeline: the lines in the README, a custom loop, and the stage `train`'s batches."""

import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from diffusion import Model, ProcessOptions, TrainOptions, UNetOptions, fit, load_images
from diffusion.errors import UserError
from diffusion.pairs.memory import Blocks, Images
from diffusion.pairs.pairs import Batch, Batches, Pairs
from diffusion.process import build as processes
from diffusion.training import loop
from diffusion.training.state import State
from tests.training import trees

SMALL = UNetOptions(base_channels=8, channel_multipliers=(1,), attention_levels=())
FEW = TrainOptions(steps=3, batch_size=16, warmup_steps=1)


def images(count: int = 70) -> Images:
    """Random images of two classes."""
    generator = np.random.default_rng(0)
    pixels = generator.integers(0, 256, (count, 1, 8, 8), np.uint8)
    return Images(pixels, np.arange(count) % 2, ("a", "b"))


def test_the_lines_in_the_readme(root: Path, tmp_path: Path) -> None:
    """With fewer steps, in a separate Python process, which must not load the pipeline's packages."""
    (code,) = re.findall(r"```python\n(from diffusion import.*?)```", (root / "README.md").read_text(), flags=re.S)
    assert len([line for line in code.splitlines() if line]) <= 10
    few = re.sub(r"steps=\d+\)", "steps=2)", code.replace("data/raw/", f"{root}/data/raw/"))
    loaded = "\nimport sys; print({'mlflow', 'prefect', 'dvc', 'flows'} & {name.split('.')[0] for name in sys.modules})"
    command = [sys.executable, "-c", few + loaded]
    environment = trees.ENVIRONMENT | {"PATH": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "set()\n"
    assert (tmp_path / "pictures.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(("epochs", "steps"), [(1, 5), (2, 9), (16, 70)])
def test_epochs_are_steps_rounded_up(epochs: int, steps: int) -> None:
    """70 images in batches of 16: 4.375 steps an epoch. The learning rate, too, is that of so many steps."""
    given = FEW.model_copy(update={"steps": 0, "epochs": epochs})
    options = given.for_images(70)
    assert options.steps == steps
    assert FEW.for_images(70) is FEW
    if epochs < 3:
        start = Model.new((1, 8, 8), SMALL, seed=1)
        ours, theirs = (
            fit(Model.new((1, 8, 8), SMALL, seed=1), images(), chosen)
            for chosen in (given, FEW.model_copy(update={"steps": steps}))
        )
        for name, weight in ours.net.state_dict().items():
            assert torch.equal(weight, theirs.net.state_dict()[name]), name
        assert any(not torch.equal(*pair) for pair in zip(ours.net.parameters(), start.net.parameters(), strict=True))


def test_a_model_is_saved_and_loaded_and_draws_the_same(tmp_path: Path) -> None:
    model = fit(Model.new((1, 8, 8), SMALL, classes=("a", "b")), images(), FEW)
    model.save(tmp_path / "model")
    loaded = Model.load(tmp_path / "model")
    options = {"sampler": "ddim", "steps": 4, "seed": 7}
    pictures = model.sample(5, **options)
    assert pictures.shape == (5, 1, 8, 8)
    assert np.array_equal(loaded.sample(5, **options), pictures)
    assert np.array_equal(loaded.sample(3, **options), pictures[:3])
    assert not np.array_equal(loaded.sample(5, **options | {"seed": 8}), pictures)


def test_fitting_learns_and_is_the_same_twice() -> None:
    def weights(seed: int) -> torch.Tensor:
        net = fit(Model.new((1, 8, 8), SMALL), images(), FEW, seed).net
        return torch.cat([parameter.flatten() for parameter in net.parameters()])

    assert torch.equal(weights(0), weights(0))
    plain = fit(Model.new((1, 8, 8), SMALL), images(), FEW).net
    assert torch.equal(weights(0), torch.cat([parameter.flatten() for parameter in plain.parameters()]))
    assert not torch.equal(weights(0), weights(1))
    start = Model.new((1, 8, 8), SMALL).net
    assert not torch.equal(weights(0), torch.cat([parameter.flatten() for parameter in start.parameters()]))


def test_fitting_takes_the_batches_and_options_of_the_stage(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    trainers, batches, states = list[loop.Trainer](), list[Batch](), list[State]()
    step = loop.step

    def seen(state: State, trainer: loop.Trainer) -> None:
        trainers.append(trainer)
        batches.append(trainer.fetch(state.step))
        states.append(state)
        step(state, trainer)

    monkeypatch.setattr(loop, "step", seen)
    known = SMALL.model_copy(update={"classes": True})
    options = FEW.model_copy(update={"flip": True, "class_dropout": 0.5, "augment": 0.2, "precision": "bf16"})
    model = Model.new((1, 8, 8), known, classes=("a", "b"))
    fitted = fit(model, images(), options, seed=5)
    assert fitted.net is states[-1].average is not model.net
    assert capsys.readouterr().err.startswith("fit: 48/48 images, ")
    assert trainers[0].precision == torch.bfloat16
    assert (trainers[0].options, trainers[0].seed, trainers[0].loss) == (options, 5, model.process.loss)
    expected = Batches(Blocks(images(), 5, 1000), 5, 16, flip=True, class_dropout=0.5, augment=0.2)
    for number, batch in enumerate(batches):
        for one, other in zip(batch, expected(number), strict=True):
            assert np.array_equal(one, other)
    assert len(batches) == 3


@pytest.mark.parametrize(
    ("steps", "message"),
    [
        (10, "the loss or gradient was not finite for 7 steps in a row before step 8"),  # all but the first
        (3, "the loss or gradient was not finite at the end"),
        (1, "the loss or gradient was not finite at the end"),  # the weights are not
    ],
)
def test_fitting_that_diverges_says_what_to_lower(steps: int, message: str) -> None:
    options = TrainOptions(steps=steps, batch_size=16, log_every=4, warmup_steps=0, learning_rate=1e38)
    rates = r"lower learning_rate \(now 1e\+38\) and optimizer\.learning_rate \(now 0\.01\)"
    with pytest.raises(UserError, match=rf"^{message}; {rates}$"):
        fit(Model.new((1, 8, 8), SMALL), images(), options)


def test_fitting_drops_an_estimate_that_was_of_other_weights() -> None:
    model = Model.new((1, 8, 8), SMALL)
    estimated = replace(model, config=model.config.model_copy(update={"x_0_mse": (0.5,) * 1000}))
    assert fit(estimated, images(), FEW).config.x_0_mse is None


def test_what_does_not_fit_together_is_refused() -> None:
    known = SMALL.model_copy(update={"classes": True})
    for model, given in (
        (Model.new((3, 8, 8), SMALL), images()),
        (Model.new((1, 8, 8), SMALL), images(0)),
        (Model.new((1, 8, 8), known, classes=("a",)), images()),
    ):
        with pytest.raises(ValueError, match=r"^fit: "):
            fit(model, given, FEW)
    few = Model.new((1, 8, 8), SMALL, ProcessOptions(num_timesteps=30))
    with pytest.raises(UserError, match=r"^steps \(50\) exceeds num_timesteps \(30\)"):
        few.sample(1)


def test_a_new_model_is_in_evaluation_mode() -> None:
    assert not Model.new((1, 8, 8), SMALL).net.training


def test_batches_in_memory_are_those_of_the_stored_pairs(pairs_tree: Path) -> None:
    pairs = Pairs(pairs_tree / "data" / "pairs", "train")
    x_0 = np.concatenate([pairs.x_0(block) for block in range(pairs.blocks)])
    y = np.concatenate([pairs.labels(block) for block in range(pairs.blocks)])
    blocks = Blocks(Images(x_0, y), pairs.manifest.seed, pairs.manifest.num_timesteps)
    for step in (0, 30, 100):
        stored, here = (Batches(each, 3, 48, flip=True, class_dropout=0.5) for each in (pairs, blocks))
        for one, other in zip(stored(step), here(step), strict=True):
            assert np.array_equal(one, other)


def test_images_are_loaded_as_the_pipeline_loads_them(root: Path) -> None:
    loaded, raw = load_images(root / "data/raw/digits.npz", 8, 8, channels=1), np.load(root / "data/raw/digits.npz")
    assert np.array_equal(loaded.pixels[:, 0], raw["images"])
    assert [loaded.classes[label] for label in loaded.y] == list(map(str, raw["labels"]))
    assert load_images(root / "data/raw/digits.npz", 4, 6).shape == (3, 4, 6)


def test_images_without_labels_are_loaded_and_unreadable_ones_named(tmp_path: Path) -> None:
    for name in ("a.png", "b.png"):
        Image.new("L", (3, 2), 9).save(tmp_path / name)
    loaded = load_images(tmp_path, 2, 3, channels=1)
    assert (loaded.y.tolist(), loaded.y.dtype, loaded.classes) == ([-1, -1], np.int64, ())
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes()[:-30])
    with pytest.raises(UserError, match=r"^b\.png: image file is truncated$"):
        load_images(tmp_path, 2, 3)


def test_an_own_network_in_an_own_loop() -> None:
    """A linear network learns to predict the noise where x_t is nothing but noise."""

    class Linear(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Conv2d(1, 1, 1)

        def forward(self, x_t: torch.Tensor, t: torch.Tensor, y: torch.Tensor | None = None) -> torch.Tensor:  # noqa: ARG002
            return self.layer(x_t)

    process = processes.process(ProcessOptions(parameterization="eps"))
    model = replace(Model.new((1, 8, 8), SMALL), net=Linear(), process=process)
    optimizer = torch.optim.SGD(model.net.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(0)
    for _ in range(100):
        eps = torch.randn(16, 1, 8, 8, generator=generator)
        loss = model.loss(torch.zeros_like(eps), torch.full((16,), 999), eps).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert model.net.layer.weight.item() == pytest.approx(1, abs=0.01)  # x_t is eps, all but 1e-3
    with pytest.raises(
        TypeError,
        match=r"^fit only trains networks of diffusion\.nn; .* write a training loop with Model\.loss$",
    ):
        fit(model, images())
