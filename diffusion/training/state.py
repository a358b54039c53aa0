"""The complete state of a training run."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor, nn

from diffusion.nn.layers import Network
from diffusion.process.bands import BANDS
from diffusion.process.schedule import Schedule, float64_device
from diffusion.process.timesteps import TIMESTEPS, Timesteps
from diffusion.training import ema, optim
from diffusion.training.distributed import gather_full, is_sharded, scatter_like
from diffusion.training.options import TrainOptions

Row = dict[str, float]


@dataclass
class Facts:
    """What a checkpoint holds besides tensors. A training's position in the data is its step: batch k is a function of
    k.
    """

    step: int = 0
    """Steps gone through, skipped ones included."""
    rollbacks: int = 0
    """How often the training went back to an earlier step (see recovery.roll_back)."""
    loss_curve: list[Row] = field(default_factory=list)
    heldout_curve: list[Row] = field(default_factory=list)
    run_id: str | None = None
    """The run of an experiment tracker that follows this training."""


@dataclass
class State(Facts):
    """A training at one step."""

    net: Network = field(kw_only=True)
    average: Network = field(kw_only=True)
    optimizers: list[torch.optim.Optimizer] = field(kw_only=True)
    timesteps: Timesteps = field(kw_only=True)
    sums: Tensor = field(kw_only=True)
    """Since the last point of the loss curve, float64 (3 + 2 BANDS,): steps, loss, gradient norm, and of each band of t
    the loss and the weight."""
    skips: Tensor = field(kw_only=True)
    """Steps whose loss or gradient was not finite, and which therefore changed neither weights nor optimizers, int64
    (3,): how many there were, how many of them just now in a row, and in the longest row so far."""
    unobserved: tuple[Tensor, Callable[[], Tensor]] | None = None
    """Timesteps int64 (B,) of the last step's whole batch and, when called, the loss at each, (B,), both on the CPU.
    `timesteps` has not observed them yet. If the step was skipped, the losses are NaN."""
    best: dict[str, Tensor] = field(default_factory=dict)
    """The average's weights where the held-out error was least, if they are to be kept."""

    @property
    def device(self) -> torch.device:
        return next(self.net.parameters()).device

    @property
    def skipped(self) -> int:
        """How many steps were skipped; this and the next two wait for the device."""
        return int(self.skips[0])

    @property
    def skipped_in_row(self) -> int:
        """How many of the last steps, up to this one, were skipped."""
        return int(self.skips[1])

    @property
    def longest_skip(self) -> int:
        """The most steps in a row that were skipped."""
        return int(self.skips[2])

    @property
    def last_point(self) -> int:
        """The step of the loss curve's last point."""
        return int(self.loss_curve[-1]["step"]) if self.loss_curve else 0

    @property
    def sharded(self) -> bool:
        """Whether the processes share out the weights."""
        return any(is_sharded(parameter) for parameter in self.net.parameters())

    def observe(self) -> None:
        """Let `timesteps` observe the losses of the last step, if it has not."""
        if self.unobserved:
            t, loss = self.unobserved
            self.timesteps.observe(t, loss())
            self.unobserved = None

    def facts(self) -> dict[str, Any]:
        """The fields of `Facts`, and `skips`, as plain data."""
        return {part.name: getattr(self, part.name) for part in fields(Facts)} | {"skips": self.skips.tolist()}

    def tensors(self) -> dict[str, Tensor]:
        """Everything else, on the CPU. Where the processes share the weights out, all of them call this together."""
        return {name: gather_full(tensor.detach()).cpu().contiguous() for name, tensor in self._named()}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Become what `tensors` and `facts` say: the inverse of the two methods above."""
        self.best = {name.removeprefix("best."): value for name, value in tensors.items() if name.startswith("best.")}
        parameters = dict(self.net.named_parameters())
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    optimizer.state.pop(parameter, None)
        for name, value in tensors.items():
            kind, _, rest = name.partition(".")
            if kind.isdigit():  # an optimizer's: its number, then what it is, then the parameter's name
                key, _, parameter_name = rest.partition(".")
                target = parameters[parameter_name]
                # Moments lie in memory as their weights do (channels_last); Adam's count of steps is a scalar.
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
        """Copy the average's weights into `net`, a whole network. All processes call this together."""
        if net is not self.average:
            net.load_state_dict({name: gather_full(tensor) for name, tensor in self.average.state_dict().items()})

    def copy_final_into(self, net: nn.Module) -> None:
        """Copy into `net`, likewise, the weights that become the model: the average's best, if kept, or its last."""
        self.copy_average_into(net)
        if self.best:
            net.load_state_dict({name: gather_full(tensor) for name, tensor in self.best.items()})

    def _modules(self) -> Iterable[tuple[str, nn.Module]]:
        return (("net", self.net), ("average", self.average), ("timesteps", self.timesteps))

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
) -> State:
    """A training that has not taken a step; `shard_weights` lays a network out over the processes."""
    device = float64_device(next(net.parameters()).device)
    average = shard_weights(ema.average_of(net))
    net = shard_weights(net)
    return State(
        net=net,
        average=average,
        optimizers=optim.optimizers(net, net.blocks(), options),
        timesteps=TIMESTEPS[options.timesteps](schedule),
        sums=torch.zeros(3 + 2 * BANDS, dtype=torch.float64, device=device),
        skips=torch.zeros(3, dtype=torch.int64, device=device),
    )
