"""Messages of the Open Inference Protocol, version 2: request validation, and tensors to and from JSON.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import chain
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, FailFast, ValidationError
from pydantic_core import to_json

from deploy.service.models import Model, Tensor
from deploy.service.work import Feeds, Work
from diffusion.errors import counted

VALUE_TYPES: dict[str, tuple[type[np.generic], set[type]]] = {
    "FP32": (np.float32, {int, float}),
    "INT64": (np.int64, {int}),
}
"""NumPy dtype and the Python types accepted in JSON, for each datatype that the graphs' inputs have."""


BYTES_PER_VALUE = 32
"""Of a number in JSON, with separators, if written in full."""
BESIDES = 4096
"""Limit of each kind of delimiter besides those of the values, and a sixteenth of that of other bytes."""
PIECE = 2**13
"""Number of values that are written as JSON at once, since other threads wait meanwhile."""


class Invalid(Exception):
    """An invalid request; the message says in one line what is wrong and what to do."""


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    parameters: dict[str, Any] = {}
    """For protocol extensions; this service has none and ignores them."""


class RequestInput(Message):
    name: str
    shape: Annotated[list[int], FailFast()]  # otherwise a million bad items would give a million errors
    datatype: str
    data: list[Any]
    """The values in C order, flat or nested."""


class RequestOutput(Message):
    name: str


class InferenceRequest(Message):
    id: str | None = None
    inputs: Annotated[list[RequestInput], FailFast()]
    outputs: Annotated[list[RequestOutput], FailFast()] = []


class ParsedRequest(NamedTuple):
    """A validated request."""

    id: str | None
    work: Work
    outputs: list[str]


def max_body(model: Model, max_images: int) -> int:
    """The bytes of the largest valid request."""
    return max_images * model.max_values * BYTES_PER_VALUE + 16 * BESIDES


def check_size(body: bytearray, model: Model, max_images: int) -> None:
    """Raise Invalid if a body has more values or lists than any valid one: parsed, they take many times the memory."""
    values = max_images * model.max_values
    lists = 4 * values // model.shape[-1]  # a nested one for each row, image channel, image and step
    for delimiter, most in ((b",", values + lists), (b"[", lists), (b"{", 0), (b'"', 0)):
        if body.count(delimiter) > most + BESIDES:
            raise Invalid(f"the body has more `{delimiter.decode()}` than any valid request; check its data")


def parse(body: bytearray, model: Model, max_images: int) -> ParsedRequest:
    """Validate a request and fill in default inputs; raises Invalid."""
    check_size(body, model, max_images)
    try:
        request = InferenceRequest.model_validate_json(body)
    except ValidationError as error:
        raise Invalid(describe(error.errors(include_url=False))) from None
    outputs = [output.name for output in request.outputs] or list(model.outputs)
    for name in outputs:
        if name not in model.outputs:
            raise Invalid(f"output {name}: no such output; the model has {', '.join(model.outputs)}")
    if len(set(outputs)) < len(outputs):  # else a short request could ask for a response of any length
        raise Invalid("outputs: an output is listed twice; remove one")
    given: Feeds = {}
    for each in request.inputs:
        if each.name not in model.inputs:
            raise Invalid(f"input {each.name}: no such input; the model has {', '.join(model.inputs)}")
        if each.name in given:
            raise Invalid(f"input {each.name}: given twice; remove one")
        given[each.name] = _array(each, model, max_images)
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


def _array(given: RequestInput, model: Model, max_images: int) -> NDArray[Any]:
    """Convert an input to an array; raises Invalid unless type, shape and values are as the model requires."""
    where, tensor = f"input {given.name}", model.inputs[given.name]
    if given.datatype != tensor.datatype:
        raise Invalid(f"{where}: datatype must be {tensor.datatype} (got {given.datatype})")
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
    dtype, types = VALUE_TYPES[tensor.datatype]
    values = _flat(given.data, given.shape, where)
    if len(values) != math.prod(given.shape):
        raise Invalid(
            f"{where}: shape {given.shape} needs {counted(math.prod(given.shape), 'value')} (got {len(values)})"
        )
    if not set(map(type, values)) <= types:
        raise Invalid(f"{where}: data must contain only {'numbers' if float in types else 'integers'}")
    try:
        with np.errstate(over="ignore"):  # infinity is outside every range, and rejected below
            array = np.array(values, np.float64 if float in types else dtype).astype(dtype).reshape(given.shape)
    except OverflowError:
        raise Invalid(f"{where}: {model.allowed(given.name)} (got more than {tensor.datatype} can hold)") from None
    if problem := model.problem(given.name, array):
        raise Invalid(f"{where}: {problem}")
    return array


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


def answer(asked: ParsedRequest, name: str, model: Model, results: Feeds) -> bytes:
    """Build the response to a request, as JSON."""
    head = {"model_name": name, "model_version": model.version} | ({} if asked.id is None else {"id": asked.id})
    outputs = []
    for output in asked.outputs:
        value = results[output]
        facts = {"name": output, "datatype": model.outputs[output].datatype, "shape": value.shape}
        outputs.append(to_json(facts)[:-1] + b',"data":' + _list(value.reshape(-1)) + b"}")
    return to_json(head)[:-1] + b',"outputs":[' + b",".join(outputs) + b"]}"


def _list(values: NDArray[Any]) -> bytes:
    pieces = (to_json(values[start : start + PIECE].tolist())[1:-1] for start in range(0, len(values), PIECE))
    return b"[" + b",".join(pieces) + b"]"


def metadata(name: str, model: Model, max_images: int) -> dict[str, Any]:
    """Build the model metadata of the protocol, with `parameters` for what it does not define."""

    def described(tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
        return [{"name": key, **tensor._asdict()} for key, tensor in tensors.items()]

    return {
        "name": name,
        "versions": [model.version],
        "platform": "onnxruntime_onnx",
        "inputs": described(model.inputs),
        "outputs": described(model.outputs),
        "parameters": {**model.parameters, "max_images": max_images},
    }


def describe(errors: Sequence[Any]) -> str:
    """The first of pydantic's errors in one line: field, problem and value."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"] if part not in ("query", "body"))
    if first["type"] == "json_invalid":
        return f"the body is not valid JSON: {first['ctx']['error']}"
    if first["type"] == "extra_forbidden":
        return f"{field}: unknown field; remove it"
    got = "" if isinstance(first["input"], dict | list | bytes) else f" (got {str(first['input'])[:50]})"
    return f"{field or 'the body'}: {first['msg'][0].lower()}{first['msg'][1:]}{got}"
