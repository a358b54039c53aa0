"""Every name that params.yaml allows can be built, and nothing else."""

from typing import get_args

import pytest
from torch import nn

from diffusion.nn.build import NETWORKS
from diffusion.options import NetworkOptions, ProcessOptions, SampleOptions, TrainOptions
from diffusion.process import build
from diffusion.process.weighting import MinSnr
from flows import params
from tests.process.fakes import options, process


@pytest.mark.parametrize(
    ("section", "field", "built"),
    [
        (ProcessOptions, "schedule", build.SCHEDULES),
        (ProcessOptions, "parameterization", build.PARAMETERIZATIONS),
        (ProcessOptions, "weighting", build.WEIGHTINGS),
        (ProcessOptions, "loss", build.LOSSES),
        (TrainOptions, "timesteps", build.TIMESTEPS),
        (SampleOptions, "variance", build.VARIANCES),
        (SampleOptions, "sampler", build.SAMPLERS),
        (SampleOptions, "spacing", build.SPACINGS),
        (SampleOptions, "threshold", build.THRESHOLDS),
        (NetworkOptions, "kind", NETWORKS),
    ],
)
def test_names_in_params_are_the_names_that_can_be_built(
    section: type[params.Section], field: str, built: dict[str, object]
) -> None:
    assert set(get_args(section.model_fields[field].annotation)) == set(built)


def test_options_reach_what_is_built() -> None:
    assert process(num_timesteps=77).schedule.num_timesteps == 77
    assert process(weighting="min-snr", min_snr_gamma=3.0).loss.weighting == MinSnr(3.0)
    assert process(zero_terminal_snr=True, parameterization="v").schedule.alpha_bar[-1] == 0
    assert build.sampling_timesteps(options(steps=3, spacing="quadratic"), process().schedule) == [999, 250, 0]


@pytest.mark.parametrize("name", sorted(build.SAMPLERS))
def test_a_variance_is_asked_for_only_where_it_is_used(name: str) -> None:
    """So that other samplers need no estimate of the analytic one."""
    asked = []
    made = process()

    def variance_of(name: str) -> build.Variance:
        asked.append(name)
        return build.variance("fixed-small", made, None)

    build.sampler(options(sampler=name, variance="analytic"), made, nn.Identity(), variance_of)
    assert asked == (["analytic"] if name == "ddpm" else [])
