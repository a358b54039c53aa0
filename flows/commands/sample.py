"""`ddpm sample`: images from noise, variations of an image, interpolations between two, or inpainting."""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, make_dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import torch
from cyclopts import Group, Parameter
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from diffusion.distillation.options import DistillOptions
from diffusion.distillation.sampling import student_sampling
from diffusion.errors import UsageError, UserError, describe
from diffusion.evaluation.filmstrip import frames
from diffusion.model import Model, load_model
from diffusion.nn import build as networks
from diffusion.nn.build import Device
from diffusion.pairs.pixels import to_uint8
from diffusion.process.schedule import Schedule, double
from diffusion.progress import Progress, say
from diffusion.samples import classes_in_turn, noise_for
from diffusion.sampling import build as sampling
from diffusion.sampling.build import SampleOptions
from diffusion.sampling.editing import image_to_image, inpaint, mix, repaint_path
from diffusion.sampling.sampler import SAMPLER_OPTIONS, Draw, Noise, Previous, Sampler, sample
from diffusion.sections import COMPLETE, NonNegative, OneOf, Section
from diffusion.sources.bands import MODES
from diffusion.storage.files import write_atomic
from flows.changes import lay_over
from flows.commands.pictures import prepare_folder, read_image, read_mask, to_x_0, writer
from flows.commands.types import Integer, Number
from flows.fields import plain, takes
from flows.params import Pairs, Shard, advice, read
from flows.paths import Paths

BATCH = 64
"""Images generated at once: memory does not grow with their number."""
SAMPLER_FIELDS = {
    name: kind
    for kind in SAMPLER_OPTIONS.values()
    for name in kind.model_fields
    if name not in {"kind", "seed", "device", *SampleOptions.model_fields}  # these can be set in params.yaml only
}
"""The fields of single samplers, and the options that have them."""
FILMSTRIP = 4
"""Number of images in a filmstrip, at most."""
REPAINT, MAX_REPAINT = 10, 1000
"""Default of jump and rounds (Lugmayr et al. 2022, section 5), and their maximum."""


class Settings(Section):
    """The parameters that sampling uses."""

    seed: NonNegative = 0
    device: Device = "auto"
    sample: SampleOptions = SampleOptions()
    distill: DistillOptions = DistillOptions()
    """How many steps the student takes."""
    shard: Shard = Shard()
    """How images are read, which also holds for those to edit."""
    pairs: Pairs = Pairs()
    """How images are resized."""


@dataclass(frozen=True)
class Task:
    """What to generate: images from noise, variations, an interpolation, or inpainted images."""

    steps: int
    """Number of sampler steps."""
    generate: Callable[[Sampler, Noise, Tensor], Tensor]
    """(sampler, noise, indices of the images int64 (B,)) to images (B, C, H, W) in [-1, 1]."""
    one_noise: bool = False
    """Whether all images share the noise of the first."""


@dataclass(frozen=True)
class ReportsProgress:
    """A sampler that reports its steps."""

    sampler: Sampler
    progress: Progress

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, z: Draw, previous: Previous | None) -> tuple[Tensor, Tensor]:
        made = self.sampler.step(x_t, t, s, z, previous)
        self.progress.advance(1)
        return made


def _settings() -> type:
    """A dataclass of the options that override params.yaml: fields of the section `sample` and of single samplers."""

    def option(name: str, kind: Any, text: str, default: str) -> tuple[str, Any, Any]:
        annotated = Annotated[kind | None, Parameter(help=text, group=SETTINGS, show_default=lambda _: default)]
        return name, annotated, field(default=None)

    def add(section: type[Section], name: str, default: str) -> None:
        info = section.model_fields[name]
        marks = [mark.names for mark in info.metadata if isinstance(mark, OneOf)]
        kind = Literal[marks[0]] if marks else Integer if info.annotation is int else Number
        limits = "" if marks else f" ({takes(section, name)})"
        options.append(option(name, kind, f"{plain(info.description or '')}{limits}", default))

    seed = f"Random seed of the noise; image i is the same for any count. ({takes(Settings, 'seed')})"
    options = [
        option("seed", Integer, seed, "seed in params.yaml"),
        option("device", str, " | ".join(networks.DEVICE_NAMES), "device in params.yaml"),
    ]
    for name in SampleOptions.model_fields:
        add(SampleOptions, name, f"sample.{name} in params.yaml")
    for name, section in SAMPLER_FIELDS.items():
        add(section, name, "as in params.yaml")
    return make_dataclass("Overrides", options, frozen=True, namespace={"__module__": __name__})


SETTINGS = Group.create_ordered("Settings, overriding params.yaml")
EDITING = Group.create_ordered("Editing images")
Overrides: Any = _settings()


@dataclass(frozen=True)
class Editing:
    """Options for images that are given."""

    images: Annotated[
        tuple[Path, ...], Parameter(name="--from", consume_multiple=(1, 1000), group=EDITING, show_default=False)
    ] = ()
    """Image to vary, or two images to interpolate between."""
    at: Annotated[Integer | None, Parameter(group=EDITING)] = None
    """Timestep up to which noise is added: the higher, the less of the image remains. Default: the last timestep at
    which alpha_bar is at least 0.5."""
    mask: Annotated[Path | None, Parameter(group=EDITING)] = None
    """Inpaint the image where this mask is white (RePaint; Lugmayr et al. 2022)."""
    jump: Annotated[Integer | None, Parameter(group=EDITING, show_default=lambda _: str(REPAINT))] = None
    """With --mask: number of steps in each run that is repeated, 1 to 1000."""
    rounds: Annotated[Integer | None, Parameter(group=EDITING, show_default=lambda _: str(REPAINT))] = None
    """With --mask: how often each run is repeated, 1 to 1000; the time grows in proportion."""


def run(
    *,
    out: str = "samples.png",
    model: Path | None = None,
    student: bool = False,
    classes: Annotated[tuple[str, ...], Parameter(name="--class", show_default=False)] = (),
    filmstrip: Path | None = None,
    editing: Annotated[Editing, Parameter(name="*")] = Editing(),
    overrides: Annotated[Overrides, Parameter(name="*")] = Overrides(),  # noqa: B008 (frozen)
) -> None:
    """Generate images with the trained model; options override the section `sample` of params.yaml.

    Args:
        out: A .png file (a grid of all images), an .npz file or a folder (out/).
        model: A trained model; by default models/ddpm, or models/student with --student.
        student: Sample as the distilled model does: with the sampler consistency in distill.sampling_steps steps.
        classes: Class name or number; several, separated by commas (3,5), are assigned to the images in turn. By
            default all classes; with --from, none.
        filmstrip: Also write a .png file that shows how the first images emerge from noise.
        editing: Options of image to image, interpolation and inpainting.
        overrides: Options that override params.yaml.
    """
    paths = Paths(student=student)
    given = {name: value for name, value in asdict(overrides).items() if value is not None}
    settings = read_settings(given, paths)
    options = settings.sample
    if filmstrip is not None and editing.images:
        raise UsageError("--filmstrip: shows images from noise; omit --from")
    if filmstrip is not None and filmstrip.suffix.lower() != ".png":
        raise UsageError(f"--filmstrip: {filmstrip} is not a .png file")
    if filmstrip is not None and (filmstrip.is_dir() or filmstrip.resolve() == Path(out).resolve()):
        raise UsageError(f"--filmstrip: {filmstrip} is a folder or the file of --out; choose another name")
    device = networks.device(settings.device)
    loaded = load_model(model or paths.model, device)
    if given.get("guidance") not in (None, 1) and not loaded.num_classes:
        raise UsageError("--guidance: the model has no classes (it was trained with network.classes: false)")
    if options.guidance != 1 and not options.guidable:
        kind = options.sampler.kind
        raise UsageError(f"--guidance: the sampler {kind} is for distilled models, which have it built in; use 1")
    # The class of a given image is unknown.
    y = None if editing.images else classes_in_turn(loaded, options.count, device)
    if classes:
        numbers = torch.tensor(class_numbers(classes, loaded), device=device)
        y = numbers[torch.arange(options.count, device=device) % len(numbers)]
    if options.steps > (limit := loaded.process.schedule.num_timesteps):
        text = f"must be at most {limit}, the model's number of timesteps (got {options.steps})"
        field = "distill.sampling_steps" if student else "sample.steps"
        raise UsageError(f"--steps: {text}") if "steps" in given else UserError(f"{paths.params}: {field} {text}")
    generated = task(editing, settings, options, loaded, device)
    write = writer(out, options.count, loaded.shape[0])
    if filmstrip is not None:
        prepare_folder("--filmstrip", filmstrip.parent)
    images = draw(loaded, options, settings.seed, generated, device, y)
    write(images, None if y is None else y.cpu().numpy())
    say(f"sample: wrote {out}")
    if filmstrip is not None:
        from diffusion.evaluation import plots  # slow to import

        few = min(options.count, FILMSTRIP)
        strip = frames(loaded, options, settings.seed, device, images=few, y=None if y is None else y[:few])
        write_atomic(filmstrip, plots.filmstrip(strip))
        say(f"sample: wrote {filmstrip}")


def read_settings(given: Mapping[str, Any], paths: Paths) -> Settings:
    """params.yaml, if there is one, with the sampling of the student if `paths` has it, overridden by `given`."""
    sample = {name: given[name] for name in SampleOptions.model_fields if name in given}
    document: dict[str, Any] = {"device": "auto"}
    own = (("distill", DistillOptions), ("shard", Shard), ("pairs", Pairs))
    document |= {name: kind().model_dump(mode="json") for name, kind in own}
    if os.path.lexists(paths.params):
        document |= {name: value for name, value in read(paths.params).items() if name in Settings.model_fields}
        try:
            found = Settings.model_validate(document, context=COMPLETE)
        except ValidationError as error:
            raise UserError(f"{paths.params}: {describe(error)}{advice(error)}") from None
        if paths.student:
            of_student = student_sampling(found.sample, found.distill.sampling_steps)
            document["sample"] = of_student.model_dump(mode="json")
    elif missing := [f"--{name}" for name in (*SampleOptions.model_fields, "seed") if name not in given]:
        raise UserError(f"{paths.params}: no such file here; without it, these must be given: {', '.join(missing)}")
    if of_sampler := {name: given[name] for name in SAMPLER_FIELDS if name in given}:
        sample["sampler"] = ({"kind": sample["sampler"]} if "sampler" in sample else {}) | of_sampler
    changes = {name: given[name] for name in ("seed", "device") if name in given} | {"sample": sample}
    document = lay_over(document, changes)
    for name in of_sampler:
        _check_sampler_has(name, document["sample"]["sampler"]["kind"])
    try:
        return Settings.model_validate(document, context=COMPLETE)
    except ValidationError as error:
        raise UsageError(describe(error, name=lambda place: f"--{place[-1]}")) from None


def _check_sampler_has(name: str, kind: str) -> None:
    """Raise UsageError if the sampler chosen does not have an option."""
    having = [known for known, options in SAMPLER_OPTIONS.items() if name in options.model_fields]
    if kind not in having:
        raise UsageError(f"--{name}: the sampler {kind} does not have it; add --sampler {' or '.join(having)}")


def class_numbers(names: Sequence[str], model: Model) -> list[int]:
    """Indices of classes given by name or number; a text may hold several, separated by commas."""
    names = [name.strip() for text in names for name in text.split(",")]
    known = model.config.classes
    if not model.num_classes:
        raise UsageError("--class: the model has no classes (it was trained with network.classes: false)")
    numbers = [
        known.index(name) if name in known else int(name) if name.isascii() and name.isdecimal() else -1
        for name in names
    ]
    for name, found in zip(names, numbers, strict=True):
        if not 0 <= found < len(known):
            raise UsageError(
                f"--class: {name!r} is not a class of the model; available: {', '.join(known)}, "
                f"or their numbers from 0 to {len(known) - 1}"
            )
    return numbers


def task(editing: Editing, settings: Settings, options: SampleOptions, model: Model, device: torch.device) -> Task:
    """The task that the options describe."""
    schedule = model.process.schedule
    timesteps = sampling.sampling_timesteps(options, schedule)
    if len(editing.images) > 2:
        raise UsageError(f"--from: takes one image, or two to interpolate between (got {len(editing.images)})")
    if editing.mask is not None and len(editing.images) != 1:
        raise UsageError("--mask: needs the image to inpaint; pass it with --from")
    if editing.at is not None and (not editing.images or editing.mask is not None):
        raise UsageError("--at: needs --from, and cannot be combined with --mask")
    for name in ("jump", "rounds"):
        given = getattr(editing, name)
        if given is not None and editing.mask is None:
            raise UsageError(f"--{name}: needs --mask")
        if given is not None and not 1 <= given <= MAX_REPAINT:
            raise UsageError(f"--{name}: must be from 1 to {MAX_REPAINT} (got {given})")
    if editing.images and model.shape[0] not in MODES:
        raise UsageError(f"--from: the model's images have {model.shape[0]} channels, which no picture has")
    channels, height, width = model.shape
    fit = replace(settings.pairs.fit, channels=channels, height=height, width=width)
    pictures = [read_image(path, settings.shard.reading) for path in editing.images]
    x_0 = [to_x_0(picture, fit).to(device) for picture in pictures]
    if editing.mask is not None:
        keep = read_mask(editing.mask, pictures[0], fit).to(device)
        jump, rounds = (REPAINT if given is None else given for given in (editing.jump, editing.rounds))
        return inpainting(schedule, repaint_path(timesteps, jump, rounds), x_0[0], keep)
    if not pictures:
        return Task(len(timesteps), lambda sampler, noise, _: sample(sampler, noise, timesteps))
    half = max(int((schedule.alpha_bar >= 0.5).sum()) - 1, 0)
    at = half if editing.at is None else editing.at
    if not 0 <= at < schedule.num_timesteps:
        raise UsageError(f"--at: must be a timestep from 0 to {schedule.num_timesteps - 1} (got {at})")
    rest = [at, *(t for t in timesteps if t < at)]

    def generate(sampler: Sampler, noise: Noise, numbers: Tensor) -> Tensor:
        """Variations of one image, or evenly spaced mixtures of two, which then share their noise."""
        mixed = mix(x_0[0], x_0[-1], double(numbers) / max(options.count - 1, 1))
        return image_to_image(sampler, schedule, noise, rest, mixed)

    return Task(len(rest), generate, one_noise=len(x_0) == 2)


def inpainting(schedule: Schedule, path: list[int], x_0: Tensor, keep: Tensor) -> Task:
    """Inpaint x_0 (1, C, H, W) where `keep` (1, 1, H, W) is 0."""

    def generate(sampler: Sampler, noise: Noise, numbers: Tensor) -> Tensor:
        for x in inpaint(sampler, schedule, noise, path, x_0.expand(len(numbers), -1, -1, -1), keep):
            last = x
        return last

    return Task(sum(s < t for t, s in pairwise(path)), generate)


def draw(
    model: Model, options: SampleOptions, seed: int, task: Task, device: torch.device, y: Tensor | None = None
) -> NDArray[np.uint8]:
    """Images uint8 (count, C, H, W), of the classes `y` int64 (count,), or unconditional.

    The noise of image i is a function of (seed, i): the image is the same for any count.
    """
    images = []
    batches = torch.arange(options.count, device=device).split(BATCH)
    with Progress("sample", task.steps * len(batches), "steps") as progress:
        for numbers in batches:
            sampler = model.sampler(options, None if y is None else y[numbers])
            noise = noise_for(seed, len(numbers), model.shape, device, int(numbers[0]))
            if task.one_noise:
                noise = repeated(noise_for(seed, 1, model.shape, device), len(numbers))
            x_0 = task.generate(ReportsProgress(sampler, progress), noise, numbers)
            images.append(to_uint8(x_0.cpu().numpy()))
    return np.concatenate(images)


def repeated(noise: Noise, count: int) -> Noise:
    """The noise of one image for `count` of them."""
    return lambda place: noise(place).expand(count, -1, -1, -1)
