"""Optimizers and the learning rate schedule."""

import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.training.distributed import gather_full, is_sharded, scatter_like
from diffusion.training.options import MuonOptions, SgdOptions, TrainOptions

PEAK = "peak"
"""Key of a parameter group's peak learning rate."""


class Muon(torch.optim.Optimizer):
    """Momentum with orthogonalized updates; Jordan et al. 2024, "Muon".

    A convolution kernel (C_out, C_in, h, w) is treated as a matrix (C_out, C_in h w). torch.optim.Muon only takes
    matrices, one at a time and in bfloat16, which is slow on most CPUs; this one batches them.

    As with PyTorch's fused optimizers, a step is skipped if the attribute `found_inf`, a tensor (), is 1.
    """

    found_inf: Tensor | None = None

    def __init__(self, parameters: Iterable[nn.Parameter], lr: float, momentum: float = 0.95) -> None:
        super().__init__(parameters, {"lr": lr, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override] # noqa: ARG002
        for group in self.param_groups:
            parameters = group["params"]
            directions = self._directions(parameters, group["momentum"])
            shapes = [torch.Size((len(parameter), parameter[0].numel())) for parameter in parameters]
            for members in group_matrices(shapes, parameters[0].is_cuda):
                updates = orthogonalize([gather_full(directions[member]).flatten(1) for member in members])
                for member, update in zip(members, updates, strict=True):
                    parameter, (rows, columns) = parameters[member], update.shape
                    rate = group["lr"] * math.sqrt(max(1.0, rows / columns))
                    update = update.reshape(parameter.shape)
                    parameter.sub_(scatter_like(update, parameter) if is_sharded(parameter) else update, alpha=rate)

    def _directions(self, parameters: list[nn.Parameter], momentum: float) -> list[Tensor]:
        """The gradients with Nesterov momentum."""
        gradients: list[Tensor] = [parameter.grad for parameter in parameters]  # type: ignore[misc] # all parameters have one
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        momenta: list[Tensor] = [self.state[parameter]["momentum"] for parameter in parameters]
        if self.found_inf is not None:  # keep the momentum of a skipped step unchanged
            skipped = self.found_inf == 1
            gradients = [torch.where(skipped, *pair) for pair in zip(momenta, gradients, strict=True)]
        torch._foreach_lerp_(momenta, gradients, 1 - momentum)
        # DTensor does not support the out-of-place _foreach_lerp.
        directions = [gradient.lerp(moment, momentum) for gradient, moment in zip(gradients, momenta, strict=True)]
        if self.found_inf is not None:
            torch._foreach_mul_(directions, 1 - self.found_inf)
        return directions


MAX_PADDED_ELEMENTS = 2**26
"""Elements of a padded batch of matrices up to which fewer kernel launches outweigh the work wasted on padding."""


def group_matrices(shapes: Sequence[torch.Size], launched: bool) -> list[list[int]]:
    """Group matrices of these shapes into batches to orthogonalize together: lists of indices.

    A batch holds the matrices of one shape. With kernel launches (`launched`, i.e. on a GPU), which take longer than
    the computation for small matrices, it holds all of them, padded to one shape, unless that is too large.
    """
    wide = [(min(shape), max(shape)) for shape in shapes]
    largest = math.prod(max(sides) for sides in zip(*wide, strict=True)) * len(shapes)
    if launched and largest <= MAX_PADDED_ELEMENTS:
        return [[*range(len(shapes))]]
    by_shape: dict[torch.Size, list[int]] = {}
    for index, shape in enumerate(shapes):
        by_shape.setdefault(shape, []).append(index)
    return [*by_shape.values()]


def orthogonalize(matrices: Sequence[Tensor]) -> list[Tensor]:
    """Approximate U V^T for each matrix U S V^T, with singular values between about 0.7 and 1.2.

    Five Newton-Schulz iterations with an odd quintic polynomial of large slope at zero (Jordan et al. 2024), which only
    need matrix products. Matrices of different shapes are zero-padded; the padding stays zero.
    """
    tall = [matrix.shape[0] > matrix.shape[1] for matrix in matrices]
    wide = [matrix.mT if is_tall else matrix for matrix, is_tall in zip(matrices, tall, strict=True)]
    if len({matrix.shape for matrix in matrices}) == 1:
        x = torch.stack([*matrices])
        x = x.mT if tall[0] else x
    else:
        x = wide[0].new_zeros(len(wide), *map(max, zip(*(matrix.shape for matrix in wide), strict=True)))
        for padded, matrix in zip(x, wide, strict=True):
            padded[: matrix.shape[0], : matrix.shape[1]] = matrix
    # The iteration tolerates bfloat16, which is fast on GPUs.
    x = x.to(torch.bfloat16 if x.is_cuda else x.dtype)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=-4.7750, alpha=2.0315), x, beta=3.4445)
    x = x.to(wide[0].dtype)
    cut = [padded[: matrix.shape[0], : matrix.shape[1]] for padded, matrix in zip(x, wide, strict=True)]
    return [update.mT if is_tall else update for update, is_tall in zip(cut, tall, strict=True)]


def optimizers(net: nn.Module, blocks: Iterable[nn.Module], options: TrainOptions) -> list[torch.optim.Optimizer]:
    """Build the optimizers: AdamW (Loshchilov & Hutter 2019), SGD, or Muon and AdamW with options.optimizer muon.

    Muon takes the matrices and kernels in the `blocks` of `net`; AdamW takes the rest: first and last layers,
    embeddings, biases and norms. AdamW and SGD decay the weights of linear layers and convolutions, but not biases,
    norms and embeddings.
    """
    layers: list[Any] = [module.weight for module in net.modules() if isinstance(module, nn.Linear | nn.Conv2d)]
    known = set(layers)
    muon = options.optimizer if isinstance(options.optimizer, MuonOptions) else None
    inside = {parameter for block in blocks for parameter in block.parameters()} if muon else ()
    matrices = [weight for weight in layers if weight in inside]
    decaying = [weight for weight in layers if weight not in inside]
    others = [parameter for parameter in net.parameters() if parameter not in known]
    groups: list[dict[str, Any]] = [
        {"params": decaying, "weight_decay": options.weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]
    result: list[torch.optim.Optimizer]
    if isinstance(options.optimizer, SgdOptions):
        result = [sgd(groups, options.learning_rate, options.optimizer)]
    else:
        result = [torch.optim.AdamW(groups, lr=options.learning_rate, fused=True)]
    if muon and matrices:
        result.append(Muon(matrices, lr=muon.learning_rate))
    for optimizer in result:
        for group in optimizer.param_groups:
            group[PEAK] = group["lr"]
    return result


def sgd(groups: list[dict[str, Any]], learning_rate: float, options: SgdOptions) -> torch.optim.SGD:
    """SGD: b <- momentum b + gradient, weight <- weight - learning_rate b; Polyak 1964, as PyTorch writes it.

    b starts at zero here, since PyTorch's fused kernel leaves it uninitialized if the first step is skipped.
    """
    made = torch.optim.SGD(groups, learning_rate, options.momentum, fused=True)
    for group in made.param_groups if options.momentum else ():
        for parameter in group["params"]:
            made.state[parameter]["momentum_buffer"] = torch.zeros_like(parameter)
    return made


def step(optimizers: Sequence[torch.optim.Optimizer], share: float, norm: Tensor) -> None:
    """Step with every learning rate at `share` times its peak; skip the step if the gradient `norm` () is not finite.

    The check runs on the device, without synchronization.
    """
    found_inf = (~norm.isfinite()).float()
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group[PEAK] * share
        optimizer.found_inf = found_inf  # type: ignore[attr-defined] # read by PyTorch's fused optimizers
        optimizer.step()
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)


def lr_factor(step: int, options: TrainOptions) -> float:
    """Learning rate at `step` (0-based), as a factor of its peak: linear warmup, then constant or decay to zero."""
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
