"""The optimizers and their learning rate."""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.training.distributed import placed, whole
from diffusion.training.options import MuonOptions, TrainOptions

PEAK = "peak"
"""Each group of parameters keeps its highest learning rate under this name."""


class Muon(torch.optim.Optimizer):
    """Momentum whose update of each matrix is made orthogonal; Jordan et al. 2024, "Muon".

    A convolution's kernel (C_out, C_in, h, w) counts as a matrix (C_out, C_in h w). torch.optim.Muon takes matrices
    alone, one at a time and in bfloat16, which is slow on most CPUs; here those of one shape go through together.
    """

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override] # noqa: ARG002
        for group in self.param_groups:
            alike: dict[torch.Size, list[nn.Parameter]] = {}
            for parameter in group["params"]:
                alike.setdefault(parameter.flatten(1).shape, []).append(parameter)
            for (rows, columns), parameters in alike.items():
                directions = [self._direction(parameter, group["momentum"]) for parameter in parameters]
                updates = orthogonal(torch.stack([whole(direction).flatten(1) for direction in directions]))
                rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                for parameter, update in zip(parameters, updates, strict=True):
                    parameter.sub_(placed(update.reshape(parameter.shape), parameter), alpha=rate)

    def _direction(self, parameter: nn.Parameter, momentum: float) -> Tensor:
        """The gradient with Nesterov's momentum."""
        assert parameter.grad is not None
        state: dict[str, Tensor] = self.state[parameter]
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - momentum)
        return parameter.grad.lerp(state["momentum"], momentum)


def orthogonal(matrices: Tensor) -> Tensor:
    """U V^T, nearly, of matrices U S V^T, (N, rows, columns): singular values between about 0.7 and 1.2.

    Five steps of an odd polynomial of fifth degree, whose slope at zero is large (Jordan et al. 2024): Newton and
    Schulz's way, of matrix products alone.
    """
    tall = matrices.shape[1] > matrices.shape[2]
    # Where bfloat16 is what the hardware is made for, the iteration bears it.
    x = matrices.to(torch.bfloat16 if matrices.is_cuda else matrices.dtype)
    x = x.mT if tall else x
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    return (x.mT if tall else x).to(matrices.dtype)


def optimizers(net: nn.Module, hidden: Iterable[nn.Module], options: TrainOptions) -> list[torch.optim.Optimizer]:
    """AdamW (Loshchilov & Hutter 2019) for all of `net`, or, with options.optimizer muon, beside Muon for the matrices
    and kernels of its `hidden` blocks: first and last layers, embeddings, biases and norms are AdamW's even then.

    With AdamW the weights of linear layers and convolutions decay; biases, norms, positions and tables do not.
    """
    layers: list[Any] = [module.weight for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    known = set(layers)
    muon = options.optimizer if isinstance(options.optimizer, MuonOptions) else None
    inside = {parameter for block in hidden for parameter in block.parameters()} if muon else ()
    matrices = [weight for weight in layers if weight in inside]
    decaying = [weight for weight in layers if weight not in inside]
    others = [parameter for parameter in net.parameters() if parameter not in known]
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    made: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)]
    if muon and matrices:
        made.append(Muon(matrices, lr=muon.learning_rate))
    for optimizer in made:
        for group in optimizer.param_groups:
            group[PEAK] = group["lr"]
    return made


def set_rate(optimizers: Iterable[torch.optim.Optimizer], share: float) -> None:
    """Set every learning rate to a share of its peak."""
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group[PEAK] * share


def rate(step: int, options: TrainOptions) -> float:
    """The learning rate of step `step`, counted from 0, as a share of its peak.

    It rises linearly at first, then is constant or falls to zero.
    """
    if step < options.warmup_steps:
        return (step + 1) / options.warmup_steps
    fraction = (step - options.warmup_steps) / max(options.steps - options.warmup_steps, 1)
    match options.decay:
        case "linear":
            return 1 - fraction
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * fraction))
        case _:
            return 1.0
