"""The complete state of a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.nn.layers import Network
from diffusion.pairs.augmentation import PARAMETERS
from diffusion.process.bands import BANDS
from diffusion.process.schedule import Schedule, float64_device
from diffusion.process.timesteps import TIMESTEPS, Timesteps
from diffusion.training import ema, optim
from diffusion.training.distributed import gather_full, is_sharded, scatter_like
from diffusion.training.options import TrainOptions

Row = dict[str, float]


@dataclass
class Facts:
    """The part of the state that is not tensors. The step also gives the position in the data, since batch k is a
    function of k.
    """

    step: int = 0
    """Number of steps so far, including skipped ones."""
    rollbacks: int = 0
    """Number of rollbacks to an earlier step (see recovery.roll_back)."""
    loss_curve: list[Row] = field(default_factory=list)
    heldout_curve: list[Row] = field(default_factory=list)
    run_id: str | None = None
    """Id of the experiment tracker's run that logs this training."""


@dataclass
class State(Facts):
    """State of a training run at one step."""

    net: Network = field(kw_only=True)
    average: Network = field(kw_only=True)
    optimizers: list[torch.optim.Optimizer] = field(kw_only=True)
    timesteps: Timesteps = field(kw_only=True)
    sums: Tensor = field(kw_only=True)
    """Sums since the last point of the loss curve, float64 (3 + 2 BANDS,): steps, loss, gradient norm, and the loss and
    weight of each band of t."""
    skips: Tensor = field(kw_only=True)
    """Counts of skipped steps, int64 (3,): the total, the current run of consecutive ones, and the longest run. A step
    is skipped, leaving weights and optimizers unchanged, if its loss or gradient is not finite."""
    unobserved: tuple[Tensor, Callable[[], Tensor]] | None = None
    """The last step's global batch, not yet observed by `timesteps`: timesteps int64 (B,), and a function returning the
    losses (B,), both on the CPU. The losses of a skipped step are NaN."""
    earlier: Network | None = None
    """In progressive distillation, the student of the phase before, which is now the teacher."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The EMA weights with the lowest held-out error, if `keep_best`."""

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def skipped(self) -> int:
        """Number of skipped steps. This property and the next two synchronize with the device."""
        return int(self.skips[0])

    @property
    def skipped_in_row(self) -> int:
        """Number of consecutive skipped steps up to this one."""
        return int(self.skips[1])

    @property
    def longest_skip(self) -> int:
        """The longest run of consecutive skipped steps."""
        return int(self.skips[2])

    @property
    def last_point(self) -> int:
        """Step of the last point of the loss curve."""
        return int(self.loss_curve[-1]["step"]) if self.loss_curve else 0

    @property
    def sharded(self) -> bool:
        """Whether the weights are sharded over the processes."""
        return any(is_sharded(parameter) for parameter in self.net.parameters())

    def observe(self) -> None:
        """Pass the losses of the last step to `timesteps`, if that has not been done."""
        if self.unobserved:
            t, loss = self.unobserved
            self.timesteps.observe(t, loss())
            self.unobserved = None

    def facts(self) -> dict[str, Any]:
        """The fields of `Facts`, and `skips`, as JSON-compatible data."""
        return {part.name: getattr(self, part.name) for part in fields(Facts)} | {"skips": self.skips.tolist()}

    def tensors(self) -> dict[str, Tensor]:
        """All tensors of the state, on the CPU. A collective call if the weights are sharded."""
        return {name: gather_full(tensor.detach()).cpu().contiguous() for name, tensor in self._named()}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Restore the state from `tensors` and `facts`: the inverse of the two methods above."""
        self.best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
        parameters = dict(self.net.named_parameters())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state.pop(parameter, None)
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind.isdigit():  # optimizer state: OPTIMIZER.KEY.PARAMETER
                key, _, parameter_name = rest.partition(".")
                target = parameters[parameter_name]
                # Moments have the memory format of their weights (channels_last); Adam's step count is a scalar.
                moment = scatter_like(value, target) if value.ndim else value.to(target.device, copy=True)
                self.optimizers[int(kind)].state[target][key] = moment
        for prefix, module in self._modules():
            own = module.state_dict()
            with torch.no_grad():
                for name, target in own.items():
                    target.copy_(scatter_like(tensors[f"{prefix}.{name}"], target))
        loss = tensors.get("unobserved.loss")
        if loss is not None:
            self.unobserved = tensors["unobserved.t"], lambda: loss
        else:
            self.unobserved = None
        self.sums = tensors["sums"].to(self.sums.device)
        self.skips = torch.tensor(facts["skips"], device=self.skips.device)
        for name, value in vars(Facts(**{key: value for key, value in facts.items() if key != "skips"})).items():
            setattr(self, name, value)

    def copy_average_into(self, net: nn.Module) -> None:
        """Copy the EMA weights into `net`, which is not sharded. A collective call."""
        if net is not self.average:
            net.load_state_dict({name: gather_full(tensor) for name, tensor in self.average.state_dict().items()})

    def copy_final_into(self, net: nn.Module) -> None:
        """Copy the weights of the final model into `net`, likewise: the best EMA weights, if kept, or the last ones."""
        self.copy_average_into(net)
        if self.best:
            net.load_state_dict({name: gather_full(tensor) for name, tensor in self.best.items()})

    def _modules(self) -> Iterable[tuple[str, nn.Module]]:
        modules: dict[str, nn.Module] = {"net": self.net, "average": self.average, "timesteps": self.timesteps}
        return (modules | ({"earlier": self.earlier} if self.earlier is not None else {})).items()

    def _named(self) -> Iterable[tuple[str, Tensor]]:
        yield "sums", self.sums
        if self.unobserved:
            t, loss = self.unobserved
            yield from (("unobserved.t", t), ("unobserved.loss", loss()))
        for prefix, module in self._modules():
            for name, tensor in module.state_dict().items():
                yield f"{prefix}.{name}", tensor
        for name, tensor in self.best.items():
            yield f"best.{name}", tensor
        for number, optimizer in enumerate(self.optimizers):
            for name, parameter in self.net.named_parameters():
                for key, value in optimizer.state.get(parameter, {}).items():
                    yield f"{number}.{key}.{name}", value


def new_state(
    net: Network,
    options: TrainOptions,
    schedule: Schedule,
    shard_weights: Callable[[Network], Network] = lambda net: net,
    augmented: bool = False,
    earlier: Network | None = None,
) -> State:
    """The state of a training run at step 0; `shard_weights` shards a network over the processes.

    With `augmented`, the network gets a layer for augmentation, which the averaged weights, and so the model, lack.
    `earlier` is kept in the state: see `State.earlier`.
    """
    device = float64_device(next(net.parameters()).device)
    average = shard_weights(ema.average_of(net))
    if augmented:
        net.conditions.accept_augmentation(PARAMETERS)
    net = shard_weights(net)
    return State(
        net=net,
        average=average,
        optimizers=optim.optimizers(net, net.blocks(), options),
        timesteps=TIMESTEPS[options.timesteps](schedule),
        sums=torch.zeros(3 + 2 * BANDS, dtype=torch.float64, device=device),
        skips=torch.zeros(3, dtype=torch.int64, device=device),
        earlier=earlier,
    )
