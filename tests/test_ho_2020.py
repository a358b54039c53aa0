"""The preset ho-2020 and its page: the parameters of the DDPM paper, and the objectives of its table 2."""

import re
from pathlib import Path
from typing import Any

import pytest
import torch

from diffusion.process import build
from diffusion.process.build import ProcessOptions
from flows import made_with, presets, yaml_files
from flows.params import Params
from tests.process.fakes import Says, mean_of_eq_7, randn, some_x_0_hat

PAPER: dict[str, Any] = {
    # Ho et al. 2020, section 4: "We set T = 1000 ... increasing linearly from beta_1 = 10^-4 to beta_T = 0.02".
    "process.num_timesteps": 1000,
    "process.schedule": "linear",
    "sample.sampler": "ddpm",
    "sample.steps": 1000,
    "sample.spacing": "linspace",
    # Equation 14 and algorithm 1.
    "process.parameterization": "eps",
    "process.weighting": "simple",
    "process.loss": "mse",
    "process.learned_variance": False,
    "process.zero_terminal_snr": False,
    "train.timesteps": "uniform",
    # Appendix B.
    "network.kind": "unet",
    "network.base_channels": 128,
    "network.channel_multipliers": [1, 2, 2, 2],
    "network.blocks_per_level": 2,
    "network.attention_levels": [1],  # 16x16
    "network.conditioning": "add",
    "network.dropout": 0.1,
    "train.flip": True,
    "train.augment": 0.0,
    "train.optimizer": "adamw",
    "train.weight_decay": 0.0,
    "train.learning_rate": 2e-4,
    "train.batch_size": 128,
    "train.steps": 800_000,
    "train.ema": "constant",
    "train.ema.decay": 0.9999,
    # The authors' code: scripts/run_cifar.py, diffusion_tf/nn.py and diffusion_tf/models/unet.py.
    "train.warmup_steps": 5000,
    "train.decay": "constant",
    "train.grad_clip": 1.0,
    "network.convention": "ho-2020",
    "network.head_channels": 0,
    "network.patch_size": 1,
    "network.classes": False,
    "sample.variance": "fixed-large",
    "sample.threshold": "clip",
}
PAGE = Path("docs/ho-2020.md")


@pytest.fixture
def preset(root: Path) -> Params:
    return presets.load(root / "presets" / "ho-2020.yaml")


def section(page: str, heading: str) -> str:
    return page.partition(f"## {heading}\n")[2].partition("\n## ")[0]


def test_the_preset_holds_the_parameters_of_the_paper(preset: Params) -> None:
    found = dict(made_with.leaves(preset.model_dump(mode="json")))
    assert {name: found[name] for name in PAPER} == PAPER
    beta = build.betas(preset.process)
    assert (beta[0].item(), beta[-1].item()) == pytest.approx((1e-4, 0.02), rel=1e-12)
    assert (beta.diff() - 0.0199 / 999).abs().max() < 1e-12


def test_the_page_lists_what_the_preset_holds(root: Path, preset: Params) -> None:
    page = (root / PAGE).read_text(encoding="utf-8")
    found = dict(made_with.leaves(preset.model_dump(mode="json")))
    listed = re.findall(r"`((?:process|network|train|sample)\.[\w.]+): ([^`]+)`", section(page, "The parameters"))
    named = {name.removesuffix(".kind"): yaml_files.scalar(value) for name, value in listed}
    assert {"train.learning_rate", "train.ema.decay", "network.convention"} < named.keys()
    changed = made_with.leaves(yaml_files.read_yaml(root / "presets" / "ho-2020.yaml"))
    about_the_run = {"train.log_every", "train.preview_every"}
    set_there = {name for name, _ in changed if name.startswith(("process", "network", "train", "sample"))}
    assert set_there - about_the_run <= named.keys()
    assert {name: found[name] for name in named} == named


def test_the_rows_of_table_2_are_its_objectives(root: Path) -> None:
    """Written out for an arbitrary network: squared errors of mu and eps, and their factors in eq. 8 and 12."""
    table = section((root / PAGE).read_text(encoding="utf-8"), "The objectives of table 2")
    rows = re.findall(r"^\| ([^|]+) \| `(process\.[^`]+)` \|", table, re.MULTILINE)
    t, x_0, eps = torch.tensor([1, 2, 100, 500, 999]), randn(5, 1, 4, 4), randn(5, 1, 4, 4, seed=1)
    losses = {}
    for name, parameters in rows:
        changes = dict(text.removeprefix("process.").split("=") for text in parameters.split())
        made = build.process(ProcessOptions.model_validate({"schedule": "linear"} | changes))
        net = Says(changes["parameterization"], made.schedule, some_x_0_hat)
        losses[name] = made.loss(net, x_0, t, eps)
    schedule = made.schedule
    beta, a = schedule.beta[t].view(-1, 1, 1, 1), schedule.alpha_bar[t].view(-1, 1, 1, 1)
    x_t = a.sqrt() * x_0 + (1 - a).sqrt() * eps
    x_0_hat = some_x_0_hat(x_t, t)
    of_mu = (mean_of_eq_7(schedule, x_0, x_t, t) - mean_of_eq_7(schedule, x_0_hat, x_t, t)) ** 2
    of_eps = (eps - (x_t - a.sqrt() * x_0_hat) / (1 - a).sqrt()) ** 2
    expected = {
        "mu, L with a fixed isotropic variance": of_mu / (2 * beta),
        "mu, plain error of mu": of_mu,
        "eps, L with a fixed isotropic variance": beta**2 / (2 * beta * (1 - beta) * (1 - a)) * of_eps,
        "eps, L_simple": of_eps,
    }
    assert losses.keys() == expected.keys()
    for name, loss in losses.items():
        torch.testing.assert_close(loss, expected[name].mean(dim=(1, 2, 3)), rtol=1e-6, atol=0)
