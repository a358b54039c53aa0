"""Thresholding and classifier-free guidance."""

import math

import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from diffusion.process.denoiser import THRESHOLDS, Guided, clip, dynamic_threshold, unbounded
from tests.process.fakes import PARAMETERIZATIONS, Says, at, process, randn, some_x_0_hat

SHAPE = (5, 2, 10, 10)
T = torch.tensor([0, 1, 300, 800, 999])


@pytest.mark.parametrize("threshold", sorted(THRESHOLDS))
@pytest.mark.parametrize("name", PARAMETERIZATIONS)
def test_image_and_noise_belong_together_after_thresholding(name: str, threshold: str) -> None:
    made = process(parameterization=name)
    denoiser = made.denoiser(
        Says(name, made.schedule, lambda x_t, t: 3 * some_x_0_hat(x_t, t), 0.25), THRESHOLDS[threshold]
    )
    x_t = randn(*SHAPE)
    x_0_hat, eps_hat, fraction = denoiser(x_t, T)
    torch.testing.assert_close(x_0_hat, THRESHOLDS[threshold](3 * some_x_0_hat(x_t, T)), rtol=1e-6, atol=1e-9)
    a = at(made.schedule, T)
    torch.testing.assert_close(a.sqrt() * x_0_hat + (1 - a).sqrt() * eps_hat, x_t)
    assert fraction is not None
    assert fraction.equal(torch.full_like(x_t, 0.25))
    if threshold != "none":
        assert x_0_hat.abs().max() <= 1


def test_a_network_without_variance_gives_no_fraction() -> None:
    made = process()
    assert made.denoiser(Says("eps", made.schedule, some_x_0_hat))(randn(*SHAPE), T).variance_fraction is None


def test_clip_and_unbounded() -> None:
    x_0_hat = torch.tensor([-2.0, -1.0, 0.3, 1.5]).view(1, 1, 2, 2)
    assert clip(x_0_hat).flatten().tolist() == pytest.approx([-1, -1, 0.3, 1])
    assert unbounded(x_0_hat) is x_0_hat


def test_dynamic_thresholding_is_imagens() -> None:
    """s: the smallest value that at least 99.5 % of an image's absolute values do not exceed, at least 1."""
    x_0_hat = randn(6, 2, 10, 10) * torch.tensor([0.1, 0.3, 1, 2, 5, 50]).view(-1, 1, 1, 1)
    found = dynamic_threshold(x_0_hat)
    for image, kept in zip(x_0_hat, found, strict=True):
        values = sorted(abs(value) for value in image.flatten().tolist())
        s = max(1.0, next(v for i, v in enumerate(values, start=1) if i / len(values) >= 0.995))
        expected = [max(-s, min(s, value)) / s for value in image.flatten().tolist()]
        assert kept.flatten().tolist() == pytest.approx(expected)
    assert found[:2].equal(x_0_hat[:2])  # small ones stay as they are


def test_dynamic_thresholding_agrees_with_diffusers() -> None:
    """diffusers interpolates between the two values next to the quantile; with 401 values it is one of them."""
    scheduler = DDPMScheduler(thresholding=True, dynamic_thresholding_ratio=0.995, sample_max_value=math.inf)
    x_0_hat = 4 * randn(6, 1, 1, 401)
    torch.testing.assert_close(dynamic_threshold(x_0_hat), scheduler._threshold_sample(x_0_hat))


class OfClass(nn.Module):
    """(y + 2) x_t + t, and a variance fraction of y."""

    def __init__(self, learned: bool = False) -> None:
        super().__init__()
        self.learned, self.images = learned, 0

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor) -> Tensor:
        self.images += len(x_t)
        out = (y.view(-1, 1, 1, 1) + 2) * x_t + t.view(-1, 1, 1, 1)
        return torch.cat([out, y.view(-1, 1, 1, 1) * torch.ones_like(x_t)], dim=1) if self.learned else out


@pytest.mark.parametrize("learned", [False, True])
@pytest.mark.parametrize(
    ("scale", "factor"), [(0.0, [1, 1, 1]), (1.0, [2, 6, 1]), (2.0, [3, 11, 1]), (7.5, [8.5, 38.5, 1])]
)
def test_guidance_extrapolates_from_no_class_through_the_class(
    scale: float, factor: list[float], learned: bool
) -> None:
    """Classes 0, 4 and none: x_t times 2, 6, 1 with the class and 1 without."""
    y, t = torch.tensor([0, 4, -1]), torch.tensor([5, 0, 7])
    x_t = randn(3, 2, 4, 4)
    out = Guided(OfClass(learned), y, scale)(x_t, t)
    expected = torch.tensor(factor).view(-1, 1, 1, 1) * x_t + t.view(-1, 1, 1, 1)
    torch.testing.assert_close(out[:, :2], expected)
    assert out.shape[1] == (4 if learned else 2)
    if learned:
        assert out[:, 2:].equal(y.view(-1, 1, 1, 1) * torch.ones_like(x_t))  # whatever the scale


def test_the_network_is_asked_twice_only_where_it_must() -> None:
    net = OfClass()
    Guided(net, torch.tensor([1]), 1.0)(randn(1, 1, 2, 2), torch.tensor([3]))
    assert net.images == 1
    Guided(net, torch.tensor([1]), 3.0)(randn(1, 1, 2, 2), torch.tensor([3]))
    assert net.images == 3
