"""Building objects from options."""

import pytest
from pydantic import ValidationError
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


def given(*beta: float) -> dict[str, object]:
    return {"schedule": {"kind": "given", "beta": beta}, "num_timesteps": len(beta)}


def test_a_schedule_that_is_given_leaves_something_of_the_image_until_the_last_timestep() -> None:
    """0.05^9 is 2e-12, 0.05^10 is 1e-13; the last beta does not count."""
    assert process(**given(*[0.95] * 10)).schedule.num_timesteps == 10
    message = "Value error, beta destroys the image before the last timestep: use fewer or smaller values "
    with pytest.raises(ValidationError, match=message):
        process(**given(*[0.95] * 10, 0.1))


def test_a_schedule_needs_timesteps_enough() -> None:
    """Betas of Ho et al. 2020 reach 0.02 for 1000 timesteps, which is 1 for 20."""
    assert process(num_timesteps=21).schedule.beta.max() < 1
    with pytest.raises(
        ValidationError, match="the schedule linear needs more than 20 timesteps: some beta would reach 1"
    ):
        process(num_timesteps=20)
    with pytest.raises(ValidationError, match=r"schedule\.beta has 3 values, but num_timesteps is 4"):
        process(**given(0.1, 0.2, 0.3) | {"num_timesteps": 4})


@pytest.mark.parametrize("name", sorted(SAMPLERS))
def test_a_variance_is_asked_for_only_where_it_is_used(name: str) -> None:
    """Other samplers must not need an estimate for the analytic variance."""
    asked = []
    made = process()

    def variance_of(name: str) -> build.Variance:
        asked.append(name)
        return build.variance("fixed-small", made, None)

    sampling.sampler(options(sampler=name, variance="analytic"), made, nn.Identity(), variance_of)
    assert asked == (["analytic"] if name == "ddpm" else [])
