"""Options of the process, the network, training and sampling: what each is chosen and set by."""

import math
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field

from diffusion.sections import LIST, Section, exactly

LARGEST = 2**53
"""Larger whole numbers are not the same in every program that reads JSON."""
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Sampler = Literal["ddpm", "ddim", "dpm-solver++", "dpm-solver++-sde", "heun"]
Spacing = Literal["linspace", "quadratic", "log-snr"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


def _beta_is_given(process: "ProcessOptions") -> None:
    if process.schedule == "given" and len(process.beta) != process.num_timesteps:
        raise ValueError(f"beta has {len(process.beta)} values, but num_timesteps is {process.num_timesteps}")
    if process.schedule != "given" and process.beta:
        raise ValueError(f"beta is for the schedule given; with {process.schedule} it must be []")


def _has_timesteps_enough(process: "ProcessOptions") -> None:
    if process.schedule in ("linear", "scaled-linear") and process.num_timesteps < 21:
        raise ValueError(f"the schedule {process.schedule} needs num_timesteps of at least 21")


def _leaves_something_to_see(process: "ProcessOptions") -> None:
    if math.prod(1 - beta for beta in process.beta[:-1]) < 1e-12:
        raise ValueError("beta leaves nothing of the image before the last timestep: give fewer or smaller values")


def _predicts_from_noise_alone(process: "ProcessOptions") -> None:
    if process.zero_terminal_snr and process.parameterization == "eps":
        raise ValueError(
            "zero_terminal_snr needs another parameterization than eps (v, say): at the last timestep x_t is noise "
            "alone, and eps says nothing of the image"
        )


def _weighs_the_last_timestep(process: "ProcessOptions") -> None:
    if process.zero_terminal_snr and process.weighting not in ("snr-plus-one", "truncated-snr"):
        raise ValueError(
            "zero_terminal_snr needs the weighting snr-plus-one or truncated-snr: "
            f"{process.weighting} gives the last timestep, where sampling begins, no weight"
        )


class ProcessOptions(Section):
    """The diffusion process."""

    rules = (
        _beta_is_given,
        _has_timesteps_enough,
        _leaves_something_to_see,
        _predicts_from_noise_alone,
        _weighs_the_last_timestep,
    )

    schedule: Literal["linear", "scaled-linear", "cosine", "sigmoid", "given"]
    """Noise schedule: linear (Ho et al. 2020), scaled-linear (Rombach et al. 2022), cosine (Nichol & Dhariwal 2021),
    sigmoid (Chen 2023), or given, by `beta`."""
    beta: Annotated[tuple[Annotated[float, Field(ge=1e-8, lt=1)], ...], LIST]
    """beta_t for each timestep, if the schedule is given; else empty."""
    num_timesteps: Annotated[int, Field(ge=3)]
    """T, the number of timesteps."""
    zero_terminal_snr: bool
    """Whether the schedule is rescaled so that nothing of the image is left at the last timestep (Lin et al. 2024)."""
    parameterization: Literal["eps", "x_0", "v", "mu"]
    """What the network predicts: eps, the noise; x_0, the clean image; v, the velocity (Salimans & Ho 2022); or mu, the
    mean of the reverse step (unstable; for study)."""
    learned_variance: bool
    """Whether the network learns the variance of the reverse step as well, between the two fixed ones (Nichol &
    Dhariwal 2021); `sample.variance` is then free to be learned."""
    weighting: Annotated[
        Literal["simple", "vlb", "snr-plus-one", "truncated-snr", "min-snr", "p2"],
        BeforeValidator(lambda name: "simple" if name == "snr" else name),
    ]
    """Loss weight by signal-to-noise ratio, the same whatever the network predicts: simple (all noise errors count the
    same; snr is read as another name for it), vlb (the variational bound), snr-plus-one (all errors of v count the
    same), truncated-snr (Salimans & Ho 2022), min-snr (Hang et al. 2023) or p2 (Choi et al. 2022)."""
    min_snr_gamma: Annotated[float, Field(gt=0)]
    """The gamma of the weighting min-snr; 5 in the paper."""
    loss: Literal["mse", "l1", "huber"]
    """What is averaged of the weighted error: its square, its absolute value, or Huber's mixture of both."""


def _groups_channels(network: "NetworkOptions") -> None:
    if network.base_channels % 8:
        raise ValueError(f"base_channels must be a multiple of 8 (got {network.base_channels})")


def _attends_at_its_levels(network: "NetworkOptions") -> None:
    levels = len(network.channel_multipliers)
    if wrong := [level for level in network.attention_levels if level >= levels]:
        raise ValueError(f"attention_levels names level {wrong[0]}, but levels go from 0 to {levels - 1}")


def _conditions_in_its_way(network: "NetworkOptions") -> None:
    allowed = ("add", "film") if network.kind == "unet" else ("token", "adaln")
    if network.conditioning not in allowed:
        raise ValueError(
            f"conditioning of a {network.kind} must be {' or '.join(allowed)} (got {network.conditioning})"
        )


def _has_a_middle(network: "NetworkOptions") -> None:
    if network.kind == "uvit" and network.depth % 2 == 0:
        raise ValueError(f"depth must be odd (got {network.depth})")


def _divides_channels_into_heads(network: "NetworkOptions") -> None:
    if network.head_channels:
        levels = len(network.channel_multipliers)
        attending = {*network.attention_levels, levels - 1} if network.kind == "unet" else set[int]()
        widths = [network.base_channels * network.channel_multipliers[level] for level in attending if level < levels]
        for width in widths or [network.base_channels]:
            if width % network.head_channels:
                raise ValueError(f"head_channels ({network.head_channels}) must divide {width} channels")


class NetworkOptions(Section):
    """The denoising network."""

    rules = (
        _groups_channels,
        _attends_at_its_levels,
        _conditions_in_its_way,
        _has_a_middle,
        _divides_channels_into_heads,
    )

    kind: Literal["unet", "uvit"]
    """Family of networks: a U-Net (Ho et al. 2020) or a transformer with long skips, U-ViT (Bao et al. 2023)."""
    base_channels: Positive
    """Channels of the U-Net's first level, or of the transformer's tokens; a multiple of 8."""
    channel_multipliers: Annotated[tuple[Positive, ...], Field(min_length=1), LIST]
    """U-Net: channels of each level, in multiples of base_channels; each level halves the resolution."""
    blocks_per_level: Positive
    """U-Net: residual blocks at each level on the way down (one more on the way up)."""
    attention_levels: Annotated[tuple[NonNegative, ...], LIST]
    """U-Net: levels with self-attention, counted from 0, the finest; the middle always has it."""
    depth: Positive
    """Transformer: number of blocks, odd: as many before the middle one as after it."""
    conditioning: Literal["add", "film", "token", "adaln"]
    """How timestep and class enter. U-Net: added to the features (add; DDPM), or scaling and shifting them (film;
    Improved DDPM). Transformer: as tokens (token; U-ViT), or scaling, shifting and gating (adaln; DiT)."""
    head_channels: NonNegative
    """Channels of each attention head; 0 for a single head."""
    patch_size: Positive
    """Side of the square patches that the first layer folds into channels; 1 for none. Larger is faster."""
    dropout: Fraction
    """Dropout rate inside the blocks."""
    classes: bool
    """Whether the network is told the class of each image, so that it can be asked for one."""
    convention: Literal["ddpm", "diffusers"]
    """U-Net: details in which the DDPM authors' code and diffusers' defaults differ (padding when halving the
    resolution, epsilon and groups of the normalization): matters for exchanging weights alone."""


def _divides(train: "TrainOptions") -> None:
    parts = train.processes * train.accumulate
    if train.batch_size % parts:
        raise ValueError(f"batch_size ({train.batch_size}) must be a multiple of processes x accumulate ({parts})")


class TrainOptions(Section):
    """Training."""

    rules = (_divides,)

    steps: Positive
    """Optimizer steps."""
    batch_size: Positive
    """Images per step, over all processes."""
    optimizer: Literal["adamw", "muon"]
    """adamw (Loshchilov & Hutter 2019), or muon (Jordan et al. 2024) for the matrices and kernels between the
    first layer and the last, with adamw for the rest."""
    learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate of AdamW."""
    muon_learning_rate: Annotated[float, Field(gt=0)]
    """Peak learning rate of Muon."""
    warmup_steps: NonNegative
    """Steps over which the learning rates rise from zero."""
    decay: Literal["constant", "linear", "cosine"]
    """How the learning rates go on after warm-up: constant, or falling to zero at the last step."""
    weight_decay: Annotated[float, Field(ge=0)]
    """AdamW's weight decay, of matrices and kernels."""
    grad_clip: Annotated[float, Field(gt=0)]
    """Largest norm of the gradient; above it the gradient is scaled down."""
    ema_width: Annotated[float, Field(ge=0.001, lt=0.288)]
    """Width of the moving average of the weights that becomes the model, as a share of the training so far (EDM2's
    power-function average; Karras et al. 2024)."""
    timesteps: Literal["stored", "uniform", "rms-error", "loss-second-moment", "log-snr-normal"]
    """How timesteps are drawn, always with the stored noise: stored, as data/pairs has them, stratified over a block;
    uniform, independently; in proportion to the root of the loss (rms-error) or of its mean square (loss-second-moment;
    Nichol & Dhariwal 2021), weighted to stay unbiased; or log-snr-normal, most often at medium log SNR (Karras et al.
    2022)."""
    flip: bool
    """Whether images are mirrored left to right at random."""
    class_dropout: Fraction
    """How often the class is kept from the network, so that guidance can compare (Ho & Salimans 2022)."""
    log_every: Positive
    """Steps between two points of the loss curve."""
    preview_every: Positive
    """Steps between two held-out measurements and sample grids."""
    patience: NonNegative
    """Training ends early once so many held-out measurements in a row were none better; 0 for never."""
    keep_best: bool
    """Whether the model is the one of the best held-out measurement instead of the last."""
    processes: Positive
    """Processes that train together on this machine, one for each GPU; under torchrun it is torchrun's number."""
    sharding: Literal["none", "weights"]
    """What several processes share out besides the batch: nothing (DDP), or weights, gradients and optimizer state as
    well, where they do not fit into one GPU together (FSDP2)."""
    accumulate: Positive
    """Parts in which each process goes through its share of a batch, for batches that do not fit into memory."""
    precision: Literal["auto", "fp32", "bf16"]
    """What matrix products and convolutions are computed in; auto is bf16 on a GPU that has it, fp32 elsewhere."""
    compile: Annotated[bool | Literal["auto"], exactly(True, False, "auto")]
    """Whether the network is compiled (torch.compile); auto: on a GPU."""
    recompute: bool
    """Whether blocks are computed again on the way back instead of kept: less memory, a third slower."""


class SampleOptions(Section):
    """Making pictures. The bound in bits/dim takes its variance from here, sampler.onnx what `export` has not."""

    sampler: Sampler
    """ddpm: ancestral sampling (Ho et al. 2020); ddim (Song et al. 2021); dpm-solver++: the second-order multistep
    solver, or its stochastic variant (Lu et al. 2022); heun: second order, two looks per step (Karras et al. 2022)."""
    steps: Annotated[int, Field(ge=1)]
    """Steps per picture, at most num_timesteps."""
    spacing: Spacing
    """Which timesteps the steps are at: evenly spaced, quadratic (more of them near the end), or evenly in log SNR."""
    variance: Literal["fixed-small", "fixed-large", "learned", "analytic"]
    """Variance of the reverse step: fixed-small (the posterior's), fixed-large (beta_t), learned (needs
    process.learned_variance) or analytic (Bao et al. 2022; estimated after every training)."""
    eta: Annotated[float, Field(ge=0, le=1)]
    """DDIM's stochasticity: 0 is deterministic, 1 is as random as ddpm."""
    threshold: Literal["clip", "dynamic", "none"]
    """What keeps the estimated clean image in range: clip, dynamic thresholding (Saharia et al. 2022), or none."""
    guidance: Annotated[float, Field(ge=0)]
    """Classifier-free guidance, for networks with classes: 0 ignores the class, 1 heeds it, more overdoes it."""
    count: Positive
    """How many pictures."""
