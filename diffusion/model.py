"""A model: a network and its diffusion process.

On disk it consists of `model.safetensors` (EMA weights), `config.json` and `SHA256SUMS`, the digests of both.
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
from diffusion.errors import FileFault, UserError, counted, describe
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
    """Content of config.json."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[2] = 2
    """Version of this file's format."""
    shape: tuple[int, int, int]
    """Channels, height and width of the images."""
    classes: tuple[str, ...]
    """Names of the data set's classes, by index; also if the network is not conditioned on them."""
    network: NetworkChoice
    process: ProcessOptions
    x_0_mse: tuple[Annotated[float, Field(ge=0, allow_inf_nan=False)], ...] | None
    """E |x_0 - x_0_hat|^2 / d at each timestep, for the analytic variance; None if not estimated."""
    scheduler: dict[str, Any] | None = None
    """scheduler_config.json of a model imported from diffusers, kept for exporting it again."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.x_0_mse is not None and len(self.x_0_mse) != self.process.num_timesteps:
            raise ValueError(
                f"x_0_mse has {counted(len(self.x_0_mse), 'value')} for {self.process.num_timesteps} timesteps"
            )
        return self


@dataclass(frozen=True)
class Model:
    """A network with the diffusion process it is trained for."""

    net: nn.Module
    process: Process
    config: Config

    @property
    def shape(self) -> tuple[int, int, int]:
        """(C, H, W) of the images."""
        return self.config.shape

    @property
    def num_classes(self) -> int:
        """Number of classes that the network is conditioned on; 0 if it is unconditional."""
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
        """Create an untrained model for images of `shape` (C, H, W); `classes` are class names, by index."""
        network, process = network or UNetOptions(), process or ProcessOptions()
        if network.classes and not classes:
            raise ValueError("network.classes is true, but no class names are given (argument `classes`)")
        torch.manual_seed(seed)
        net = new_network(shape, len(classes), network, process).eval()
        config = Config(shape=shape, classes=classes, network=network, process=process, x_0_mse=None)
        return cls(net, processes.process(process), config)

    @classmethod
    def load(cls, directory: str | Path, device: str | torch.device = "cpu") -> "Model":
        """Load a model, in evaluation mode; raises UserError if a file is missing or corrupt."""
        return load_model(Path(directory), torch.device(device))

    def save(self, directory: str | Path) -> None:
        """Save the model to a directory, replacing a model there; raises UserError if it contains other files."""
        save_model(Path(directory), self.net, self.config)

    def loss(self, x_0: Tensor, t: Tensor, eps: Tensor, y: Tensor | None = None) -> Tensor:
        """Training loss of each image, (B,), for x_0 and eps (B, C, H, W), t and y int64 (B,)."""
        return self.process.loss(self.net, x_0, t, eps, y)

    def sample(self, count: int = 64, *, seed: int = 0, **options: Any) -> NDArray[np.uint8]:
        """Sample images, uint8 (count, C, H, W), cycling through the classes of a class-conditional model.

        options: fields of `SampleOptions`, such as sampler="ddim", steps=20. `variance` defaults to "fixed-small" if
        the model has no estimate for the analytic variance, which only the pipeline's stage `train` makes.
        """
        if self.config.x_0_mse is None:
            options = {"variance": "fixed-small"} | options
        device = next(self.net.parameters()).device
        return draw_samples(self, SampleOptions(count=count, **options), seed, device)

    def net_for(self, y: Tensor | None = None, guidance: float = 1.0) -> Net:
        """The network conditioned on the classes `y` int64 (B,), -1 for none; `y` is ignored without classes."""
        if not self.num_classes or y is None:
            return self.net
        return Guided(self.net, y, guidance)

    def variance(self, name: str) -> Variance:
        """The reverse variance called `name`; raises UserError if the model does not support it."""
        if name == "learned" and not self.config.process.learned_variance:
            raise UserError(
                "sample.variance: learned needs a model trained with process.learned_variance; choose another variance"
            )
        x_0_mse = self.config.x_0_mse
        table = None if x_0_mse is None else torch.tensor(x_0_mse, dtype=torch.float64)
        return processes.variance(name, self.process, table)

    def sampler(self, options: SampleOptions, y: Tensor | None = None) -> Sampler:
        """The sampler described by `options`, conditioned on the classes `y` int64 (B,)."""
        return sampling.sampler(options, self.process, self.net_for(y, options.guidance), self.variance)


def new_network(shape: tuple[int, int, int], classes: int, network: NetworkOptions, process: ProcessOptions) -> Network:
    """Build a network for images of `shape` (C, H, W), a number of classes and a process."""
    channels_out = 2 * shape[0] if process.learned_variance else shape[0]
    return networks.network(shape, channels_out, classes, network)


def network_from(model: Model, config: Config) -> Network:
    """Build the network of `config`, which has the same weights as that of `model`, with the latter's values."""
    net = new_network(config.shape, len(config.classes), config.network, config.process)
    net.load_state_dict(model.net.state_dict())
    return net


def save_model(directory: Path, net: nn.Module, config: Config) -> None:
    """Write a model's directory, atomically; the same weights give the same bytes.

    Raises UserError if the directory contains files that do not belong to a model.
    """
    if directory.is_dir() and (other := sorted({entry.name for entry in directory.iterdir()} - FILES)):
        raise UserError(f"{directory}: contains a file that is not part of a model ({other[0]}); choose another folder")
    weights = {name: tensor.detach().cpu().contiguous() for name, tensor in net.state_dict().items()}
    with new_directory(directory) as temporary:
        write_atomic(temporary / WEIGHTS, save(weights))
        write_json(temporary / CONFIG, config.model_dump(mode="json"))
        write_sums(temporary)


def read_config(content: bytes) -> Config:
    """Parse a config.json of the current format or an earlier one.

    Raises:
        UserError: it is not JSON, or its format is newer.
        ValidationError: its content is invalid.
    """
    try:
        document = from_json(content)
    except ValueError as error:
        raise UserError(f"not valid JSON ({error})") from None
    if isinstance(document, dict):
        written = document.get("format", 1)
        if type(written) is int and written == 1:
            upgrade.from_format_1(document)
            document["format"] = upgrade.FORMAT
        elif isinstance(written, int) and written > upgrade.FORMAT:
            raise UserError(
                f"format {written} is newer than this version supports (up to {upgrade.FORMAT}); upgrade ddpm-pipeline"
            )
        upgrade.complete(document)
    return Config.model_validate(document, context=COMPLETE)


def load_config(directory: Path) -> Config:
    """Load the config of the model in a directory; raises UserError like `load_model`."""
    if not (directory / SUMS).exists() and (directory / CONFIG).exists():
        raise FileFault(
            directory, f"has no {SUMS}, so it cannot be verified (written by an earlier version); train or import again"
        )
    content = read_checked(directory / CONFIG)
    try:
        return read_config(content)
    except ValidationError as error:
        raise FileFault(directory / CONFIG, describe(error)) from None
    except UserError as error:
        raise FileFault(directory / CONFIG, str(error)) from None


def load_model(directory: Path, device: torch.device) -> Model:
    """Load a model, in evaluation mode on `device`.

    Raises:
        UserError: a file is missing, corrupt or from another version; the message names it.
    """
    config = load_config(directory)
    weights = read_checked(directory / WEIGHTS)
    try:
        net = new_network(config.shape, len(config.classes), config.network, config.process)
        net.load_state_dict(load(weights))
    except UserError as error:
        raise FileFault(directory / CONFIG, str(error)) from None
    except (RuntimeError, SafetensorError):
        raise FileFault(directory / WEIGHTS, f"does not match the network in {CONFIG}") from None
    return Model(net.eval().requires_grad_(False).to(device), processes.process(config.process), config)
