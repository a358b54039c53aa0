"""Objects from their options."""

import pytest
from torch import nn

from diffusion.nn.build import NETWORKS
from diffusion.process import build
from diffusion.process.weighting import MinSnr
from diffusion.sampling import build as sampling
from diffusion.sampling.sampler import SAMPLERS
from tests.process.fakes import options, process


def test_networks_are_found_in_their_modules() -> None:
    assert list(NETWORKS) == ["unet", "uvit"]


def test_options_reach_what_is_built() -> None:
    assert process(num_timesteps=77).schedule.num_timesteps == 77
    assert process(weighting={"kind": "min-snr", "gamma": 3.0}).loss.weighting == MinSnr(3.0)
    assert process(zero_terminal_snr=True, parameterization="v").schedule.alpha_bar[-1] == 0
    assert sampling.sampling_timesteps(options(steps=3, spacing="quadratic"), process().schedule) == [999, 250, 0]


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_variance_is_asked_for_only_where_it_is_used(name: str) -> None:
    """So that other samplers need no estimate of the analytic one."""
    asked = []
    made = process()

    def variance_of(name: str) -> build.Variance:
        asked.append(name)
        return build.variance("fixed-small", made, None)

    sampling.sampler(options(sampler=name, variance="analytic"), made, nn.Identity(), variance_of)
    assert asked == (["analytic"] if name == "ddpm" else [])
