"""Inference requests: validated, and their tensors read from JSON or binary data."""

from __future__ import annotations

import math
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import ValidationError

from deploy.service.models import Model
from deploy.service.protocol import JSON_LENGTH, InferenceRequest, Invalid, Message, RequestInput, describe
from deploy.service.work import Feeds, Work
from diffusion.errors import counted

VALUE_TYPES: dict[str, tuple[type[np.generic], set[type]]] = {
    "FP32": (np.float32, {int, float}),
    "INT64": (np.int64, {int}),
}
"""NumPy dtype and the Python types accepted in JSON, for each datatype that the graphs' inputs have."""
BYTES_PER_VALUE = 32
"""Of a number in JSON, with separators, if written in full; more than of any binary value."""
BESIDES = 4096
"""Limit of each kind of delimiter besides those of the values, and a sixteenth of that of other bytes."""
BINARY_SIZE = "binary_data_size"


class ParsedRequest(NamedTuple):
    """A validated request."""

    id: str | None
    work: Work
    outputs: dict[str, bool]
    """Whether the response has binary data, by output."""


def max_body(model: Model, max_images: int) -> int:
    """The bytes of the largest valid request."""
    return max_images * model.max_values * BYTES_PER_VALUE + 16 * BESIDES


def check_size(text: bytearray, model: Model, max_images: int) -> None:
    """Raise Invalid if JSON has more values or lists than any valid one: parsed, they take many times the memory."""
    values = max_images * model.max_values
    lists = 4 * values // model.shape[-1]  # a nested one for each row, image channel, image and step
    for delimiter, most in ((b",", values + lists), (b"[", lists), (b"{", 0), (b'"', 0)):
        if text.count(delimiter) > most + BESIDES:
            raise Invalid(f"the body has more `{delimiter.decode()}` than any valid request; check its data")


def parse(body: bytearray, json_length: str | None, model: Model, max_images: int) -> ParsedRequest:
    """Validate a request and fill in default inputs; raises Invalid.

    Args:
        body: JSON, and the binary data of those inputs that have none in JSON.
        json_length: the header Inference-Header-Content-Length, or None if all is JSON.
        model: the model that is asked.
        max_images: maximum number of images.
    """
    end = len(body) if json_length is None else _length(json_length, len(body))
    text = body if end == len(body) else body[:end]
    check_size(text, model, max_images)
    try:
        request = InferenceRequest.model_validate_json(text)
    except ValidationError as error:
        raise Invalid(describe(error.errors(include_url=False))) from None
    outputs = _outputs(request, model)
    given: Feeds = {}
    for each in request.inputs:
        if each.name not in model.inputs:
            raise Invalid(f"input {each.name}: no such input; the model has {', '.join(model.inputs)}")
        if each.name in given:
            raise Invalid(f"input {each.name}: given twice; remove one")
        _check_type(each, model, max_images)
        if BINARY_SIZE in each.parameters:
            if json_length is None:
                line = f"parameters.{BINARY_SIZE} needs the header {JSON_LENGTH}, the bytes of JSON in the body"
                raise Invalid(f"input {each.name}: {line}")
            array = _from_binary(each, body, end)
            end += array.nbytes
        else:
            array = _from_json(each, model)
        if problem := model.problem(each.name, array):
            raise Invalid(f"input {each.name}: {problem}")
        given[each.name] = array
    if end < len(body):
        raise Invalid(f"the body has {counted(len(body) - end, 'byte')} more than its JSON and the inputs' binary data")
    feeds = with_defaults(given, model)
    steps = len(feeds["steps_noise"]) if model.stochastic else int(feeds.pop("steps")[0]) or model.steps
    return ParsedRequest(request.id, Work.of(feeds, steps, model.evaluations(steps), model.pace), outputs)


def with_defaults(given: Feeds, model: Model) -> Feeds:
    """All inputs, with defaults for omitted ones; raises Invalid if one is missing or sizes do not match."""
    for name in ("noise", "steps_noise"):
        if name in model.inputs and name not in given:
            datatype, shape = model.inputs[name]
            raise Invalid(f"input {name}: missing; send standard normal noise, {datatype} of shape {list(shape)}")
    images = len(given["noise"])
    defaults: Feeds = {
        "steps": np.array([0]),
        "guidance": np.array([model.guidance], np.float32),
        "y": np.full(images, -1),
    }
    feeds = {name: given[name] if name in given else defaults[name] for name in model.inputs}
    for name, axis in (("y", 0), ("steps_noise", 1)):
        if name in feeds and (found := feeds[name].shape[axis]) != images:
            raise Invalid(f"input {name}: must have as many images as noise, {images} (got {found})")
    if "steps_noise" in feeds and not model.allows(steps := len(feeds["steps_noise"])):
        raise Invalid(f"input steps_noise: must have {model.steps_allowed} steps (got {steps})")
    return feeds


def _length(text: str, size: int) -> int:
    """The length of the JSON in a body of `size` bytes."""
    if text.isascii() and text.isdecimal() and len(text) < 20 and 1 <= (length := int(text)) <= size:
        return length
    line = f"must be the number of bytes of JSON that the body begins with, 1 to {size}"
    raise Invalid(f"{JSON_LENGTH}: {line} (got {text[:50]})")


def _outputs(request: InferenceRequest, model: Model) -> dict[str, bool]:
    default = _flag(request, "binary_data_output", "", False)
    outputs: dict[str, bool] = {}
    for output in request.outputs:
        if output.name not in model.outputs:
            raise Invalid(f"output {output.name}: no such output; the model has {', '.join(model.outputs)}")
        if output.name in outputs:  # else a short request could ask for a response of any length
            raise Invalid("outputs: an output is listed twice; remove one")
        outputs[output.name] = _flag(output, "binary_data", f"output {output.name}: ", default)
    return outputs or dict.fromkeys(model.outputs, default)


def _flag(message: Message, name: str, where: str, default: bool) -> bool:
    value = message.parameters.get(name, default)
    if not isinstance(value, bool):
        raise Invalid(f"{where}parameters.{name} must be true or false (got {str(value)[:50]})")
    return value


def _check_type(given: RequestInput, model: Model, max_images: int) -> None:
    """Raise Invalid unless datatype and shape are as the model requires; then the shape limits the size."""
    where, tensor = f"input {given.name}", model.inputs[given.name]
    if given.datatype != tensor.datatype:
        raise Invalid(f"{where}: datatype must be {tensor.datatype} (got {given.datatype[:50]})")
    fits = len(given.shape) == len(tensor.shape) and all(
        size == found if size != -1 else found >= 1 for size, found in zip(tensor.shape, given.shape, strict=True)
    )
    if not fits:
        expected = f"{list(tensor.shape)}, where -1 is any size from 1"
        raise Invalid(f"{where}: shape must be {expected} (got {str(given.shape)[:50]})")
    if given.name == "noise" and given.shape[0] > max_images:
        raise Invalid(
            f"{where}: at most {counted(max_images, 'image')} per request (got {given.shape[0]}); send several requests"
        )


def _from_binary(given: RequestInput, body: bytearray, start: int) -> NDArray[Any]:
    """Read an input of which the binary data begins at `start`; raises Invalid."""
    where, stated, count = f"input {given.name}", given.parameters[BINARY_SIZE], math.prod(given.shape)
    if given.data is not None:
        raise Invalid(f"{where}: has both data and parameters.{BINARY_SIZE}; remove one")
    dtype = np.dtype(VALUE_TYPES[given.datatype][0])
    if type(stated) is not int or stated != count * dtype.itemsize:
        needed = f"shape {given.shape} of {given.datatype} needs {counted(count * dtype.itemsize, 'byte')}"
        raise Invalid(f"{where}: {needed}, which parameters.{BINARY_SIZE} must be (got {str(stated)[:50]})")
    if (left := len(body) - start) < stated:
        raise Invalid(f"{where}: needs {counted(stated, 'byte')} of binary data, but the body has only {left} more")
    return np.frombuffer(body, dtype.newbyteorder("<"), count, start).astype(dtype).reshape(given.shape)


def _from_json(given: RequestInput, model: Model) -> NDArray[Any]:
    """Convert an input's data to an array; raises Invalid unless number and types of the values are right."""
    where, tensor = f"input {given.name}", model.inputs[given.name]
    if given.data is None:
        raise Invalid(f"{where}: has no data; send `data`, or binary data and its size as parameters.{BINARY_SIZE}")
    dtype, types = VALUE_TYPES[tensor.datatype]
    values = _flat(given.data, given.shape, where)
    if len(values) != math.prod(given.shape):
        raise Invalid(
            f"{where}: shape {given.shape} needs {counted(math.prod(given.shape), 'value')} (got {len(values)})"
        )
    if not set(map(type, values)) <= types:
        raise Invalid(f"{where}: data must contain only {'numbers' if float in types else 'integers'}")
    try:
        with np.errstate(over="ignore"):  # infinity is outside every range, and rejected later
            return np.array(values, np.float64 if float in types else dtype).astype(dtype).reshape(given.shape)
    except OverflowError:
        raise Invalid(f"{where}: {model.allowed(given.name)} (got more than {tensor.datatype} can hold)") from None


def _flat(data: list[Any], shape: list[int], where: str) -> list[Any]:
    """Flatten a list that is flat or nested according to the shape."""
    if not data or type(data[0]) is not list:
        return data
    rows = [data]
    for size in shape:
        if not all(type(row) is list and len(row) == size for row in rows):
            raise Invalid(f"{where}: data is not nested according to shape {shape}; a flat list works as well")
        rows = list(chain.from_iterable(rows))
    return rows
