"""The training loss."""

from dataclasses import dataclass

from torch import Tensor, nn

from diffusion.process.parameterization import Parameterization
from diffusion.process.schedule import Schedule
from diffusion.process.weighting import Weighting


@dataclass(frozen=True)
class Loss:
    """The weighted mean squared error of the network's output; Ho et al. 2020, eq. 14."""

    schedule: Schedule
    parameterization: Parameterization
    weighting: Weighting

    def __call__(self, net: nn.Module, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
        """Loss of each image, (B,), at `t` int64 (B,) with noise `eps` (B, C, H, W)."""
        x_t = self.schedule.diffuse(x_0, t, eps)
        error = net(x_t, t) - self.parameterization.target(x_0, eps, t)
        alpha_bar = self.schedule(t).flatten()
        weight = self.weighting(alpha_bar / (1 - alpha_bar)).to(error.dtype)
        return weight * error.square().mean(dim=(1, 2, 3))
