"""Training on augmented images: what the network is given, and a model that knows nothing of it."""

from pathlib import Path

import pytest
import torch
from torch import Tensor

from diffusion import Model, ProcessOptions, TrainOptions, UNetOptions, fit
from diffusion.errors import UserError
from diffusion.pairs.memory import Blocks
from diffusion.pairs.pairs import Batches
from diffusion.training import loop
from diffusion.training.checkpoints import Checkpoints
from diffusion.training.state import State, new_state
from tests.test_library import images

PROCESS = ProcessOptions(num_timesteps=100)
OPTIONS = TrainOptions(steps=6, batch_size=16, warmup_steps=0, accumulate=2, augment=0.4)
LAYER = "conditions.augmentation.weight"


def new_model() -> Model:
    return Model.new((1, 8, 8), UNetOptions(base_channels=8, channel_multipliers=(1,), attention_levels=()), PROCESS)


def started() -> tuple[State, loop.Trainer]:
    model = new_model()
    state = new_state(model.net.train().requires_grad_(True), OPTIONS, model.process.schedule, augmented=True)  # type: ignore[arg-type]
    batches = Batches(Blocks(images(), 3, 100), 3, OPTIONS.batch_size, augment=0.4)
    return state, loop.Trainer(OPTIONS, 3, model.process.loss, batches, state.net)


def test_the_network_is_given_each_images_augmentation() -> None:
    state, trainer = started()
    given = list[Tensor]()
    state.net.register_forward_pre_hook(lambda _, __, named: given.append(named["augmentation"]), with_kwargs=True)
    loop.step(state, trainer)
    assert len(given) == OPTIONS.accumulate
    assert torch.equal(torch.cat(given), torch.from_numpy(trainer.fetch(0).augmentation))


def test_the_layer_is_trained_and_no_part_of_the_model() -> None:
    state, trainer = started()
    names = new_model().net.state_dict().keys()
    assert not state.net.get_parameter(LAYER).any()
    loop.step(state, trainer)
    assert state.average.state_dict().keys() == names == state.net.state_dict().keys() - {LAYER}
    for name, parameter in state.average.named_parameters():  # the first step leaves nothing of the initial weights
        assert torch.equal(parameter, state.net.get_parameter(name)), name
    for _ in range(3):  # the last layers are zero, too, at first
        loop.step(state, trainer)
    assert state.net.get_parameter(LAYER).any(dim=0).all()


def test_resumed_training_is_the_same(tmp_path: Path) -> None:
    (whole, trainer), (first, other) = started(), started()
    for _ in range(6):
        loop.step(whole, trainer)
    for _ in range(3):
        loop.step(first, other)
    Checkpoints(tmp_path).write(first)
    state, trainer = started()
    assert Checkpoints(tmp_path).restore(state)
    for _ in range(3):
        loop.step(state, trainer)
    ours, theirs = state.tensors(), whole.tensors()
    assert ours.keys() == theirs.keys() >= {f"net.{LAYER}"}
    for name, tensor in ours.items():
        assert torch.equal(tensor, theirs[name]), name


def test_few_images_are_augmented_by_default() -> None:
    default = TrainOptions()
    assert [default.augmentation(images) for images in (1, 499, 500)] == [0.12, 0.12, 0]
    assert OPTIONS.augmentation(10**6) == 0.4
    fitted = [
        fit(new_model(), images(), OPTIONS.model_copy(update={"augment": augment})) for augment in ("auto", 0.12, 0.0)
    ]
    same = [all(map(torch.equal, weights(fitted[0]), weights(other))) for other in fitted[1:]]
    assert same == [True, False]


def test_fitting_leaves_no_layer_behind(tmp_path: Path) -> None:
    model = new_model()
    fitted = fit(model, images(), OPTIONS)
    fitted.save(tmp_path / "model")
    assert Model.load(tmp_path / "model").net.state_dict().keys() == model.net.state_dict().keys()
    with pytest.raises(UserError, match="not finite"):
        fit(model, images(), OPTIONS.model_copy(update={"learning_rate": 1e38}))
    assert LAYER not in model.net.state_dict()


def weights(model: Model) -> list[Tensor]:
    return [*model.net.parameters()]
