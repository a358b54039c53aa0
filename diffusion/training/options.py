"""Options of training."""

from typing import Annotated, Any, Literal

from pydantic import Field

from diffusion.process.timesteps import TIMESTEPS
from diffusion.sections import Choice, Fraction, NonNegative, OneOf, Positive, Section, exactly


def _divides(train: "TrainOptions") -> None:
    parts = train.processes * train.accumulate
    if train.batch_size % parts:
        raise ValueError(f"batch_size ({train.batch_size}) must be a multiple of processes x accumulate ({parts})")


class MuonOptions(Choice):
    """Muon for the matrices and kernels between the first layer and the last, AdamW for the rest."""

    kind: Literal["muon"] = "muon"
    """The kind of optimizer."""
    learning_rate: Annotated[float, Field(gt=0, le=1e30)] = 0.01
    """Muon's peak learning rate."""


class TrainOptions(Section):
    """Training."""

    rules = (_divides,)

    steps: Positive = 1000
    """Optimizer steps."""
    batch_size: Positive = 128
    """Images per step, over all processes."""
    optimizer: Annotated[Any, OneOf(["adamw", "muon"], {"muon": MuonOptions})] = MuonOptions()
    """adamw (Loshchilov & Hutter 2019), or muon (Jordan et al. 2024) for the matrices and kernels between the
    first layer and the last, with adamw for the rest."""
    learning_rate: Annotated[float, Field(gt=0)] = 0.002
    """Peak learning rate of AdamW."""
    warmup_steps: NonNegative = 100
    """Steps over which the learning rates rise from zero."""
    decay: Literal["constant", "linear", "cosine"] = "linear"
    """How the learning rates go on after warm-up: constant, or falling to zero at the last step."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.01
    """AdamW's weight decay, of matrices and kernels."""
    grad_clip: Annotated[float, Field(gt=0)] = 1.0
    """Largest norm of the gradient; above it the gradient is scaled down."""
    ema_width: Annotated[float, Field(ge=0.001, lt=0.288)] = 0.05
    """Width of the moving average of the weights that becomes the model, as a share of the training so far (EDM2's
    power-function average; Karras et al. 2024)."""
    timesteps: Annotated[str, OneOf(TIMESTEPS)] = "rms-error"
    """How timesteps are drawn, always with the stored noise: stored, as data/pairs has them, stratified over a block;
    uniform, independently; in proportion to the root of the loss (rms-error) or of its mean square (loss-second-moment;
    Nichol & Dhariwal 2021), weighted to stay unbiased; or log-snr-normal, most often at medium log SNR (Karras et al.
    2022)."""
    flip: bool = False
    """Whether images are mirrored left to right at random."""
    class_dropout: Fraction = 0.1
    """How often the class is kept from the network, so that guidance can compare (Ho & Salimans 2022)."""
    log_every: Positive = 20
    """Steps between two points of the loss curve."""
    preview_every: Positive = 200
    """Steps between two held-out measurements and sample grids."""
    patience: NonNegative = 0
    """Training ends early after this many held-out measurements without improvement; 0 for never."""
    keep_best: bool = False
    """Whether the model is the one of the best held-out measurement instead of the last."""
    processes: Positive = 1
    """Processes that train together on this machine, one for each GPU; under torchrun it is torchrun's number."""
    sharding: Literal["none", "weights"] = "none"
    """What several processes share out besides the batch: nothing (DDP), or weights, gradients and optimizer state as
    well, where they do not fit into one GPU together (FSDP2)."""
    accumulate: Positive = 1
    """Parts in which each process goes through its share of a batch, for batches that do not fit into memory."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What matrix products and convolutions are computed in; auto is bf16 on a GPU that has it, fp32 elsewhere. On a
    GPU those of fp32 are in TF32 while the network is trained. Weights, optimizer and average are always float32."""
    compile: Annotated[bool | Literal["auto"], exactly(True, False, "auto")] = "auto"
    """Whether the network is compiled (torch.compile); auto: on a GPU, if the training is long enough to benefit."""
    recompute: bool = False
    """Activation checkpointing: blocks are recomputed in the backward pass. Less memory, a third slower."""
