"""Small networks of every kind, for the tests."""

import torch
from torch import Tensor, nn

from diffusion.nn import build
from diffusion.nn.build import NETWORKS
from diffusion.nn.layers import NetworkOptions

OPTIONS: dict[str, object] = {
    "base_channels": 16,
    "channel_multipliers": [1, 2],
    "blocks_per_level": 1,
    "attention_levels": [1],
    "depth": 3,
    "conditioning": "film",
    "head_channels": 8,
    "patch_size": 1,
    "fourier_features": [],
    "dropout": 0.0,
    "classes": False,
    "convention": "ddpm",
}
CONDITIONINGS = [("unet", "add"), ("unet", "film"), ("uvit", "token"), ("uvit", "adaln")]
"""Every network with every kind of conditioning."""
NUM_CLASSES = 3


def options(kind: str, conditioning: str, **changes: object) -> NetworkOptions:
    """Options of a kind; changes to fields of other kinds are ignored."""
    described: type[NetworkOptions] = NETWORKS[kind].Options
    given = OPTIONS | {"kind": kind, "conditioning": conditioning} | changes
    return described.model_validate({name: value for name, value in given.items() if name in described.model_fields})


def network(
    shape: tuple[int, int, int], kind: str, conditioning: str, learned_variance: bool = False, **changes: object
) -> nn.Module:
    """A new network in evaluation mode, always with the same weights."""
    torch.manual_seed(0)
    channels_out = 2 * shape[0] if learned_variance else shape[0]
    return build.network(shape, channels_out, NUM_CLASSES, options(kind, conditioning, **changes)).eval()


def randomize(net: nn.Module, seed: int = 0) -> nn.Module:
    """Randomize the layers that are initialized to zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator))
    return net


def noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))
