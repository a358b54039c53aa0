"""Class labels, and their absence."""

import pytest
import torch

from tests.nn.networks import CONDITIONINGS, NUM_CLASSES, network, noise, randomize

every_network = pytest.mark.parametrize(("kind", "conditioning"), CONDITIONINGS)


@every_network
def test_no_class_is_the_null_class(kind: str, conditioning: str) -> None:
    net = randomize(network((1, 8, 8), kind, conditioning, classes=True))
    x_t, t = noise(2, 1, 8, 8), torch.tensor([3, 500])
    out = net(x_t, t)
    for none in (-1, -7, NUM_CLASSES):
        assert torch.equal(net(x_t, t, torch.tensor([none, none])), out)
    for y in range(NUM_CLASSES):
        mixed = net(x_t, t, torch.tensor([y, -1]))
        assert (mixed[0] - out[0]).abs().max() > 1e-4
        torch.testing.assert_close(mixed[1], out[1])


@every_network
def test_a_network_without_classes_ignores_them(kind: str, conditioning: str) -> None:
    net = randomize(network((1, 8, 8), kind, conditioning, classes=False))
    x_t, t = noise(2, 1, 8, 8), torch.tensor([3, 500])
    assert torch.equal(net(x_t, t, torch.tensor([0, 2])), net(x_t, t))
    assert not [name for name, _ in net.named_parameters() if "label" in name]


@every_network
def test_there_is_a_row_for_each_class_and_one_for_none(kind: str, conditioning: str) -> None:
    net = network((1, 8, 8), kind, conditioning, classes=True)
    assert net.get_parameter("conditions.label.table.weight").shape[0] == NUM_CLASSES + 1
