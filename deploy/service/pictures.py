"""GET /images: noise from a seed, and a grid of images as PNG."""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from deploy.service.models import Model
from deploy.service.protocol import Invalid
from deploy.service.work import Feeds, Span, Work
from diffusion.export import golden

MAX_SIDE = 4096
"""Maximum pixels along the longer side of a grid."""
STEPS_NOISE = 2**63
"""Offset of the key for the noise of the steps, so that it never equals any image's initial noise."""


class ImageQuery(BaseModel):
    """The query of GET /images."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = Field(None, description="NAME, NAME@ALIAS or NAME/VERSION; the first model if there is none.")
    n: int = Field(16, ge=1, description="Number of images.", examples=[16])
    seed: int | None = Field(None, ge=0, lt=2**64, description="Random if there is none.", examples=[7])
    cls: str | None = Field(None, alias="class", description="Name or number of a class; turn: all in turn.")
    steps: int = Field(0, ge=0, description="Number of sampling steps; 0 for the model's own.")
    guidance: float | None = Field(None, description="Strength of classifier-free guidance, if the model has it.")
    scale: int = Field(4, ge=1, le=16, description="Pixels along the side of each pixel.")


def etag(query: ImageQuery, model: Model) -> str:
    """An ETag of everything that determines the image. Weak, since rounding may depend on the rest of the batch."""
    digest = hashlib.sha256(f"{model.version} {model.digest} {query!r}".encode()).hexdigest()
    return f'W/"{digest[:32]}"'


def work(query: ImageQuery, seed: int, model: Model, max_images: int) -> Work:
    """What a query asks of the model.

    Image i uses the noise with key (seed, i), and (seed, 2^63 + i) for the steps, so it does not depend on `n`.

    Raises:
        Invalid: the query exceeds the limits of the service or the model.
    """
    if query.n > max_images:
        raise Invalid(f"n: must be at most {max_images} (got {query.n})")
    columns, rows = layout(query.n)
    _, height, width = model.shape
    side = 1 + max(columns * (width * query.scale + 1), rows * (height * query.scale + 1))
    if side > MAX_SIDE:
        raise Invalid(f"n, scale: the grid would be {side} pixels wide or high, more than {MAX_SIDE}; lower n or scale")
    steps = query.steps or model.steps
    if not model.allows(steps):
        raise Invalid(f"steps: {model.allowed('steps')} (got {steps})")
    if query.guidance is not None and "guidance" not in model.inputs:
        lacks = "is distilled, with guidance built in" if model.classes else "has no classes"
        raise Invalid(f"guidance: the model {lacks}; omit it")
    guidance = model.guidance if query.guidance is None else query.guidance
    if "guidance" in model.inputs and (problem := model.problem("guidance", np.array([guidance]))):
        raise Invalid(f"guidance: {problem}")
    label = labels(query.cls, model.classes)

    def part(start: int, stop: int, span: Span) -> Feeds:
        given: Feeds = {"y": np.array([label(i) for i in range(start, stop)])}
        if not span.first:
            given["noise"] = np.stack([golden.normal(seed, i, model.shape) for i in range(start, stop)])
        if model.stochastic:
            shape, rows = (steps, *model.shape), slice(span.first, span.last)
            noise = (golden.normal(seed, STEPS_NOISE + i, shape)[rows] for i in range(start, stop))
            given["steps_noise"] = np.stack(list(noise), axis=1)
        return {name: given[name] for name in model.inputs if name in given}

    common: Feeds = {"guidance": np.array([guidance], np.float32)} if "guidance" in model.inputs else {}
    return Work(query.n, steps, model.evaluations(steps), common, part, model.pace)


def labels(cls: str | None, classes: list[str]) -> Callable[[int], int]:
    """The class of each image, by number: None for no class, a name or number, or `turn` for all in turn.

    Raises Invalid.
    """
    if cls == "turn" and classes and cls not in classes:
        return lambda image: image % len(classes)
    label = -1 if cls is None else class_index(cls, classes)
    return lambda _: label


def class_index(name: str, classes: list[str]) -> int:
    """Index of a class, given its name or the index itself; raises Invalid."""
    if not classes:
        raise Invalid("class: the model has no classes; omit it")
    if name in classes:
        return classes.index(name)
    if name in (numbers := [str(index) for index in range(len(classes))]):
        return numbers.index(name)
    known = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    raise Invalid(f"class: must be a name ({known}), a number below {len(classes)}, or turn (got {name[:50]})")


def layout(count: int) -> tuple[int, int]:
    """Columns and rows of a nearly square grid."""
    columns = math.ceil(math.sqrt(count))
    return columns, math.ceil(count / columns)


def png(images: NDArray[Any], scale: int) -> bytes:
    """Arrange uint8 images (B, H, W, C) in a grid with separating lines, enlarged by `scale`; returns a PNG.

    Of images with other than 1, 3 or 4 channels, the first three are shown, or the first of two.
    """
    if images.shape[3] not in (1, 3, 4):
        images = images[..., : 3 if images.shape[3] > 3 else 1]
    count, height, width, channels = images.shape
    columns, rows = layout(count)
    height, width = height * scale, width * scale
    mode = {1: "L", 3: "RGB", 4: "RGBA"}[channels]
    grid = Image.new(mode, (columns * (width + 1) + 1, rows * (height + 1) + 1), (128,) * channels)
    for index, image in enumerate(images):  # one by one, since NumPy stops other threads while it copies
        row, column = divmod(index, columns)
        cell = Image.fromarray(image[:, :, 0] if channels == 1 else image)
        grid.paste(
            cell.resize((width, height), Image.Resampling.NEAREST), (column * (width + 1) + 1, row * (height + 1) + 1)
        )
    buffer = io.BytesIO()
    grid.save(buffer, format="PNG")
    return buffer.getvalue()
