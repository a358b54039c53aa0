"""Properties of every network."""

import pytest
import torch

from tests.nn.networks import CONDITIONINGS, network, noise, randomize

every_network = pytest.mark.parametrize(("kind", "conditioning"), CONDITIONINGS)


@every_network
@pytest.mark.parametrize("shape", [(1, 8, 8), (2, 7, 16), (3, 15, 9), (4, 10, 12)])
@pytest.mark.parametrize("patch_size", [1, 2, 3])
def test_output_has_the_shape_of_the_input(
    kind: str, conditioning: str, shape: tuple[int, int, int], patch_size: int
) -> None:
    net = randomize(network(shape, kind, conditioning, patch_size=patch_size))
    x_t = noise(2, *shape)
    out = net(x_t, torch.tensor([3, 500]))
    assert out.shape == x_t.shape
    assert out.std() > 0


@every_network
def test_a_learned_variance_doubles_the_channels(kind: str, conditioning: str) -> None:
    net = randomize(network((3, 8, 9), kind, conditioning, learned_variance=True, patch_size=2))
    assert net(noise(2, 3, 8, 9), torch.tensor([3, 500])).shape == (2, 6, 8, 9)


@every_network
@pytest.mark.parametrize("learned_variance", [False, True])
def test_a_new_network_predicts_zero(kind: str, conditioning: str, learned_variance: bool) -> None:
    net = network((1, 8, 8), kind, conditioning, learned_variance, classes=True)
    assert not net(noise(2, 1, 8, 8), torch.tensor([0, 9]), torch.tensor([0, -1])).any()


@every_network
def test_each_image_is_treated_alone_and_by_its_own_timestep_and_class(kind: str, conditioning: str) -> None:
    net = randomize(network((1, 8, 8), kind, conditioning, classes=True)).double()
    x_t = noise(1, 1, 8, 8).double().expand(4, -1, -1, -1)
    t, y = torch.tensor([5, 5, 900, 5]), torch.tensor([1, 1, 1, 2])
    out = net(x_t, t, y)
    torch.testing.assert_close(out[0], out[1])
    assert (out[0] - out[2]).abs().max() > 1e-4
    assert (out[0] - out[3]).abs().max() > 1e-4
    for index in range(4):
        alone = net(x_t[[index]], t[[index]], y[[index]])[0]
        torch.testing.assert_close(alone, out[index])


@every_network
def test_every_parameter_takes_part(kind: str, conditioning: str) -> None:
    changes = {"channel_multipliers": [1, 1, 2], "attention_levels": [0, 2], "depth": 5, "classes": True}
    net = randomize(network((1, 8, 8), kind, conditioning, learned_variance=True, **changes))
    net(noise(2, 1, 8, 8), torch.tensor([1, 2]), torch.tensor([0, -1])).square().mean().backward()
    without = {name for name, parameter in net.named_parameters() if parameter.grad is None or not parameter.grad.any()}
    assert without == set()


@every_network
def test_augmentation_conditions_each_image_and_starts_without_effect(kind: str, conditioning: str) -> None:
    net = randomize(network((1, 8, 8), kind, conditioning, classes=True))
    names = net.state_dict().keys()
    x_t, t, y, augmentation = noise(3, 1, 8, 8), torch.tensor([5, 9, 7]), torch.tensor([0, 1, -1]), noise(3, 8)
    augmentation[1] = 0
    plain = net(x_t, t, y)
    net.conditions.accept_augmentation(8)
    assert net.state_dict().keys() - names == {"conditions.augmentation.weight"}
    assert torch.equal(net(x_t, t, y, augmentation), plain)
    randomize(net.conditions.augmentation)
    change = (net(x_t, t, y, augmentation) - plain).abs().amax(dim=(1, 2, 3))
    assert change[0] > 1e-4 < change[2]
    assert change[1] == 0
    net.conditions.drop_augmentation()
    assert net.state_dict().keys() == names


@every_network
def test_dropout_is_for_training_alone(kind: str, conditioning: str) -> None:
    net = randomize(network((1, 8, 8), kind, conditioning, dropout=0.5))
    x_t, t = noise(1, 1, 8, 8), torch.tensor([5])
    assert torch.equal(net(x_t, t), net(x_t, t))
    net.train()
    assert not torch.equal(net(x_t, t), net(x_t, t))


@every_network
def test_heads_divide_the_same_weights_otherwise(kind: str, conditioning: str) -> None:
    x_t, t, changes = noise(1, 1, 8, 8), torch.tensor([5]), {"channel_multipliers": [1, 1]}
    single, whole, halves = (
        randomize(network((1, 8, 8), kind, conditioning, head_channels=n, **changes))(x_t, t) for n in (0, 16, 8)
    )
    assert torch.equal(single, whole)
    assert (single - halves).abs().max() > 1e-6
