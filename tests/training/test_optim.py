"""Learning rates and optimizers."""

import numpy as np
import pytest
import torch
from torch import nn

from diffusion.training import optim
from diffusion.training.options import MuonOptions, SgdOptions, TrainOptions
from flows.params import Params
from tests.nn.networks import CONDITIONINGS, network


@pytest.fixture
def options(params: Params) -> TrainOptions:
    changes = {"steps": 100, "warmup_steps": 10, "learning_rate": 1.0, "decay": "constant", "weight_decay": 0.1}
    return params.train.model_copy(update=changes)


def test_the_rate_rises_linearly_and_reaches_its_peak(options: TrainOptions) -> None:
    rates = [optim.lr_factor(step, options) for step in range(12)]
    assert rates == pytest.approx([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9, 1.0, 1.0, 1.0])


@pytest.mark.parametrize(
    ("decay", "halfway", "late"), [("constant", 1, 1), ("linear", 0.5, 0.1), ("cosine", 0.5, 0.0245)]
)
def test_the_rate_falls_as_asked(options: TrainOptions, decay: str, halfway: float, late: float) -> None:
    options = options.model_copy(update={"decay": decay})
    assert optim.lr_factor(55, options) == pytest.approx(halfway)
    assert optim.lr_factor(91, options) == pytest.approx(late, rel=0.01)


def test_every_group_gets_its_share_of_its_own_peak(options: TrainOptions) -> None:
    net = network((1, 8, 8), "unet", "film")
    options = options.model_copy(update={"optimizer": MuonOptions(learning_rate=0.02)})
    made = optim.optimizers(net, net.blocks(), options)
    for share in (0.25, 0.5):
        for parameter in net.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optim.step(made, share, torch.tensor(1.0))
    assert [group["lr"] for optimizer in made for group in optimizer.param_groups] == [0.5, 0.5, 0.01]


@pytest.mark.parametrize(("kind", "conditioning"), CONDITIONINGS)
@pytest.mark.parametrize("optimizer", ["adamw", "muon", "sgd"])
def test_every_parameter_is_in_one_group(options: TrainOptions, kind: str, conditioning: str, optimizer: str) -> None:
    net = network((1, 8, 8), kind, conditioning, classes=True)
    options = type(options).model_validate(options.model_dump() | {"optimizer": optimizer})
    made = optim.optimizers(net, net.blocks(), options)
    names = {parameter: name for name, parameter in net.named_parameters()}
    groups = [[names[parameter] for parameter in group["params"]] for one in made for group in one.param_groups]
    assert sorted(name for group in groups for name in group) == sorted(names.values())
    # Weights of linear layers and convolutions decay, nothing else: no positions, no table of classes.
    decaying = [names[module.weight] for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    muons = groups[2] if optimizer == "muon" else []
    assert sorted(groups[0] + muons) == sorted(decaying)
    assert [group["weight_decay"] for group in made[0].param_groups] == [0.1, 0.0]
    inside = ("down.", "middle.", "up.", "first.", "merge.", "last.")
    assert bool(muons) == (optimizer == "muon")
    assert all(name.startswith(inside) for name in muons)
    assert not any(name.startswith(inside) for name in groups[0]) or optimizer != "muon"


@pytest.mark.parametrize("shape", [(3, 8, 8), (2, 5, 12), (4, 30, 6)])
def test_orthogonal_is_nearly_the_polar_factor(shape: tuple[int, int, int]) -> None:
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    exact = torch.stack(optim.orthogonalize([*matrices.double()]))
    for matrix, close in zip(matrices.double().numpy(), exact.numpy(), strict=True):
        u, _, v = np.linalg.svd(matrix, full_matrices=False)
        singular = np.diag(u.T @ close @ v.T)  # same singular vectors, and values that the polynomial brings near 1
        np.testing.assert_allclose(u @ np.diag(singular) @ v, close, atol=1e-10)
        assert 0.3 < singular.min() <= singular.max() < 1.3
    # Each step of the polynomial multiplies the rounding of the one before by up to 3.4445, its slope at zero.
    rounding = torch.finfo(torch.float32).eps * 3.4445**5
    assert 0 < (torch.stack(optim.orthogonalize([*matrices])) - exact).abs().max() < rounding


def test_matrices_of_several_shapes_are_made_orthogonal_together() -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(3, 8), (8, 3), (5, 5), (1, 12), (8, 3), (9, 4)]
    matrices = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]
    for together, matrix in zip(optim.orthogonalize(matrices), matrices, strict=True):
        (alone,) = optim.orthogonalize([matrix])
        assert together.shape == matrix.shape
        torch.testing.assert_close(together, alone, rtol=0, atol=1e-12)


def test_all_matrices_are_padded_to_one_bank_where_launches_count() -> None:
    shapes = [torch.Size(shape) for shape in [(3, 8), (8, 3), (5, 5), (8, 3)]]
    assert optim.group_matrices(shapes, launched=False) == [[0], [1, 3], [2]]
    assert optim.group_matrices(shapes, launched=True) == [[0, 1, 2, 3]]
    large = [torch.Size([64, 2**19]), torch.Size([16, 65])]  # as wide matrices; 2 x 64 x 2^19 elements
    assert optim.group_matrices(large[:1] * 2, launched=True) == [[0, 1]]
    assert optim.group_matrices(large * 2, launched=True) == [[0, 2], [1, 3]]


@pytest.mark.parametrize("optimizer", ["muon", "sgd"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_step_whose_gradient_is_not_finite_changes_nothing(options: TrainOptions, bad: float, optimizer: str) -> None:
    net = network((1, 8, 8), "unet", "film")
    options = type(options).model_validate(options.model_dump() | {"optimizer": optimizer})
    made = optim.optimizers(net, net.blocks(), options)

    def step(norm: float) -> list[torch.Tensor]:
        """Copies of the weights and the optimizers' state."""
        generator = torch.Generator().manual_seed(0)
        for number, parameter in enumerate(net.parameters()):
            parameter.grad = torch.randn(parameter.shape, generator=generator)
            if not np.isfinite(norm) and number % 3:
                parameter.grad[0] = norm
        optim.step(made, 1.0, torch.tensor(norm))
        moments = [value for one in made for state in one.state.values() for value in state.values()]
        return [tensor.detach().clone() for tensor in [*net.parameters(), *moments]]

    first, skipped, second = step(1.0), step(bad), step(1.0)
    assert len(first) == len(skipped) > 100
    assert all(one.equal(other) for one, other in zip(first, skipped, strict=True))
    assert not any(one.equal(other) for one, other in zip(skipped, second, strict=True))
    assert all(parameter.grad is None for parameter in net.parameters())


def stepped(options: TrainOptions, gradients: np.ndarray, rates: list[float]) -> np.ndarray:
    """The weights of a linear layer, which start at 1, after a step with each of the gradients, (steps, n)."""
    net = nn.Linear(gradients.shape[1], 1, bias=False, dtype=torch.float64)
    nn.init.ones_(net.weight)
    made, weights = optim.optimizers(net, [], options), []
    for gradient, rate in zip(gradients, rates, strict=True):
        net.weight.grad = torch.from_numpy(gradient)[None].clone()
        optim.step(made, rate, net.weight.grad.norm())
        weights.append(net.weight.detach().numpy()[0].copy())
    return np.stack(weights)


@pytest.mark.parametrize("weight_decay", [0.0, 0.3])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_sgd_is_its_recursion(momentum: float, weight_decay: float) -> None:
    """w_{n+1} = w_n - rate (g + decay w_n) + momentum (w_n - w_{n-1}); the heavy ball of Polyak 1964."""
    gradients, rate = np.random.default_rng(0).standard_normal((20, 3)), 0.05
    options = TrainOptions(optimizer=SgdOptions(momentum=momentum), learning_rate=2 * rate, weight_decay=weight_decay)
    found = stepped(options, gradients, [0.5] * 20)
    weight = before = np.ones(3)
    for gradient, after in zip(gradients, found, strict=True):
        step = momentum * (weight - before) - rate * (gradient + weight_decay * weight)
        before, weight = weight, weight + step
        np.testing.assert_allclose(after, weight, rtol=1e-12)


def test_adamw_without_weight_decay_is_adam() -> None:
    """Kingma & Ba 2015, algorithm 1."""
    gradients = np.random.default_rng(0).standard_normal((20, 3))
    options = TrainOptions(optimizer="adamw", learning_rate=0.01, weight_decay=0.0)
    weight, m, v = np.ones(3), np.zeros(3), np.zeros(3)
    for step, (g, after) in enumerate(zip(gradients, stepped(options, gradients, [1.0] * 20), strict=True), start=1):
        m, v = 0.9 * m + 0.1 * g, 0.999 * v + 0.001 * g**2
        weight = weight - 0.01 * (m / (1 - 0.9**step)) / (np.sqrt(v / (1 - 0.999**step)) + 1e-8)
        np.testing.assert_allclose(after, weight, rtol=1e-12)


def test_a_first_step_that_is_skipped_leaves_no_momentum() -> None:
    gradients = np.array([[np.nan, 1.0], [2.0, 4.0]])
    options = TrainOptions(optimizer="sgd", learning_rate=0.5, weight_decay=0.0)
    np.testing.assert_array_equal(stepped(options, gradients, [1.0, 1.0]), [[1.0, 1.0], [0.0, -1.0]])


def test_muon_is_torchs_own_on_matrices(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.Tensor, "bfloat16", torch.Tensor.double)  # in which torch.optim.Muon computes
    generator = torch.Generator().manual_seed(0)
    start = [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in [(6, 12), (6, 12), (20, 5)]]
    ours, theirs = ([nn.Parameter(tensor.clone()) for tensor in start] for _ in range(2))
    muon, oracle = optim.Muon(ours, lr=0.02), torch.optim.Muon(theirs, lr=0.02, weight_decay=0.0, momentum=0.95)
    for _ in range(3):
        for one, other in zip(ours, theirs, strict=True):
            one.grad = torch.randn(one.shape, generator=generator, dtype=one.dtype)
            other.grad = one.grad.clone()
        muon.step()
        oracle.step()
    for one, other, first in zip(ours, theirs, start, strict=True):
        assert (one - first).abs().max() > 0.01
        torch.testing.assert_close(one, other, atol=1e-6, rtol=0)  # ours adds 1e-7 to the norm


def test_muon_takes_a_kernel_for_the_matrix_of_its_rows() -> None:
    start = torch.randn(6, 3, 2, 2, generator=torch.Generator().manual_seed(0))
    kernel = nn.Parameter(start.to(memory_format=torch.channels_last))
    matrix = nn.Parameter(start.flatten(1))
    for parameter in (kernel, matrix):
        parameter.grad = (parameter.detach() ** 2).clone()
        optim.Muon([parameter], lr=0.1).step()
    torch.testing.assert_close(kernel.detach().flatten(1), matrix.detach())
