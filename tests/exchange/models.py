"""Small models of this library and of diffusers, for the tests of exchange."""

import copy
import json
from functools import cache
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DModel
from torch import Tensor, nn

from diffusion import model
from flows import params, yaml_files
from flows.changes import lay_over

ROOT = Path(__file__).parents[2]
CHANNELS = 32
"""The fewest that diffusers' default of 32 groups divides."""
SMALL: dict[str, Any] = {
    "network": {
        "base_channels": CHANNELS,
        "channel_multipliers": [1, 1],
        "conditioning": "add",
        "fourier_features": [],
    },
    "process": {"schedule": "linear", "parameterization": "eps"},
    "sample": {"sampler": "ddpm", "spacing": "linspace", "variance": "fixed-small"},
}
"""Changes to the preset digits that give a model which diffusers supports."""
UNET: dict[str, Any] = {
    "sample_size": 8,
    "in_channels": 1,
    "out_channels": 1,
    "block_out_channels": (CHANNELS, CHANNELS),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 1,
}
"""A UNet2DModel with diffusers' defaults, as in its own training example, but small."""
DDPM_CIFAR10: dict[str, Any] = {
    "sample_size": 32,
    "in_channels": 3,
    "out_channels": 3,
    "block_out_channels": (128, 256, 256, 256),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    "up_block_types": ("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "layers_per_block": 2,
    "downsample_padding": 0,
    "freq_shift": 1,
    "flip_sin_to_cos": False,
    "norm_eps": 1e-6,
    "attention_head_dim": None,
}
"""The DDPM paper's network for CIFAR-10, as it is published for diffusers."""


def settings(**changes: dict[str, Any]) -> params.Params:
    """The parameters of a small model that diffusers supports, with changes by section."""
    return params.validate(lay_over(lay_over(copy.deepcopy(_document()), SMALL), changes), "test")


@cache
def _document() -> Any:
    return json.loads(json.dumps(yaml_files.read_yaml(ROOT / "params.yaml")))  # without comments, faster to copy


def randomize(net: nn.Module) -> nn.Module:
    """Randomize every weight, reproducibly; in evaluation mode."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.03 * torch.randn(parameter.shape, generator=generator))
    return net.eval()


def save(directory: Path, chosen: params.Params, classes: tuple[str, ...] = ()) -> model.Model:
    """Save a model with random weights in a directory."""
    shape = (chosen.pairs.channels, chosen.pairs.height, chosen.pairs.width)
    torch.manual_seed(0)
    net = randomize(model.new_network(shape, len(classes), chosen.network, chosen.process))
    config = model.Config(shape=shape, classes=classes, network=chosen.network, process=chosen.process, x_0_mse=None)
    model.save_model(directory, net, config)
    return load(directory)


def load(directory: Path) -> model.Model:
    return model.load_model(directory, torch.device("cpu"))


def unet(**changes: Any) -> UNet2DModel:
    """A small UNet2DModel with random weights."""
    torch.manual_seed(0)
    net = UNet2DModel(**UNET | changes)
    randomize(net)
    return net


CLOSE = {"atol": 1e-5, "rtol": 0.0}
"""How close `outputs` of one network in two implementations are: only diffusers' sines are in float32 then, with errors
of 2**-24. In float32 throughout, the bound would depend on the size of the network and on the processor."""


@torch.no_grad()
def outputs(net: nn.Module, shape: tuple[int, int, int], timesteps: tuple[int, ...] = (0, 1, 16, 128, 512)) -> Tensor:
    """Outputs of a network for fixed x_t at the timesteps, float64 (B, C, H, W).

    The timesteps are powers of two, so that diffusers' products with the frequencies, in float32, are exact.
    """
    x_t = torch.randn(len(timesteps), *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    out = copy.deepcopy(net).double()(x_t, torch.tensor(timesteps))
    return out if isinstance(out, Tensor) else out.sample
