"""The parameters: one frozen model per section of params.yaml.

Missing and unknown fields in params.yaml are errors that name the field, even though every field has a default: DVC
hashes the values in the file, and must see everything that affects a result.
"""

import copy
import errno
import math
import re
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, ValidationError
from pydantic.fields import FieldInfo

from diffusion.distillation.options import DistillOptions
from diffusion.errors import SystemFault, UserError, describe, without_secrets
from diffusion.evaluation.quality import MIN_IMAGES
from diffusion.nn.build import Device, NetworkChoice
from diffusion.nn.unet import UNetOptions
from diffusion.pairs.pixels import FIELDS, Filter, Fit, Resize, opaque
from diffusion.process.build import ProcessOptions
from diffusion.sampling.build import SampleOptions, SamplerChoice, SpacingName
from diffusion.sections import (
    COMPLETE,
    LIST,
    OF_ANOTHER_KIND,
    Choice,
    NonNegative,
    OneOf,
    Positive,
    Section,
    SomeOf,
)
from diffusion.sources.locations import is_url
from diffusion.sources.reading import MAX_PIXELS, Layout, Reading
from diffusion.training.options import TrainOptions
from diffusion.upgrade import from_earlier
from flows.gate import Better, Gate, Limit
from flows.rules import RULES
from flows.yaml_files import read_yaml


def _leaves_something_to_train_on(shard: "Shard") -> None:
    if shard.val_fraction + shard.test_fraction >= 1:
        raise ValueError("val_fraction + test_fraction must be below 1, to leave images to train on")


def _range(values: tuple[float, ...]) -> tuple[float, ...]:
    if values and not (len(values) == 2 and 0 < values[1] - values[0] < math.inf):
        raise ValueError("must be empty or two numbers, the smaller one first")
    return values


def _public(source: str) -> str:
    if is_url(source) and without_secrets(base := source.partition("?")[0]) != base:
        raise ValueError("must not contain a password, which MLflow and reports would show; import it without --link")
    return source


def none_or_enough(samples: int) -> int:
    """A number of samples to compare with real images; raises ValueError if it is too small."""
    if 0 < samples < MIN_IMAGES:
        raise ValueError(f"must be 0, for none, or at least {MIN_IMAGES} (got {samples})")
    return samples


def _names_its_features(evaluate: "Evaluate") -> None:
    if evaluate.features == "auto" and evaluate.features_sha256:
        raise ValueError("features_sha256 is the digest of a file, but features is auto; set features_sha256 to ''")
    if evaluate.features != "auto" and not evaluate.features.endswith(".onnx"):
        raise ValueError("features must be auto, or an .onnx file")


class Shard(Section):
    """Conversion of raw images to webdataset shards, and the split into train, val and test."""

    rules = (_leaves_something_to_train_on,)

    source: Annotated[str, Field(pattern=r"^[^\x00]+$"), AfterValidator(_public)] = "data/raw/digits.npz"
    """Data set: a folder, .zip or .tar of images, whose sub-folders are splits or classes; Parquet files; webdataset
    shards; an .npz or .npy file; a folder of idx or CIFAR files. A path, or a URL such as s3://bucket/pictures.zip."""
    split_names_as_classes: bool = False
    """Treat folders named like a split (train, test, ...) as classes, or as parts of one."""
    layout: Layout = "auto"
    """Order of the axes of arrays. channels-first: (N, C, H, W); channels-last: (N, H, W, C); auto: whichever has fewer
    channels than rows and columns."""
    value_range: Annotated[tuple[float, ...], LIST, AfterValidator(_range)] = ()
    """The values of black and white of arrays, and of greyscale pictures with more than 8 bits; they are brought to 8
    bits, and values beyond are clipped. []: those of the type, 0 to 255 and 0 to 65535 for 8 and 16 bits without sign;
    0 to 1, or -1 to 1, for floats in this range."""
    val_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the images held out for validation, chosen by a hash of their pixels; ignored if the data set has a
    validation split."""
    test_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.1
    """Fraction of the images held out for testing, chosen by a hash of their pixels; ignored if the data set has a
    test split."""
    max_pixels: Positive = MAX_PIXELS
    """Maximum number of pixels, width times height, of an image file. A larger one is rejected without decoding it,
    since a small file can decode to more than fits into memory (a decompression bomb)."""
    max_rejected: Annotated[float, Field(ge=0, le=1)] = 0.05
    """Maximum share of the images that may be rejected because they cannot be used; more of them stop the stage.
    Files that are not images, and copies of images in the data set's own test split, do not count."""
    samples_per_shard: Positive = 10000
    """Maximum number of images per tar file."""

    @property
    def reading(self) -> Reading:
        """How the source is read."""
        return Reading(**self.model_dump(include=set(Reading._fields)))


class Pairs(Section):
    """Image size, and forward-noise pairs (x_t, eps) in shuffled blocks."""

    height: Positive = 8
    """Image height in pixels. Images of another size are resized; see `resize`."""
    width: Positive = 8
    """Image width in pixels."""
    channels: Positive = 1
    """Image channels. 1: greyscale; 3: RGB; 4: RGB and alpha, not premultiplied. Other numbers: the channels of an
    array."""
    resize: Resize = "crop"
    """How images of another aspect ratio are resized. crop: cut off what exceeds it, equally at both ends; pad: add
    `background` at both sides; stretch: distort the image."""
    background: Annotated[str, AfterValidator(opaque)] = "white"
    """Colour behind transparent pixels, and beside padded images, as a CSS name or `#rrggbb`; in greyscale and arrays,
    its luminance. With 4 channels, pixels stay transparent, and invisible ones have this colour."""
    filter: Filter = "bicubic"
    """Pillow's filter for resizing, antialiased except nearest. bicubic is sharp and, unlike lanczos, hardly rings at
    edges; box averages, without ringing; nearest keeps the values, for pixel art and masks."""
    draws: Positive = 8
    """Number of (t, noise) draws stored per training image, as seeds. Longer training derives further draws."""
    heldout_draws: Positive = 8
    """Number of (t, noise) draws stored per validation and test image, as tensors."""

    @property
    def fit(self) -> Fit:
        """How images are brought to one size."""
        return Fit(**self.model_dump(include=set(FIELDS)))


MODEL_NAME = r"[A-Za-z0-9][A-Za-z0-9._-]*"
"""Name of a folder in data/models."""


def _model_or_none(name: str) -> str:
    if name and not re.fullmatch(MODEL_NAME, name):
        raise ValueError(f"must be the name of a folder in data/models, or '' (got {name!r})")
    return name


class Train(TrainOptions):
    """Training: optimizer, EMA, batches and hardware."""

    start_from: Annotated[str, AfterValidator(_model_or_none)] = ""
    """Model to start from: the name of a folder in data/models, where `ddpm import-model` puts models. Training begins
    with its averaged weights, at step 0, and must have the same network, process and image size. '': random weights."""


class Evaluate(Section):
    """Evaluation on held-out images: noise prediction, likelihood, and the quality of samples."""

    rules = (_names_its_features,)

    resamples: Annotated[int, Field(ge=100)] = 1000
    """Number of bootstrap resamples (over images) for the 95 % intervals."""
    likelihood_images: Annotated[int, Field(ge=2)] = 256
    """Number of test images for the estimated bound in bits/dim, which samples timesteps."""
    exact_likelihood_images: Annotated[int, Field(ge=2)] = 16
    """Number of test images for the exact bound in bits/dim, which sums over all timesteps."""
    quality_samples: Annotated[NonNegative, AfterValidator(none_or_enough)] = 256
    """Number of samples to compare with training images, beside as many held-out images: at most all of these, and half
    of the training images. At least 20, or 0: none. Few samples tell only large differences."""
    features: Annotated[str, Field(pattern=r"^[^\x00]+$")] = "auto"
    """Features in which samples are compared. auto: those of a small network trained on the training images, by class
    or, without classes, by rotation. Otherwise an ONNX file of your own, such as Inception or DINOv2: it gets float32
    (N, C, H, W) in [0, 1], and its first output is (N, D)."""
    features_sha256: Annotated[str, Field(pattern=r"^([0-9a-f]{64})?$")] = ""
    """SHA-256 of the file in `features`, so that another file there is noticed."""
    samplers: Annotated[
        tuple[Annotated[Any, SomeOf(SampleOptions, "fields of sample", without={"count"})], ...], LIST
    ] = ()
    """Settings to compare with that of the section `sample`, in the same figures of quality and from the same noise.
    Each lists the fields in which it differs: [{sampler: ddim, steps: 10}, {sampler: dpm-solver++, steps: 5}]."""
    shown_channels: Annotated[tuple[NonNegative, ...], LIST] = ()
    """One or three channels to show in the plots, for images with other than 1, 3 or 4; []: the first three."""


class Export(Section):
    """ONNX export."""

    opset: Annotated[int, Field(ge=18, le=23)] = 20
    """ONNX operator set version."""
    tolerance: Annotated[float, Field(gt=0)] = 0.0001
    """Maximum difference between ONNX Runtime and torch: absolute in eps_hat, and relative in the held-out MSE."""
    sampler: SamplerChoice = Choice(kind="dpm-solver++")
    """Sampler in sampler.onnx. Threshold, guidance and variance are those of the section `sample`."""
    steps: Annotated[int, Field(ge=1)] = 10
    """Default number of sampling steps in sampler.onnx; callers can request another."""
    spacing: SpacingName = "quadratic"
    """Spacing of the sampling timesteps in sampler.onnx, as in sample.spacing."""
    variants: Annotated[tuple[Literal["fp16", "int8"], ...], LIST] = ()
    """Additional files at lower precision. fp16: half precision, for GPUs; int8: 8-bit matrix products, for CPUs."""
    max_loss: Annotated[float, Field(ge=0)] = 0.02
    """Maximum relative increase of a variant's held-out MSE over the model's."""


class Tracking(Section):
    """Names in MLflow, and the rules for becoming champion."""

    experiment: Annotated[str, Field(min_length=1)] = "ddpm"
    """Name of the MLflow experiment."""
    model_name: Annotated[str, Field(min_length=1, pattern=r"^[^\s/:'\\][^/:'\\\n]*$")] = "ddpm"
    """Name of the registered model; must not contain / : ' or \\, which MLflow rejects or cannot search for."""
    gate: Annotated[Gate, LIST] = (Limit(figure="val_mse", value=0.5), Better(figure="val_mse", by=0.0))
    """Rules that a version must meet to become champion (docs/mlflow.md). {kind: limit, figure, value}: at most `value`
    (at least, where higher is better); {kind: better, figure, by}: better than the champion by more than `by`, beyond
    the noise of the measurement; {kind: not-worse, figure, by}: not worse by more than `by` beyond the noise. Figures:
    val_mse, bits_per_dim, frechet_distance, kid, precision, recall, density, coverage."""


class Params(Section):
    """The contents of params.yaml."""

    rules = RULES

    seed: NonNegative = 0
    """Random seed of the whole pipeline."""
    device: Device = "auto"
    """Device for training, evaluation and sampling. auto: CUDA, MPS or XPU if available, otherwise the CPU."""
    shard: Shard = Shard()
    pairs: Pairs = Pairs()
    process: ProcessOptions = ProcessOptions()
    network: NetworkChoice = UNetOptions()
    train: Train = Train()
    sample: SampleOptions = SampleOptions()
    evaluate: Evaluate = Evaluate()
    export: Export = Export()
    distill: DistillOptions = DistillOptions()
    tracking: Tracking = Tracking()


SECTIONS: dict[str, type[Section]] = {
    name: field.annotation
    for name, field in Params.model_fields.items()
    if isinstance(field.annotation, type) and issubclass(field.annotation, Section)
}


def _choices() -> dict[tuple[str, ...], OneOf]:
    """The choices that can have fields, by where they are."""
    fields: dict[tuple[str, ...], FieldInfo] = {(name,): field for name, field in Params.model_fields.items()}
    for name, section in SECTIONS.items():
        fields |= {(name, key): field for key, field in section.model_fields.items()}
    marks = {place: mark for place, field in fields.items() for mark in field.metadata if isinstance(mark, OneOf)}
    return {place: mark for place, mark in marks.items() if mark.options}


CHOICES = _choices()


def read(path: Path) -> Any:
    """A file like params.yaml as round-trip data; raises UserError if it is missing, or an earlier version wrote it."""
    document = read_any_format(path)
    if old := from_earlier(copy.deepcopy(document)):
        raise UserError(
            f"{path}: of an earlier version (it has {', '.join(old)}); `ddpm params --update` rewrites params.yaml"
        )
    return document


def read_any_format(path: Path) -> Any:
    """A file like params.yaml, also of an earlier version; raises UserError if it is missing."""
    try:
        return read_yaml(path)
    except SystemFault as fault:
        if fault.error.errno != errno.ENOENT:
            raise
        raise UserError(
            f"{path}: no such file here; run this in the pipeline's folder (or `git checkout` it)"
        ) from None


def validate(document: Any, origin: str) -> Params:
    """Parameters from plain data; raises UserError with one line that names `origin` and each wrong field."""
    try:
        return Params.model_validate(document, context=COMPLETE)
    except ValidationError as error:
        raise UserError(f"{origin}: {describe(error)}{advice(error)}") from None


def advice(error: ValidationError) -> str:
    """What to do about an error, where a command does it."""
    faults = error.errors(include_url=False)  # but no command changes an item of a list alone
    kinds = {fault["type"] for fault in faults if all(isinstance(name, str) for name in fault["loc"])}
    if OF_ANOTHER_KIND in kinds:
        return "; `ddpm set NAME.kind=KIND` changes a kind together with its fields"
    return "; `ddpm params --update` adds what is missing" if "missing" in kinds else ""


def load(path: Path) -> Params:
    """The parameters in a file like params.yaml; raises UserError naming the file and the field."""
    return validate(read(path), str(path))
