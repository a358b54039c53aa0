"""GET /images: noise from a seed, and a grid of images as PNG."""

from __future__ import annotations

import hashlib
import io
import math
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel, ConfigDict, Field

from deploy.service.batching import Work
from deploy.service.models import Feeds, Model
from deploy.service.protocol import Invalid
from diffusion.export import golden

MAX_SIDE = 4096
"""Maximum pixels along the longer side of a grid."""
STEPS_NOISE = 2**63
"""Offset of the key for the noise of the steps, so that it never equals any image's initial noise."""


class ImageQuery(BaseModel):
    """The query of GET /images."""

    model_config = ConfigDict(extra="forbid")

    model: str | None = None
    """NAME, NAME@ALIAS or NAME/VERSION."""
    n: int = Field(16, ge=1)
    seed: int | None = Field(None, ge=0, lt=2**64)
    cls: str | None = Field(None, alias="class")
    steps: int = Field(0, ge=0)
    guidance: float | None = None
    scale: int = Field(4, ge=1, le=16)


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
    label = -1 if query.cls is None else class_index(query.cls, model.classes)

    def part(start: int, stop: int) -> Feeds:
        def noise(first: int, shape: tuple[int, ...], axis: int) -> NDArray[np.float32]:
            return np.stack([golden.normal(seed, first + i, shape) for i in range(start, stop)], axis)

        given: Feeds = {"y": np.full(stop - start, label), "noise": noise(0, model.shape, 0)}
        if model.stochastic:
            given["steps_noise"] = noise(STEPS_NOISE, (steps, *model.shape), 1)
        return {name: given[name] for name in model.inputs if name in given}

    common: Feeds = {"steps": np.array([steps]), "guidance": np.array([guidance], np.float32)}
    return Work(query.n, steps, {name: common[name] for name in model.inputs if name in common}, part)


def class_index(name: str, classes: list[str]) -> int:
    """Index of a class, given its name or the index itself; raises Invalid."""
    if not classes:
        raise Invalid("class: the model has no classes; omit it")
    if name in classes:
        return classes.index(name)
    if name in (numbers := [str(index) for index in range(len(classes))]):
        return numbers.index(name)
    known = ", ".join(classes[:20]) + (", ..." if len(classes) > 20 else "")
    raise Invalid(f"class: must be a name ({known}) or a number below {len(classes)} (got {name[:50]})")


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
