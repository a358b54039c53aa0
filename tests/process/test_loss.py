"""The simple loss against a closed form."""

import pytest
import torch
from torch import Tensor, nn

from diffusion import params
from diffusion.process import build

LINEAR = params.Process(
    schedule="linear", num_timesteps=1000, parameterization="eps", variance="fixed-large", weighting="simple"
)


class OptimalForGaussian(nn.Module):
    """E[eps | x_t] for x_0 ~ N(0, s^2 I): sqrt(1 - alpha_bar) x_t / (alpha_bar s^2 + 1 - alpha_bar)."""

    def __init__(self, s: float, alpha_bar: Tensor) -> None:
        super().__init__()
        self.s, self.alpha_bar = s, alpha_bar

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        a = self.alpha_bar[t].view(-1, 1, 1, 1).float()
        return (1 - a).sqrt() * x_t / (a * self.s**2 + 1 - a)


@pytest.mark.parametrize(("s", "mean_over_t"), [(1.0, 0.275513), (0.5, 0.173053)])
def test_the_optimal_denoiser_of_gaussian_data_has_the_closed_forms_loss(s: float, mean_over_t: float) -> None:
    process = build.process(LINEAR)
    generator = torch.Generator().manual_seed(1)
    t = torch.arange(1000)
    x_0 = s * torch.randn(1000, 3, 40, 40, generator=generator)
    eps = torch.randn(x_0.shape, generator=generator)
    loss = process.loss(OptimalForGaussian(s, process.schedule.alpha_bar), x_0, t, eps)
    a = process.schedule.alpha_bar
    expected = a * s**2 / (a * s**2 + 1 - a)
    assert expected.mean().item() == pytest.approx(mean_over_t, abs=1e-6)
    assert loss.shape == (1000,)
    assert loss.mean().item() == pytest.approx(mean_over_t, rel=5e-3)
    torch.testing.assert_close(loss.double(), expected, rtol=0.12, atol=1e-4)  # 4,800 values each
