"""Conversion of the scheduler's configuration in both directions, against diffusers' schedules."""

from typing import Any

import pytest
import torch
from diffusers import DDIMScheduler, DDPMScheduler

from diffusion.exchange.configs import SchedulerConfig
from diffusion.process import build as processes
from tests.exchange.models import settings

OURS: dict[str, dict[str, Any]] = {
    "linear": {},
    "linear, few": {"num_timesteps": 300},
    "scaled-linear": {"schedule": "scaled-linear", "num_timesteps": 500},
    "cosine": {"schedule": "cosine"},
    "sigmoid": {"schedule": "sigmoid", "num_timesteps": 100},
    "given": {"schedule": {"kind": "given", "beta": [0.1, 0.2, 0.3, 0.5, 0.9]}, "num_timesteps": 5},
    "zero-terminal, v": {
        "schedule": "linear",
        "zero_terminal_snr": True,
        "parameterization": "v",
        "weighting": "snr-plus-one",
    },
    "x_0": {"schedule": "cosine", "parameterization": "x_0"},
}
THEIRS: dict[str, tuple[dict[str, Any], str]] = {
    "defaults": ({}, "linear"),
    "Stable Diffusion's": (
        {"beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012},
        "scaled-linear",
    ),
    "Stable Diffusion's range, linear": ({"beta_start": 0.00085, "beta_end": 0.012}, "given"),
    "not scaled by the number of timesteps": ({"num_train_timesteps": 500}, "given"),
    "cosine": ({"beta_schedule": "squaredcos_cap_v2", "num_train_timesteps": 50}, "cosine"),
    "GeoDiff's sigmoid": ({"beta_schedule": "sigmoid"}, "given"),
    "trained": ({"trained_betas": [0.1, 0.2, 0.4], "num_train_timesteps": 3}, "given"),
    "zero-terminal": ({"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}, "linear"),
}


@pytest.mark.parametrize("changes", OURS.values(), ids=OURS)
def test_our_process_is_the_same_in_diffusers_and_after_coming_back(changes: dict[str, Any]) -> None:
    steps = {"steps": changes.get("num_timesteps", 1000)}
    chosen = settings(process=changes, sample=steps, export=steps)
    written = SchedulerConfig.of(chosen.process, chosen.sample)
    theirs = DDPMScheduler.from_config(written.document())
    schedule = processes.process(chosen.process).schedule
    torch.testing.assert_close(theirs.alphas_cumprod.double(), schedule.alpha_bar, rtol=1e-5, atol=1e-7)
    assert SchedulerConfig.model_validate(written.document()).process() == chosen.process


@pytest.mark.parametrize(("config", "schedule"), THEIRS.values(), ids=THEIRS)
def test_their_scheduler_is_the_same_process(config: dict[str, Any], schedule: str) -> None:
    theirs = DDPMScheduler(**config)
    options = SchedulerConfig.model_validate(dict(theirs.config)).process()
    assert options.schedule.kind == schedule
    alpha_bar = processes.process(options).schedule.alpha_bar
    torch.testing.assert_close(theirs.alphas_cumprod.double(), alpha_bar, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    ("config", "sampling"),
    [
        ({}, "sample.sampler: ddpm, sample.variance: fixed-small, sample.threshold: clip"),
        (
            {"variance_type": "fixed_small_log"},
            "sample.sampler: ddpm, sample.variance: fixed-small, sample.threshold: clip",
        ),
        (
            {"variance_type": "fixed_large", "clip_sample": False},
            "sample.sampler: ddpm, sample.variance: fixed-large, sample.threshold: none",
        ),
        (
            {"variance_type": "learned_range", "thresholding": True, "_class_name": "DDIMScheduler"},
            "sample.sampler: ddim, sample.variance: learned, sample.threshold: dynamic",
        ),
    ],
)
def test_what_it_says_of_sampling(config: dict[str, Any], sampling: str) -> None:
    assert SchedulerConfig.model_validate(config).sampling() == sampling


@pytest.mark.parametrize(
    ("scheduler", "named"),
    [
        (DDPMScheduler(timestep_spacing="linspace", variance_type="fixed_large", clip_sample=False), []),
        (DDPMScheduler(), ["timestep_spacing: leading"]),
        (
            DDIMScheduler(steps_offset=1, set_alpha_to_one=False, timestep_spacing="trailing"),
            ["set_alpha_to_one: False", "steps_offset: 1", "timestep_spacing: trailing"],
        ),
        (
            DDPMScheduler(timestep_spacing="linspace", clip_sample_range=2.0, sample_max_value=1.5),
            ["clip_sample_range: 2.0", "sample_max_value: 1.5"],
        ),
    ],
)
def test_what_ours_has_no_counterpart_of_is_named(scheduler: Any, named: list[str]) -> None:
    assert SchedulerConfig.without_counterpart(dict(scheduler.config)) == named


def test_what_a_later_version_of_diffusers_may_bring_is_named() -> None:
    document = {"_class_name": "DDPMScheduler", "_diffusers_version": "9.9", "twist": 3}
    assert SchedulerConfig.without_counterpart(document) == ["timestep_spacing: leading", "twist: 3"]
