"""Every name that params.yaml allows can be built, and nothing else."""

from typing import get_args

from diffusion import params
from diffusion.nn.build import NETWORKS
from diffusion.process import build


def names(section: type[params.Section], field: str) -> set[str]:
    return set(get_args(section.model_fields[field].annotation))


def test_names_in_params_are_the_names_that_can_be_built() -> None:
    assert names(params.Process, "schedule") == set(build.SCHEDULES)
    assert names(params.Process, "parameterization") == set(build.PARAMETERIZATIONS)
    assert names(params.Process, "variance") == set(build.VARIANCES)
    assert names(params.Process, "weighting") == set(build.WEIGHTINGS)
    assert names(params.Sample, "sampler") == set(build.SAMPLERS)
    assert names(params.Network, "kind") == set(NETWORKS)
