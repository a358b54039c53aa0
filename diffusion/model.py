"""A trained model on disk: `model.safetensors` (EMA weights) and `config.json`, all that evaluating it needs."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import nn

from diffusion import params
from diffusion.errors import UserError
from diffusion.files import new_directory, write_atomic, write_json
from diffusion.nn import build as networks
from diffusion.process import build as processes
from diffusion.process.build import Process

WEIGHTS = "model.safetensors"
CONFIG = "config.json"


class Config(BaseModel):
    """What config.json holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    shape: tuple[int, int, int]
    """Channels, height and width of the images."""
    network: params.Network
    process: params.Process


@dataclass(frozen=True)
class Model:
    """A network with the process that it was trained for."""

    net: nn.Module
    process: Process
    config: Config

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.config.shape


def save_model(directory: Path, net: nn.Module, config: Config) -> None:
    """Write a model's directory; atomic, and the same bytes for the same weights."""
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    with new_directory(directory) as temporary:
        write_atomic(temporary / WEIGHTS, save(weights))
        write_json(temporary / CONFIG, config.model_dump(mode="json"))


def load_model(directory: Path, device: torch.device) -> Model:
    """The model in a directory, in evaluation mode on `device`; raises UserError naming the file at fault."""
    try:
        config = Config.model_validate(_read_json(directory / CONFIG))
        net = networks.network(config.shape, config.network)
        net.load_state_dict(load_file(directory / WEIGHTS))
    except (OSError, ValueError, ValidationError, SafetensorError, RuntimeError) as error:
        raise UserError(f"{directory}: no model ({str(error).splitlines()[0]}); run `dvc repro train`") from None
    return Model(net.eval().requires_grad_(False).to(device), processes.process(config.process), config)


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
