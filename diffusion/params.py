"""The parameters: one frozen model per section of params.yaml.

params.yaml is the only place where values stand: no field has a default here, so that DVC, which hashes the values
in the file, sees everything that shapes a result. A missing or unknown field is an error that names it.
"""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, ValidationError

from diffusion import rules
from diffusion.errors import UserError, describe
from diffusion.sections import LIST, Section, exactly
from diffusion.yaml_files import read_yaml

LARGEST = 2**53
"""Larger whole numbers are not the same in every program that reads JSON."""
Positive = Annotated[int, Field(ge=1, le=LARGEST)]
NonNegative = Annotated[int, Field(ge=0, le=LARGEST)]
Fraction = Annotated[float, Field(ge=0, lt=1)]
Sampler = Literal["ddpm", "ddim", "dpm-solver++", "dpm-solver++-sde", "heun"]
Spacing = Literal["linspace", "quadratic", "log-snr"]
Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda(:\d+)?)$")]


class Shard(Section):
    """Raw images into webdataset shards."""

    rules = (rules.leaves_something_to_train_on,)

    source: Annotated[str, Field(min_length=1)]
    """An .npz file, a folder of idx files, or a folder of images (sub-folders are splits or classes)."""
    split_names_as_classes: bool
    """Confirms that folders named like a split (train, test, ...) are classes, or parts of one, not splits."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of the images held out for validation, by a hash of their pixels; unused where the source has its own."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)]
    """Share of the images held out for the final evaluation; chosen and unused likewise."""
    samples_per_shard: Positive
    """Images per tar file."""


class Pairs(Section):
    """Images of one size, in shuffled blocks, each with its noise recipe."""

    height: Positive
    """Height in pixels; other images are cropped to the aspect ratio and resized."""
    width: Positive
    """Width in pixels."""
    channels: Annotated[Literal[1, 3], exactly(1, 3)]
    """1 for grey, 3 for RGB; transparent images are laid on white."""
    draws: Positive
    """How many draws of (t, noise key) are stored for each training image; training goes on past them without end."""
    heldout_draws: Positive
    """How many draws of each validation and test image are stored, as tensors."""


class Process(Section):
    """The diffusion process."""

    rules = (
        rules.beta_is_given,
        rules.has_timesteps_enough,
        rules.leaves_something_to_see,
        rules.predicts_from_noise_alone,
        rules.weighs_the_last_timestep,
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
    weighting: Literal["simple", "vlb", "snr", "snr-plus-one", "truncated-snr", "min-snr", "p2"]
    """Loss weight by signal-to-noise ratio, the same whatever the network predicts: simple (all noise errors count the
    same; snr is another name for it), vlb (the variational bound), snr-plus-one (all errors of v count the same),
    truncated-snr (Salimans & Ho 2022), min-snr (Hang et al. 2023) or p2 (Choi et al. 2022)."""
    min_snr_gamma: Annotated[float, Field(gt=0)]
    """The gamma of the weighting min-snr; 5 in the paper."""
    loss: Literal["mse", "l1", "huber"]
    """What is averaged of the weighted error: its square, its absolute value, or Huber's mixture of both."""


class Network(Section):
    """The denoising network."""

    rules = (
        rules.groups_channels,
        rules.attends_at_its_levels,
        rules.conditions_in_its_way,
        rules.has_a_middle,
        rules.divides_channels_into_heads,
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


class Train(Section):
    """Training."""

    rules = (rules.divides,)

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


class Sample(Section):
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


class Evaluate(Section):
    """Held-out evaluation."""

    resamples: Annotated[int, Field(ge=100)]
    """Bootstrap resamples (over images) behind the 95 % intervals."""
    likelihood_images: Annotated[int, Field(ge=2)]
    """Test images on which the bound in bits/dim is estimated, at some timesteps of each."""
    exact_likelihood_images: Annotated[int, Field(ge=2)]
    """Test images on which it is summed over every timestep."""


class Export(Section):
    """ONNX export."""

    opset: Annotated[int, Field(ge=18, le=23)]
    """ONNX operator set."""
    tolerance: Annotated[float, Field(gt=0)]
    """Largest difference allowed between ONNX Runtime and torch in a value of eps_hat, and in shares of the MSE."""
    sampler: Sampler
    """The sampler inside sampler.onnx; one of the section `sample`, which has the rest of how it samples."""
    steps: Annotated[int, Field(ge=1)]
    """Its steps unless asked otherwise."""
    spacing: Spacing
    """Which timesteps they are at."""
    variants: Annotated[tuple[Literal["fp16", "int8"], ...], LIST]
    """Further files in fewer bits: fp16 (float16, for GPUs) or int8 (matrix products in 8 bits, for CPUs)."""
    max_loss: Annotated[float, Field(ge=0)]
    """Largest share by which a variant's held-out MSE may exceed the model's."""


class Tracking(Section):
    """MLflow names, and the validation error that a model must reach to become champion."""

    experiment: Annotated[str, Field(min_length=1)]
    """MLflow experiment."""
    model_name: Annotated[str, Field(min_length=1, pattern=r"^[^\s/:'\\][^/:'\\]*$")]
    """Name of the registered model, without the characters / : ' and \\, which MLflow refuses or cannot search for."""
    max_mse: Annotated[float, Field(gt=0)]
    """Gate: the largest noise MSE on the validation pairs with which a version can become champion."""


class Params(Section):
    """All of params.yaml."""

    rules = (
        rules.samples_at_timesteps_that_exist,
        rules.exports_timesteps_that_exist,
        rules.has_patches_that_fit,
        rules.draws_the_last_timestep,
        rules.has_learned_its_variance,
        rules.exports_its_variance,
    )

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


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Params.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def validate(document: Any, origin: str) -> Params:
    """Parameters from plain data; raises UserError with one line that names `origin` and each wrong field."""
    try:
        return Params.model_validate(document)
    except ValidationError as error:
        raise UserError(f"{origin}: {describe(error)}") from None


def load(path: Path) -> Params:
    """The parameters in a file like params.yaml; raises UserError naming the file and the field."""
    return validate(read_yaml(path), str(path))
