"""The training loss against closed forms, and the hybrid loss of a learned variance."""

import pytest
import torch
from scipy import stats
from torch import Tensor

from diffusion.process.loss import huber
from tests.process.fakes import (
    PARAMETERIZATIONS,
    Says,
    always,
    at,
    gaussian_x_0_hat,
    mean_of_eq_7,
    process,
    randn,
    some_x_0_hat,
)

T = torch.tensor([0, 1, 2, 100, 500, 900, 999])
X_0, EPS = randn(7, 2, 4, 4).clamp(-1, 1), randn(7, 2, 4, 4, seed=1)


@pytest.mark.parametrize(("s", "mean_over_t"), [(1.0, 0.275513), (0.5, 0.173053)])
def test_the_optimal_denoiser_of_gaussian_data_has_the_closed_forms_loss(s: float, mean_over_t: float) -> None:
    made = process()
    t = torch.arange(1000)
    x_0, eps = s * randn(1000, 3, 40, 40).float(), randn(1000, 3, 40, 40, seed=1).float()
    loss = made.loss(Says("eps", made.schedule, gaussian_x_0_hat(made.schedule, s)), x_0, t, eps)
    a = made.schedule.alpha_bar
    expected = a * s**2 / (a * s**2 + 1 - a)
    assert expected.mean().item() == pytest.approx(mean_over_t, abs=1e-6)
    assert loss.shape == (1000,)
    assert loss.mean().item() == pytest.approx(mean_over_t, rel=5e-3)
    torch.testing.assert_close(loss.double(), expected, rtol=0.12, atol=1e-4)  # 4,800 values each


@pytest.mark.parametrize("kind", ["mse", "l1", "huber"])
def test_the_kinds_of_loss(kind: str) -> None:
    made = process(loss=kind)
    error = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.25, 1.0, 2.0]).view(-1, 1, 1, 1).double()
    x_0 = torch.zeros_like(error)
    loss = made.loss(always(EPS[:, :1, :1, :1] + error), x_0, T, EPS[:, :1, :1, :1])
    expected = {
        "mse": [9, 1, 0.25, 0, 0.0625, 1, 4],
        "l1": [3, 1, 0.5, 0, 0.25, 1, 2],
        "huber": [5, 1, 0.25, 0, 0.0625, 1, 3],
    }[kind]
    torch.testing.assert_close(loss, torch.tensor(expected, dtype=torch.float64))


def test_huber_is_smooth_where_its_halves_meet() -> None:
    error = torch.tensor([0.999999, 1.000001, -1.000001], requires_grad=True)
    (slope,) = torch.autograd.grad(huber(error).sum(), error)
    torch.testing.assert_close(slope, torch.tensor([2.0, 2.0, -2.0]), rtol=1e-5, atol=0)


def test_the_network_gets_the_class() -> None:
    classes = []

    def net(x_t: Tensor, _: Tensor, y: Tensor | None) -> Tensor:
        classes.append(y)
        return x_t

    y = torch.arange(7)
    process().loss(net, X_0, T, EPS, y)
    process().loss(net, X_0, T, EPS)
    assert classes[0] is y
    assert classes[1] is None


def hybrid_term(made: object, x_0_hat: Tensor, fraction: float) -> Tensor:
    """The bound's term at T in bits per dimension, from Nichol & Dhariwal 2021, eq. 15, and DDPM eq. 5 and 13."""
    schedule = made.schedule  # type: ignore[attr-defined]
    x_t = schedule.diffuse(X_0, T, EPS)
    beta, a, before = schedule.beta[T].view(-1, 1, 1, 1), at(schedule, T), at(schedule, T - 1)
    small = (1 - before) / (1 - a) * beta
    clipped = torch.where(T.view(-1, 1, 1, 1) == 0, small[1], small)  # T holds 0 and then 1
    v = (fraction + 1) / 2
    variance = torch.exp(v * beta.log() + (1 - v) * clipped.log())
    true_mean, mean = (mean_of_eq_7(schedule, x, x_t, T) for x in (X_0, x_0_hat))
    kl = (variance / clipped).log() / 2 + (clipped + (true_mean - mean) ** 2) / (2 * variance) - 0.5
    normal = stats.norm(mean[0].numpy(), variance[0].sqrt().numpy())
    mass = torch.from_numpy(normal.cdf((X_0[0] + 1 / 255).numpy()) - normal.cdf((X_0[0] - 1 / 255).numpy()))
    lower, upper = (
        torch.from_numpy(f((X_0[0] + d).numpy())) for f, d in ((normal.cdf, 1 / 255), (normal.sf, -1 / 255))
    )
    mass = torch.where(X_0[0] == 1, upper, torch.where(X_0[0] == -1, lower, mass))
    kl[0] = -mass.clamp(min=1e-12).log()
    return kl.mean(dim=(1, 2, 3)) / torch.tensor(2.0, dtype=torch.float64).log()


@pytest.mark.parametrize("fraction", [-1.0, 0.3, 1.0])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_hybrid_loss_is_simple_and_a_share_of_the_bound(name: str, fraction: float) -> None:
    made = process(parameterization=name, learned_variance=True)
    simple = made.loss(Says(name, made.schedule, some_x_0_hat), X_0, T, EPS)
    hybrid = made.loss(Says(name, made.schedule, some_x_0_hat, fraction), X_0, T, EPS)
    x_t = made.schedule.diffuse(X_0, T, EPS)
    expected = simple + 0.001 * 1000 * hybrid_term(made, some_x_0_hat(x_t, T), fraction)
    torch.testing.assert_close(hybrid, expected, rtol=1e-6, atol=0)


def test_the_share_of_the_bound_does_not_reach_the_mean() -> None:
    made = process(learned_variance=True)
    both = randn(7, 4, 4, 4, seed=2).requires_grad_()
    mean = both[:, :2].detach().requires_grad_()
    made.loss(always(both), X_0, T, EPS).sum().backward()
    made.loss(always(mean), X_0, T, EPS).sum().backward()
    assert both.grad is not None
    assert mean.grad is not None
    torch.testing.assert_close(both.grad[:, :2], mean.grad, rtol=0, atol=0)
    assert (both.grad[:, 2:].abs().sum(dim=(1, 2, 3)) > 0).all()


def test_the_bound_raises_the_variance_where_the_mean_is_wrong() -> None:
    """The gradient raises the fraction if x_0_hat is as wrong as possible, and lowers it if x_0_hat is exact."""
    made = process(parameterization="x_0", learned_variance=True)
    for wrong, sign in ((2.0, -1), (0.0, 1)):
        fraction = torch.zeros_like(X_0[1:], requires_grad=True)
        out = torch.cat([X_0[1:] + wrong, fraction], dim=1)
        made.loss(always(out), X_0[1:], T[1:], EPS[1:]).sum().backward()
        assert fraction.grad is not None
        assert (fraction.grad.sign() == sign).all()


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_the_hybrid_loss_has_finite_gradients_at_every_timestep_in_float32(name: str, schedule: str) -> None:
    """Also for an untrained network, whose x_0_hat near pure noise is far outside the images' range."""
    made = process(parameterization=name, schedule=schedule, learned_variance=True)
    out = (3 * randn(1000, 2, 2, 2)).float().requires_grad_()
    x_0, eps = randn(1000, 1, 2, 2, seed=1).clamp(-1, 1).float(), randn(1000, 1, 2, 2, seed=2).float()
    loss = made.loss(always(out), x_0, torch.arange(1000), eps)
    loss.sum().backward()
    assert out.grad is not None
    assert loss.dtype == torch.float32
    assert loss.isfinite().all()
    assert out.grad.isfinite().all()
