"""Training options."""

import math
from collections.abc import Callable
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field

from diffusion.process.timesteps import TIMESTEPS
from diffusion.sections import AutoFraction, Choice, Fraction, NonNegative, OneOf, Positive, Section, exactly


def _divides(train: "TrainOptions") -> None:
    parts = train.processes * train.accumulate
    if train.batch_size % parts:
        raise ValueError(f"batch_size ({train.batch_size}) must be a multiple of processes x accumulate ({parts})")


def _ends_once(train: "TrainOptions") -> None:
    if train.steps and train.epochs:
        raise ValueError(f"steps ({train.steps}) and epochs ({train.epochs}) both set the length: set one of them to 0")
    if not train.steps and not train.epochs:
        raise ValueError("steps and epochs are both 0: set one of them")


def _can_be_sharded(train: "TrainOptions") -> None:
    if train.sharding == "weights" and train.optimizer.kind == "sgd":
        raise ValueError("sharding: weights needs an optimizer other than sgd: use adamw or muon")


class MuonOptions(Choice):
    """Muon (Jordan et al. 2024) for the hidden layers' weight matrices and kernels, AdamW for all other parameters."""

    kind: Literal["muon"] = "muon"
    """Name of the optimizer."""
    learning_rate: Annotated[float, Field(gt=0, le=1e30)] = 0.01
    """Peak learning rate of Muon; AdamW has train.learning_rate."""


class SgdOptions(Choice):
    """Stochastic gradient descent with momentum (Polyak 1964)."""

    kind: Literal["sgd"] = "sgd"
    """Name of the optimizer."""
    momentum: Fraction = 0.9
    """Share of the previous update that is kept; 0 for plain gradient descent."""


class PowerOptions(Choice):
    """Power-function EMA of EDM2 (Karras et al. 2024), whose width grows with the number of steps."""

    kind: Literal["power"] = "power"
    """Name of the average."""
    width: Annotated[float, Field(ge=0.001, lt=0.288)] = 0.05
    """Relative width of the average, as a fraction of the steps so far."""


class ConstantOptions(Choice):
    """EMA with a constant decay (Ho et al. 2020)."""

    kind: Literal["constant"] = "constant"
    """Name of the average."""
    decay: Fraction = 0.9999
    """Share of the average that is kept at each step; 0 for no averaging."""


Optimizer = Annotated[Any, OneOf(["adamw", "muon", "sgd"], {"muon": MuonOptions, "sgd": SgdOptions})]
FEW_IMAGES, PROBABILITY = 500, 0.12
"""`augment: auto` augments fewer images, with this probability (benchmarks/README.md)."""


class TrainOptions(Section):
    """Training: optimizer, EMA, batches and hardware."""

    rules: ClassVar[tuple[Callable[[Any], None], ...]] = (_divides, _ends_once, _can_be_sharded)

    steps: NonNegative = 1000
    """Number of optimizer steps; 0 if `epochs` is set instead."""
    epochs: NonNegative = 0
    """Number of passes over the training images, instead of `steps`: ceil(epochs * images / batch_size) steps."""
    batch_size: Positive = 128
    """Global batch size, i.e. images per step over all processes."""
    optimizer: Optimizer = MuonOptions()
    """adamw: Loshchilov & Hutter 2019, without weight decay Adam (Kingma & Ba 2015); muon: Muon (Jordan et al. 2024)
    for the hidden layers' weight matrices and kernels, AdamW for all other parameters; sgd: with momentum."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.002
    """Peak learning rate of AdamW or SGD."""
    warmup_steps: NonNegative = 100
    """Steps of linear learning rate warmup."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate schedule after warmup; linear and cosine decay to zero at the last step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """Weight decay for the weights of linear layers and convolutions: decoupled in AdamW, part of the gradient in
    SGD."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Maximum gradient norm; larger gradients are scaled down to it."""
    ema: Annotated[Any, OneOf(["power", "constant"], {"power": PowerOptions, "constant": ConstantOptions})] = (
        PowerOptions()
    )
    """Exponential moving average (EMA) of the weights, which becomes the model. power: its width is a fraction of the
    steps so far (EDM2; Karras et al. 2024); constant: with a constant decay (Ho et al. 2020)."""
    timesteps: Annotated[str, OneOf(TIMESTEPS)] = "rms-error"
    """Distribution of the training timesteps. stored: those of data/pairs, uniform and stratified (Kingma et al. 2021);
    uniform: independent draws; rms-error, loss-second-moment: importance sampling by the recent RMS error or by the
    second moment of the loss, reweighted to stay unbiased (Nichol & Dhariwal 2021); log-snr-normal: normal in log SNR
    (Karras et al. 2022); angle: uniform in arctan(sigma), and T - 1 in half of the draws, for distillation."""
    flip: bool = False
    """Random horizontal flips."""
    augment: AutoFraction = "auto"
    """Probability of each geometric augmentation: flip, scaling, rotation, stretching and translation. The network is
    conditioned on them, so that samples do not show them (Karras et al. 2022, app. F.2). auto: 0.12 with fewer than 500
    training images, otherwise 0."""
    class_dropout: Fraction = 0.1
    """Probability of dropping the class label, to train the unconditional model for classifier-free guidance (Ho &
    Salimans 2022)."""
    log_every: Positive = 20
    """Steps between points of the loss curve."""
    preview_every: Positive = 200
    """Steps between evaluations, each with the held-out error and a grid of samples."""
    patience: NonNegative = 0
    """Early stopping: number of held-out evaluations without improvement after which training stops; 0 to disable."""
    keep_best: bool = False
    """Use the weights with the lowest held-out error instead of the last ones."""
    processes: Positive = 1
    """Number of processes on this machine, one per GPU. Ignored under torchrun, which sets the number itself."""
    sharding: Literal["none", "weights"] = "none"
    """Parallelism across processes. none: data parallel (DDP); weights: fully sharded (FSDP2), for weights, gradients
    and optimizer state that do not fit on one GPU."""
    accumulate: Positive = 1
    """Gradient accumulation: number of micro-batches per step, for batches that do not fit in memory."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Precision of matrix products and convolutions (mixed precision). auto: bf16 on CUDA GPUs that support it,
    otherwise fp32, which uses TF32 on GPUs during training. Weights, optimizer state and EMA are always float32."""
    compile: Annotated[bool | Literal["auto"], exactly(True, False, "auto")] = "auto"
    """Compile the network with torch.compile. auto: on a GPU, if training is long enough to benefit."""
    recompute: bool = False
    """Activation checkpointing: recompute activations in the backward pass. Uses less memory; about a third slower."""

    def for_images(self, images: int) -> Self:
        """The options for this number of training images, where `steps` is the number that `epochs` takes, if set."""
        if not self.epochs:
            return self
        return self.model_copy(update={"steps": math.ceil(self.epochs * images / self.batch_size)})

    def augmentation(self, images: int) -> float:
        """The probability that `augment` is for this number of training images."""
        if self.augment == "auto":
            return PROBABILITY if images < FEW_IMAGES else 0.0
        return self.augment
