"""The parameters: one frozen model per section of params.yaml.

params.yaml is the only place where values stand: no field has a default here, so that DVC, which hashes the values
in the file, sees everything that shapes a result. A missing or unknown field is an error that names it.
"""

from io import BytesIO
from pathlib import Path
from typing import Annotated, Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator
from ruamel.yaml import YAML
from ruamel.yaml.error import YAMLError

from diffusion.errors import UserError
from diffusion.files import write_atomic

LARGEST = 2**53
"""Larger whole numbers are not the same in every program that reads JSON."""
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


class Section(BaseModel):
    """What all sections share: frozen, no unknown keys, a docstring per field (shown in Prefect's form)."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class Shard(Section):
    """Raw images into webdataset shards."""

    source: Annotated[str, Field(min_length=1)]
    """An .npz file, a folder of idx files, or a folder of images (sub-folders are classes)."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of the images kept for watching the training, chosen by a hash of each image's key."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of the images kept for the final evaluation; unused where the source has a test split of its own."""
    samples_per_shard: Positive
    """Images per tar file."""

    @model_validator(mode="after")
    def _leaves_something_to_train_on(self) -> Self:
        if self.val_fraction + self.test_fraction >= 1:
            raise ValueError("val_fraction + test_fraction must be below 1, to leave images to train on")
        return self


class Pairs(Section):
    """Images of one size, in shuffled blocks, each with its noise recipe."""

    height: Positive
    """Height in pixels; other images are cropped to the aspect ratio and resized."""
    width: Positive
    """Width in pixels."""
    channels: Literal[1, 3]
    """1 for grey, 3 for RGB; transparent images are laid on white."""
    draws: Positive
    """How many draws of (t, noise key) are stored for each training image; training goes on past them without end."""
    heldout_draws: Positive
    """How many draws of each validation and test image are stored, as tensors."""


class Process(Section):
    """The diffusion process."""

    schedule: Literal["linear", "cosine"]
    """Noise schedule: linear (Ho et al. 2020) or cosine (Nichol & Dhariwal 2021)."""
    num_timesteps: Annotated[int, Field(ge=64)]
    """T, the number of timesteps."""
    parameterization: Literal["eps"]
    """What the network predicts: eps, the noise."""
    variance: Literal["fixed-small", "fixed-large"]
    """Variance of the reverse step: fixed-small (the posterior's) or fixed-large (beta_t)."""
    weighting: Literal["simple"]
    """Loss weight by timestep: simple, the same for all."""


class Network(Section):
    """The denoising network."""

    kind: Literal["unet"]
    """Family of networks."""
    base_channels: Positive
    """Channels of the first level; a multiple of 8."""
    channel_multipliers: Annotated[tuple[Positive, ...], Field(min_length=1)]
    """Channels of each level, in multiples of base_channels; each level halves the resolution."""
    blocks_per_level: Positive
    """Residual blocks at each level on the way down (one more on the way up)."""
    time_conditioning: Literal["add", "film"]
    """How the timestep enters a block: added to the features (DDPM), or scaling and shifting them (Improved DDPM)."""
    attention_levels: tuple[NonNegative, ...]
    """Levels with self-attention, counted from 0, the finest; the middle always has it."""
    patch_size: Positive
    """Side of the square patches that the first layer folds into channels; 1 for none. Larger is faster."""
    dropout: Fraction
    """Dropout rate inside the residual blocks."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.base_channels % 8:
            raise ValueError(f"base_channels must be a multiple of 8 (got {self.base_channels})")
        levels = len(self.channel_multipliers)
        if wrong := [level for level in self.attention_levels if level >= levels]:
            raise ValueError(f"attention_levels names level {wrong[0]}, but levels go from 0 to {levels - 1}")
        return self


class Train(Section):
    """Training."""

    steps: Positive
    """Optimizer steps."""
    batch_size: Positive
    """Images per step, over all processes."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate of AdamW."""
    warmup_steps: NonNegative
    """Steps over which the learning rate rises from zero."""
    decay: Literal["constant", "linear", "cosine"]
    """How the learning rate goes on after warm-up: constant, or falling to zero at the last step."""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW's weight decay, of matrices and kernels."""
    grad_clip: Annotated[float, Field(gt=0)]
    """Largest norm of the gradient; above it the gradient is scaled down."""
    ema_decay: Fraction
    """Decay per step of the exponential moving average of the weights; in the first steps it is lower, rising."""
    flip: bool
    """Whether images are mirrored left to right at random."""
    log_every: Positive
    """Steps between two points of the loss curve."""
    preview_every: Positive
    """Steps between two held-out measurements and sample grids."""


class Sample(Section):
    """Making pictures, for previews and the report."""

    sampler: Literal["ddpm", "ddim"]
    """ddpm: ancestral sampling; ddim: Song et al. 2021."""
    steps: Annotated[int, Field(ge=1)]
    """Network evaluations per picture, at most num_timesteps."""
    eta: Annotated[float, Field(ge=0, le=1)]
    """DDIM's stochasticity: 0 is deterministic, 1 is as random as ddpm."""
    count: Positive
    """Pictures in a grid."""


class Evaluate(Section):
    """Held-out evaluation."""

    resamples: Annotated[int, Field(ge=100)]
    """Bootstrap resamples (over images) behind the 95 % intervals."""


class Export(Section):
    """ONNX export."""

    opset: Annotated[int, Field(ge=18, le=23)]
    """ONNX operator set."""
    tolerance: Annotated[float, Field(gt=0)]
    """Largest difference allowed between ONNX Runtime and torch in any value of eps_hat."""


class Tracking(Section):
    """MLflow names, and what a model must reach to become champion."""

    experiment: Annotated[str, Field(min_length=1)]
    """MLflow experiment."""
    model_name: Annotated[str, Field(min_length=1, pattern=r"^[^/:]+$")]
    """Name of the registered model."""
    max_mse: Annotated[float, Field(gt=0)]
    """Gate: a champion's held-out noise MSE is at most this."""


class Params(Section):
    """All of params.yaml."""

    seed: NonNegative
    """Seed of every random number."""
    device: Device
    """auto (a GPU where there is one), cpu, cuda or cuda:N."""
    shard: Shard
    pairs: Pairs
    process: Process
    network: Network
    train: Train
    sample: Sample
    evaluate: Evaluate
    export: Export
    tracking: Tracking

    @model_validator(mode="after")
    def _sampling_fits_the_process(self) -> Self:
        if self.sample.steps > self.process.num_timesteps:
            raise ValueError(
                f"sample.steps ({self.sample.steps}) exceeds process.num_timesteps ({self.process.num_timesteps})"
            )
        return self


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Params.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def overlay(base: Any, changes: Any) -> Any:
    """`changes` laid over `base`: mappings are merged key by key, in place; anything else is replaced."""
    if not isinstance(base, dict) or not isinstance(changes, dict):
        return changes
    for key, value in changes.items():
        base[key] = overlay(base.get(key), value)
    return base


def read_yaml(path: Path) -> Any:
    """A YAML file as round-trip data: written again, it keeps its comments.

    Raises UserError if the file is missing, no YAML, or not a mapping.
    """
    try:
        document = _yaml().load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}") from None
    except (YAMLError, ValueError) as error:
        raise UserError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(document, dict):
        raise UserError(f"{path}: expected sections with fields, found {type(document).__name__}")
    return document


def write_yaml(path: Path, document: Any) -> None:
    """Write what `read_yaml` gave, changed or not."""
    buffer = BytesIO()
    _yaml().dump(document, buffer)
    write_atomic(path, buffer.getvalue())


def _yaml() -> YAML:
    yaml = YAML(typ="rt", pure=True)
    yaml.width = 120
    yaml.indent(mapping=2, sequence=4, offset=2)
    return yaml


def validate(document: Any, origin: str) -> Params:
    """Parameters from plain data; raises UserError with one line that names `origin` and each wrong field."""
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{origin}: {describe(error)}") from None


def describe(error: ValidationError) -> str:
    """A validation error in one line: field, what is wrong, the value found."""
    problems = []
    for problem in error.errors(include_url=False):
        field = ".".join(str(part) for part in problem["loc"])
        match problem["type"]:
            case "missing":
                text = "missing (presets/digits.yaml has every field)"
            case "extra_forbidden":
                text = "no such parameter"
            case "value_error":
                text = str(problem["ctx"]["error"])
            case _:
                text = f"{problem['msg'][0].lower()}{problem['msg'][1:]} (got {problem['input']!r})"
        problems.append(f"{field}: {text}" if field else text)
    return "; ".join(problems)


def load(path: Path) -> Params:
    """The parameters in a file like params.yaml; raises UserError naming the file and the field."""
    return validate(read_yaml(path), str(path))


def preset_names(directory: Path) -> list[str]:
    """Names of the presets in a directory."""
    return sorted(path.stem for path in directory.glob("*.yaml"))


def with_preset(document: Any, directory: Path, name: str) -> Any:
    """The parameters `document` with preset `name` laid over it; raises UserError listing the presets there are."""
    names = preset_names(directory)
    if name not in names:
        raise UserError(f"preset {name!r}: no such preset; there are {', '.join(names)} (in {directory}/)")
    return overlay(document, read_yaml(directory / f"{name}.yaml"))
