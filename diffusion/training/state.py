"""All that a training is, at one step; written to and read from checkpoints."""

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn

from diffusion import params
from diffusion.files import sha256, write_atomic, write_json
from diffusion.process.build import TIMESTEPS
from diffusion.process.schedule import Schedule
from diffusion.process.timesteps import Timesteps
from diffusion.training import ema, optim

Row = dict[str, float]


@dataclass
class State:
    """A training at one step. Its position in the data is the step itself: batch k is a function of k."""

    net: nn.Module
    average: nn.Module
    optimizer: torch.optim.Optimizer
    timesteps: Timesteps
    sums: Tensor
    """Loss and gradient norm, summed since the last point of the loss curve, (2,)."""
    step: int = 0
    """Steps taken."""
    loss_curve: list[Row] = field(default_factory=list)
    heldout_curve: list[Row] = field(default_factory=list)
    run_id: str | None = None
    """The MLflow run that watches this training."""

    @property
    def device(self) -> torch.device:
        return self.sums.device

    @property
    def last_point(self) -> int:
        """The step of the loss curve's last point."""
        return int(self.loss_curve[-1]["step"]) if self.loss_curve else 0

    def tensors(self) -> dict[str, Tensor]:
        tensors = {"sums": self.sums}
        tensors |= {f"net.{name}": tensor for name, tensor in self.net.state_dict().items()}
        tensors |= {f"timesteps.{name}": tensor for name, tensor in self.timesteps.state_dict().items()}
        tensors |= {f"average.{name}": tensor for name, tensor in self.average.state_dict().items()}
        for name, parameter in self.net.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = value
        return {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}

    def restore(self, tensors: dict[str, Tensor], facts: dict[str, Any]) -> None:
        """Become what `tensors` and `facts` say; the inverse of `tensors` and of what `write` adds."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        self.net.load_state_dict(part("net."))
        self.average.load_state_dict(part("average."))
        self.timesteps.load_state_dict(part("timesteps."))
        parameters = dict(self.net.named_parameters())
        for name, value in part("optimizer.").items():
            key, parameter = name.split(".", 1)
            target = parameters[parameter]
            # Moments lie in memory as their weights do (channels_last); the step count is a scalar.
            placed = torch.empty_like(target).copy_(value) if value.ndim else value.to(target.device)
            self.optimizer.state[target][key] = placed
        self.sums = tensors["sums"].to(self.sums.device)
        self.step = facts["step"]
        self.loss_curve, self.heldout_curve = facts["loss_curve"], facts["heldout_curve"]
        self.run_id = facts["run_id"]


def begin(net: nn.Module, options: params.Train, schedule: Schedule) -> State:
    """A training that has not taken a step."""
    device = next(net.parameters()).device
    return State(
        net=net,
        average=ema.average_of(net),
        optimizer=optim.optimizer(net, options),
        timesteps=TIMESTEPS[options.timesteps](schedule),
        sums=torch.zeros(2, dtype=torch.float64, device=device),
    )


class Checkpoints:
    """The rolling checkpoints of one training: a directory with the last two.

    A checkpoint is STEP.safetensors and then STEP.json, which holds the digest of the former: without a JSON file, or
    with another digest, it does not count.
    """

    KEEP = 2

    def __init__(self, directory: Path) -> None:
        self.directory = directory

    def write(self, state: State) -> None:
        name = f"{state.step:010d}"
        weights = self.directory / f"{name}.safetensors"
        write_atomic(weights, save(state.tensors()))
        facts = {
            "sha256": sha256(weights),
            "step": state.step,
            "loss_curve": state.loss_curve,
            "heldout_curve": state.heldout_curve,
            "run_id": state.run_id,
        }
        write_json(self.directory / f"{name}.json", facts)
        kept = {path.stem for path in self._newest_first()[: self.KEEP]}
        for path in [*self.directory.glob("*.json*"), *self.directory.glob("*.safetensors*")]:
            if path.name.split(".")[0] not in kept:  # an older one, or what a killed process left unfinished
                path.unlink()

    def restore(self, state: State) -> list[str]:
        """Put the newest sound checkpoint into `state`, if there is one; gives a line for each damaged one."""
        damaged = []
        for path in self._newest_first():
            try:
                facts = json.loads(path.read_text(encoding="utf-8"))
                weights = path.with_suffix(".safetensors")
                if sha256(weights) != facts["sha256"]:
                    raise ValueError("its digest does not match")
                state.restore(load_file(weights), facts)
            except (OSError, ValueError, KeyError, SafetensorError) as error:
                damaged.append(f"checkpoint {path.stem} is damaged ({error}); going back to the one before")
            else:
                break
        return damaged

    def _newest_first(self) -> list[Path]:
        return sorted(self.directory.glob("*.json"), reverse=True)
