"""A model: a network and its process.

On disk it is `model.safetensors` (EMA weights), `config.json`, and the digests of both, `SHA256SUMS`.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import from_json
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn

from diffusion import upgrade
from diffusion.errors import FileFault, UserError, describe
from diffusion.nn import build as networks
from diffusion.nn.build import NetworkChoice
from diffusion.nn.layers import Network, NetworkOptions
from diffusion.nn.unet import UNetOptions
from diffusion.process import build as processes
from diffusion.process.build import Process, ProcessOptions
from diffusion.process.denoiser import Guided, Net
from diffusion.process.variance import Variance
from diffusion.samples import draw_samples
from diffusion.sampling import build as sampling
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.sampler import Sampler
from diffusion.sections import COMPLETE
from diffusion.storage.files import SUMS, new_directory, read_checked, write_atomic, write_json, write_sums

WEIGHTS = "model.safetensors"
CONFIG = "config.json"
FILES = {WEIGHTS, CONFIG, SUMS}


class Config(BaseModel):
    """What config.json holds."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    """Of this file."""
    shape: tuple[int, int, int]
    """Channels, height and width of the images."""
    classes: tuple[str, ...]
    """Names of the images' classes, by number; a network without classes was not told of them."""
    network: NetworkChoice
    process: ProcessOptions
    x_0_mse: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] | None
    """E |x_0 - x_0_hat|^2 / d at each timestep, for the analytic variance; None if it was never estimated."""
    scheduler: dict[str, Any] | None = None
    """Of a model imported from diffusers, its scheduler_config.json, to be exported again as it was."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.x_0_mse is not None and len(self.x_0_mse) != self.process.num_timesteps:
            raise ValueError(f"x_0_mse has {len(self.x_0_mse)} values for {self.process.num_timesteps} timesteps")
        return self


@dataclass(frozen=True)
class Model:
    """A network with the process that it is trained for."""

    net: nn.Module
    process: Process
    config: Config

    @property
    def shape(self) -> tuple[int, int, int]:
        return self.config.shape

    @property
    def num_classes(self) -> int:
        """Classes that the network can be asked for; 0 if it knows none."""
        return len(self.config.classes) if self.config.network.classes else 0

    @classmethod
    def new(
        cls,
        shape: tuple[int, int, int],
        network: NetworkOptions | None = None,
        process: ProcessOptions | None = None,
        classes: tuple[str, ...] = (),
        seed: int = 0,
    ) -> Self:
        """A model that is not trained, for images of `shape` (C, H, W); `classes` are names, by number."""
        network, process = network or UNetOptions(), process or ProcessOptions()
        if network.classes and not classes:
            raise ValueError("a network with classes needs their names")
        torch.manual_seed(seed)
        net = new_network(shape, len(classes), network, process).eval()
        config = Config(shape=shape, classes=classes, network=network, process=process, x_0_mse=None)
        return cls(net, processes.process(process), config)

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> "Model":
        """The model in a directory, in evaluation mode; raises UserError naming a file that is missing or damaged."""
        return load_model(Path(directory), torch.device(device))

    def save(self, directory: str | Path) -> None:
        """Write the model's directory, in place of a model that is there; raises UserError if it holds other files."""
        save_model(Path(directory), self.net, self.config)

    def loss(self, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
        """The training loss of each image, (B,): x_0 and eps (B, C, H, W), t and y int64 (B,)."""
        return self.process.loss(self.net, x_0, t, eps, y)

    def sample(self, count: int = 64, *, seed: int = 0, **options: Any) -> NDArray[np.uint8]:
        """Pictures, uint8 (count, C, H, W), of the classes in turn if it knows any.

        options: fields of `SampleOptions`, such as sampler="ddim", steps=20. A model without an estimate for the
        analytic variance, which the stage `train` makes, takes the posterior's by default.
        """
        if self.config.x_0_mse is None:
            options = {"variance": "fixed-small"} | options
        device = next(self.net.parameters()).device
        return draw_samples(self, SampleOptions(count=count, **options), seed, device)

    def net_for(self, y: Tensor | None = None, guidance: float = 1.0) -> Net:
        """The network for images of the classes `y` int64 (B,), -1 for none; for any images if it knows no classes."""
        if not self.num_classes or y is None:
            return self.net
        return Guided(self.net, y, guidance)

    def variance(self, name: str) -> Variance:
        """The reverse variance of that name; raises UserError if the model does not have what it needs."""
        if name == "learned" and not self.config.process.learned_variance:
            raise UserError("sample.variance: the model did not learn a variance; choose another")
        x_0_mse = self.config.x_0_mse
        table = None if x_0_mse is None else torch.tensor(x_0_mse, dtype=torch.float64)
        return processes.variance(name, self.process, table)

    def sampler(self, options: SampleOptions, y: Tensor | None = None) -> Sampler:
        """The sampler that `options` describes, for images of the classes `y` int64 (B,)."""
        return sampling.sampler(options, self.process, self.net_for(y, options.guidance), self.variance)


def new_network(shape: tuple[int, int, int], classes: int, network: NetworkOptions, process: ProcessOptions) -> Network:
    """A network for images of `shape` (C, H, W) of so many classes, and for a process."""
    channels_out = 2 * shape[0] if process.learned_variance else shape[0]
    return networks.network(shape, channels_out, classes, network)


def save_model(directory: Path, net: nn.Module, config: Config) -> None:
    """Write a model's directory; atomic, and the same bytes for the same weights.

    Raises UserError if it exists and holds other files than a model's.
    """
    if directory.is_dir() and (other := sorted({entry.name for entry in directory.iterdir()} - FILES)):
        raise UserError(f"{directory}: holds other files than a model's ({other[0]}); choose another folder")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    with new_directory(directory) as temporary:
        write_atomic(temporary / WEIGHTS, save(weights))
        write_json(temporary / CONFIG, config.model_dump(mode="json"))
        write_sums(temporary)


def read_config(content: bytes) -> Config:
    """The content of a config.json, of this format or an earlier one.

    Raises:
        UserError: it is of a later format.
        ValidationError: it is no config.json.
    """
    try:
        document = from_json(content)
    except ValueError as error:
        raise UserError(f"no JSON ({error})") from None
    if isinstance(document, dict):
        written = document.get("format", 1)
        if type(written) is int and written == 1:
            upgrade.from_format_1(document)
            document["format"] = upgrade.FORMAT
        elif isinstance(written, int) and written > upgrade.FORMAT:
            raise UserError(f"format {written}, of a later version; this one reads formats up to {upgrade.FORMAT}")
    return Config.model_validate(document, context=COMPLETE)


def load_model(directory: Path, device: torch.device) -> Model:
    """The model in a directory, in evaluation mode on `device`.

    Raises:
        UserError: a file is missing, damaged or written by another version; it is named.
    """
    if not (directory / SUMS).exists() and (directory / CONFIG).exists():
        raise FileFault(
            directory, f"has no {SUMS}: an earlier version wrote it, and it cannot be checked; train or import it again"
        )
    described, weights = (read_checked(directory / name) for name in (CONFIG, WEIGHTS))
    try:
        config = read_config(described)
        net = new_network(config.shape, len(config.classes), config.network, config.process)
        net.load_state_dict(load(weights))
    except ValidationError as error:
        raise FileFault(directory / CONFIG, describe(error)) from None
    except UserError as error:
        raise FileFault(directory / CONFIG, str(error)) from None
    except (RuntimeError, SafetensorError):
        raise FileFault(directory / WEIGHTS, f"not of the network in {CONFIG}") from None
    return Model(net.eval().requires_grad_(False).to(device), processes.process(config.process), config)
