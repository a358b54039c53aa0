"""`ddpm sample`: pictures from a model: from noise alone, like a given one, between two, or one with a part anew."""

import argparse
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from torch import Tensor

from diffusion.errors import UserError, describe
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
from diffusion.storage.files import write_atomic
from flows.changes import lay_over
from flows.commands.pictures import read_image, read_mask, to_x_0, writer
from flows.params import advice, read
from flows.paths import Paths
from flows.yaml_files import integer, number, scalar

BATCH = 64
"""Pictures that are made at once: memory does not grow with their number."""
OF_SAMPLERS = {
    name: field
    for kind in SAMPLER_OPTIONS.values()
    for name, field in kind.model_fields.items()
    if name not in {"kind", "seed", "device", *SampleOptions.model_fields}  # these are set in params.yaml alone
}
"""The fields that single samplers have."""
REPAINT = 10
"""Jump and rounds of RePaint unless given; Lugmayr et al. 2022, section 5."""


class Settings(Section):
    """What of params.yaml matters here."""

    seed: NonNegative = 0
    device: Device = "auto"
    sample: SampleOptions = SampleOptions()


@dataclass(frozen=True)
class Way:
    """A way to pictures."""

    steps: int
    """How often it asks the sampler for a step."""
    make: Callable[[Sampler, Noise, Tensor], Tensor]
    """(sampler, noise, numbers of the pictures int64 (B,)) to pictures (B, C, H, W) in [-1, 1]."""
    one_noise: bool = False
    """Whether all pictures are made with the noise of the first."""


@dataclass(frozen=True)
class Counted:
    """A sampler whose steps are counted."""

    sampler: Sampler
    progress: Progress

    def step(self, x_t: Tensor, t: Tensor, s: Tensor, z: Draw, previous: Previous | None) -> tuple[Tensor, Tensor]:
        made = self.sampler.step(x_t, t, s, z, previous)
        self.progress.advance(1)
        return made


def run(arguments: argparse.Namespace, paths: Paths) -> None:
    """Make and write the pictures that the command line asks for; raises UserError for what it has wrong."""
    settings = read_settings(arguments, paths)
    options, write = settings.sample, writer(arguments.out)
    if arguments.filmstrip is not None and (arguments.images or arguments.classes):
        raise UserError("--filmstrip: shows pictures from noise, of the classes in turn; without --from and --class")
    if arguments.filmstrip is not None and arguments.filmstrip.suffix.lower() != ".png":
        raise UserError(f"--filmstrip: {arguments.filmstrip} is no .png file")
    device = networks.device(settings.device)
    model = load_model(arguments.model or paths.model, device)
    if arguments.guidance not in (None, 1) and not model.num_classes:
        raise UserError("--guidance: the model knows no classes (it was trained with network.classes: false)")
    # A given picture has a class of its own, which nobody told.
    y = None if arguments.images else classes_in_turn(model, options.count, device)
    if arguments.classes:
        numbers = torch.tensor(class_numbers(arguments.classes, model), device=device)
        y = numbers[torch.arange(options.count, device=device) % len(numbers)]
    pictures = draw(model, options, settings.seed, way(arguments, options, model, device), device, y)
    write(pictures, None if y is None else y.cpu().numpy())
    say(f"sample: wrote {arguments.out}")
    if arguments.filmstrip is not None:
        from diffusion.evaluation import plots  # slow to import

        few = frames(model, options, settings.seed, device, images=min(options.count, 4))
        write_atomic(arguments.filmstrip, plots.filmstrip(few))
        say(f"sample: wrote {arguments.filmstrip}")


def add_options(samples: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    samples.add_argument("--out", default="samples.png", help="a .png file (a grid), an .npz file or a folder (out/)")
    samples.add_argument("--model", type=Path, metavar="DIR", help="a trained model; without it, models/ddpm")
    samples.add_argument(
        "--class",
        dest="classes",
        action="extend",
        type=lambda text: [name.strip() for name in text.split(",")],
        metavar="CLASS",
        help="class by name or number, or several (3,5): their pictures in turn; without it, all classes in turn",
    )
    samples.add_argument(
        "--filmstrip", type=Path, metavar="FILE.png", help="also show how the first pictures emerge from noise"
    )
    given = samples.add_argument_group("from given pictures, in place of noise alone (of no class without --class)")
    given.add_argument(
        "--from",
        dest="images",
        type=Path,
        nargs="+",
        default=[],
        metavar="IMAGE",
        help="pictures like this image, or from one image to another",
    )
    given.add_argument(
        "--at",
        type=integer,
        metavar="T",
        help="timestep up to which noise is added (default: where half of the image is left)",
    )
    given.add_argument("--mask", type=Path, metavar="IMAGE", help="make the image anew where this one is white")
    given.add_argument("--jump", type=integer, help="with --mask: steps down before going up again (default 10)")
    given.add_argument("--rounds", type=integer, help="with --mask: how often; takes so many times longer (default 10)")
    settings = samples.add_argument_group("settings, in place of those in params.yaml")
    settings.add_argument(
        "--seed", type=integer, help="seed of the noise: picture i of a seed is the same in any number"
    )
    settings.add_argument("--device", help="auto, cpu, cuda, cuda:N, mps, xpu or xpu:N")
    for name, field in (SampleOptions.model_fields | OF_SAMPLERS).items():
        # A choice has names; any other field its own type.
        choices = next((mark.names for mark in field.metadata if isinstance(mark, OneOf)), None)
        kind = (
            str if choices else integer if field.annotation is int else number if field.annotation is float else scalar
        )
        settings.add_argument(f"--{name}", type=kind, choices=choices, help=field.description)


def read_settings(arguments: argparse.Namespace, paths: Paths) -> Settings:
    """params.yaml, if there is one, with the options laid over it."""
    given = {name: value for name, value in vars(arguments).items() if value is not None}
    sample = {name: given[name] for name in SampleOptions.model_fields if name in given}
    document: dict[str, Any] = {"device": "auto"}
    if paths.params.exists():
        document |= {name: value for name, value in read(paths.params).items() if name in Settings.model_fields}
    elif missing := [f"--{name}" for name in (*SampleOptions.model_fields, "seed") if name not in given]:
        raise UserError(f"{paths.params}: no such file here; without it, these must be given: {', '.join(missing)}")
    if of_sampler := {name: given[name] for name in OF_SAMPLERS if name in given}:
        sample["sampler"] = ({"kind": sample["sampler"]} if "sampler" in sample else {}) | of_sampler
    changes = {name: given[name] for name in ("seed", "device") if name in given} | {"sample": sample}
    try:
        return Settings.model_validate(lay_over(document, changes), context=COMPLETE)
    except ValidationError as error:
        raise UserError(f"{paths.params} with the options given: {describe(error)}{advice(error)}") from None


def class_numbers(names: Sequence[str], model: Model) -> list[int]:
    """Numbers of the classes that are given by name or number."""
    known = model.config.classes
    if not model.num_classes:
        raise UserError("--class: the model knows no classes (it was trained with network.classes: false)")
    numbers = [known.index(name) if name in known else int(name) if name.isdecimal() else -1 for name in names]
    for name, found in zip(names, numbers, strict=True):
        if not 0 <= found < len(known):
            raise UserError(
                f"--class: {name!r} is no class of the model; there are {', '.join(known)}, "
                f"and their numbers from 0 to {len(known) - 1}"
            )
    return numbers


def way(arguments: argparse.Namespace, options: SampleOptions, model: Model, device: torch.device) -> Way:
    """The way to pictures that the command line asks for."""
    schedule = model.process.schedule
    timesteps = sampling.sampling_timesteps(options, schedule)
    if len(arguments.images) > 2:
        raise UserError(f"--from: one image, or two to go from one to the other (got {len(arguments.images)})")
    if arguments.mask is not None and len(arguments.images) != 1:
        raise UserError("--mask: needs the image whose part is to be made anew; give one by --from")
    if arguments.at is not None and (not arguments.images or arguments.mask is not None):
        raise UserError("--at: is for images given by --from, without --mask")
    for name in ("jump", "rounds"):
        given = getattr(arguments, name)
        if given is not None and arguments.mask is None:
            raise UserError(f"--{name}: is for --mask")
        if given is not None and given < 1:
            raise UserError(f"--{name}: must be at least 1 (got {given})")
    pictures = [read_image(path) for path in arguments.images]
    x_0 = [to_x_0(picture, model.shape).to(device) for picture in pictures]
    if arguments.mask is not None:
        keep = read_mask(arguments.mask, pictures[0], model.shape).to(device)
        jump, rounds = (REPAINT if given is None else given for given in (arguments.jump, arguments.rounds))
        return made_anew(schedule, repaint_path(timesteps, jump, rounds), x_0[0], keep)
    if not pictures:
        return Way(len(timesteps), lambda sampler, noise, _: sample(sampler, noise, timesteps))
    half = max(int((schedule.alpha_bar >= 0.5).sum()) - 1, 0)
    at = half if arguments.at is None else arguments.at
    if not 0 <= at < schedule.num_timesteps:
        raise UserError(f"--at: the model's timesteps go from 0 to {schedule.num_timesteps - 1} (got {at})")
    rest = [at, *(t for t in timesteps if t < at)]

    def make(sampler: Sampler, noise: Noise, numbers: Tensor) -> Tensor:
        """Pictures like the one given; or evenly from one to the other, of one noise: only the mixture changes."""
        mixed = mix(x_0[0], x_0[-1], double(numbers) / max(options.count - 1, 1))
        return image_to_image(sampler, schedule, noise, rest, mixed)

    return Way(len(rest), make, one_noise=len(x_0) == 2)


def made_anew(schedule: Schedule, path: list[int], x_0: Tensor, keep: Tensor) -> Way:
    """x_0 (1, C, H, W) with all that `keep` (1, 1, H, W) leaves out made anew."""

    def make(sampler: Sampler, noise: Noise, numbers: Tensor) -> Tensor:
        for x in inpaint(sampler, schedule, noise, path, x_0.expand(len(numbers), -1, -1, -1), keep):
            last = x
        return last

    return Way(sum(s < t for t, s in pairwise(path)), make)


def draw(
    model: Model, options: SampleOptions, seed: int, way: Way, device: torch.device, y: Tensor | None = None
) -> NDArray[np.uint8]:
    """Pictures uint8 (count, C, H, W), of the classes `y` int64 (count,), or of any.

    The noise of picture i is a function of (seed, i): it is the same picture among any number of them.
    """
    pictures = []
    batches = torch.arange(options.count, device=device).split(BATCH)
    with Progress("sample", way.steps * len(batches), "steps") as progress:
        for numbers in batches:
            sampler = model.sampler(options, None if y is None else y[numbers])
            noise = noise_for(seed, len(numbers), model.shape, device, int(numbers[0]))
            if way.one_noise:
                noise = repeated(noise_for(seed, 1, model.shape, device), len(numbers))
            x_0 = way.make(Counted(sampler, progress), noise, numbers)
            pictures.append(to_uint8(x_0.cpu().numpy()))
    return np.concatenate(pictures)


def repeated(noise: Noise, count: int) -> Noise:
    """The noise of one picture for `count` of them."""
    return lambda place: noise(place).expand(count, -1, -1, -1)
