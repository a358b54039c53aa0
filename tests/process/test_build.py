"""Objects from their options."""

from typing import get_args

import pytest
from torch import nn

from diffusion.nn.build import NETWORKS
from diffusion.nn.options import NetworkOptions
from diffusion.process import build
from diffusion.process.weighting import MinSnr
from diffusion.sampling import build as sampling
from diffusion.sampling.sampler import SAMPLERS
from tests.process.fakes import options, process


def test_the_kinds_of_networks_are_those_that_can_be_built() -> None:
    assert set(get_args(NetworkOptions.model_fields["kind"].annotation)) == set(NETWORKS)


def test_options_reach_what_is_built() -> None:
    assert process(num_timesteps=77).schedule.num_timesteps == 77
    assert process(weighting="min-snr", min_snr_gamma=3.0).loss.weighting == MinSnr(3.0)
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
