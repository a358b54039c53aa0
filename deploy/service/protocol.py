"""Messages of the Open Inference Protocol, version 2: what a request may say, and tensors in and out.

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

from deploy.service.models import Feeds, Model, Tensor

VALUE_TYPES: dict[str, tuple[type[np.generic], set[type]]] = {
    "FP32": (np.float32, {int, float}),
    "INT64": (np.int64, {int}),
}
"""numpy's type, and the types that values may have in JSON; graphs have no other inputs."""


class Invalid(Exception):
    """A request that cannot be answered; the message is one line: what is wrong, and what to do."""


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    parameters: dict[str, Any] = {}
    """Of extensions to the protocol, of which this service knows none."""


class RequestInput(Message):
    name: str
    shape: Annotated[list[int], FailFast()]  # an error for each of a million items would fill the memory
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
    """A request that was found good."""

    id: str | None
    feeds: Feeds
    outputs: list[str]


def parse(body: bytes, model: Model, max_images: int) -> ParsedRequest:
    """The inputs for a model, those that were left out as well; raises Invalid."""
    try:
        request = InferenceRequest.model_validate_json(body)
    except ValidationError as error:
        raise Invalid(describe(error.errors(include_url=False))) from None
    outputs = [output.name for output in request.outputs] or list(model.outputs)
    for name in outputs:
        if name not in model.outputs:
            raise Invalid(f"output {name}: the model has none of this name; it has {', '.join(model.outputs)}")
    if len(set(outputs)) < len(outputs):  # a short request for an answer of any length
        raise Invalid("outputs: one is asked for twice; leave one out")
    given: Feeds = {}
    for each in request.inputs:
        if each.name not in model.inputs:
            raise Invalid(f"input {each.name}: the model has none of this name; it has {', '.join(model.inputs)}")
        if each.name in given:
            raise Invalid(f"input {each.name}: given twice; leave one out")
        given[each.name] = _array(each, model, max_images)
    return ParsedRequest(request.id, with_defaults(given, model), outputs)


def with_defaults(given: Feeds, model: Model) -> Feeds:
    """All inputs, with defaults for those left out; raises Invalid for missing and impossible ones."""
    for name in ("noise", "steps_noise"):
        if name in model.inputs and name not in given:
            datatype, shape = model.inputs[name]
            raise Invalid(f"input {name}: missing; give {datatype} of shape {list(shape)}, standard normal noise")
    images = len(given["noise"])
    defaults: Feeds = {
        "steps": np.array([0]),
        "guidance": np.array([model.guidance], np.float32),
        "y": np.full(images, -1),
    }
    feeds = {name: given[name] if name in given else defaults[name] for name in model.inputs}
    for name, axis in (("y", 0), ("steps_noise", 1)):
        if name in feeds and (found := feeds[name].shape[axis]) != images:
            raise Invalid(f"input {name}: for {found} images, but noise is for {images}; give as many")
    if "steps_noise" in feeds and not model.allows(steps := len(feeds["steps_noise"])):
        raise Invalid(f"input steps_noise: must be for {model.steps_allowed} steps (got {steps})")
    return feeds


def _array(given: RequestInput, model: Model, max_images: int) -> NDArray[Any]:
    """The values of an input, of its shape and in its range."""
    where, tensor = f"input {given.name}", model.inputs[given.name]
    if given.datatype != tensor.datatype:
        raise Invalid(f"{where}: datatype must be {tensor.datatype} (got {given.datatype})")
    fits = len(given.shape) == len(tensor.shape) and all(
        size == found if size != -1 else found >= 1 for size, found in zip(tensor.shape, given.shape, strict=True)
    )
    if not fits:
        raise Invalid(f"{where}: shape must be {list(tensor.shape)}, -1 being any size from 1 (got {given.shape})")
    if given.name == "noise" and given.shape[0] > max_images:
        raise Invalid(f"{where}: {given.shape[0]} images, and at most {max_images} may be in a request; send several")
    dtype, types = VALUE_TYPES[tensor.datatype]
    values = _flat(given.data, given.shape, where)
    if len(values) != math.prod(given.shape):
        raise Invalid(f"{where}: shape {given.shape} takes {math.prod(given.shape)} values (got {len(values)})")
    if not set(map(type, values)) <= types:
        raise Invalid(f"{where}: data must be {'numbers' if float in types else 'whole numbers'} alone")
    try:
        with np.errstate(over="ignore"):  # infinity is outside of every range
            array = np.array(values, np.float64 if float in types else dtype).astype(dtype).reshape(given.shape)
    except OverflowError:
        raise Invalid(f"{where}: {model.allowed(given.name)} (got more than {tensor.datatype} can hold)") from None
    if problem := model.problem(given.name, array):
        raise Invalid(f"{where}: {problem}")
    return array


def _flat(data: list[Any], shape: list[int], where: str) -> list[Any]:
    """The values of a list that is flat, or nested as the shape says."""
    if not data or type(data[0]) is not list:
        return data
    rows = [data]
    for size in shape:
        if not all(type(row) is list and len(row) == size for row in rows):
            raise Invalid(f"{where}: data is not nested as shape {shape} says; a flat list will do as well")
        rows = list(chain.from_iterable(rows))
    return rows


def answer(asked: ParsedRequest, name: str, model: Model, results: Feeds) -> bytes:
    """The response to a request, as JSON."""
    return (
        InferenceResponse(
            model_name=name,
            model_version=model.version,
            id=asked.id,
            outputs=[
                ResponseOutput(
                    name=output,
                    datatype=model.outputs[output].datatype,
                    shape=results[output].shape,
                    data=results[output].reshape(-1).tolist(),
                )
                for output in asked.outputs
            ],
        )
        .model_dump_json(exclude_none=True)
        .encode()
    )


class ResponseOutput(BaseModel):
    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Any


class InferenceResponse(BaseModel):
    model_name: str
    model_version: str
    id: str | None
    outputs: list[ResponseOutput]


def metadata(name: str, model: Model) -> dict[str, Any]:
    """What the protocol tells of a model."""

    def described(tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
        return [{"name": key, **tensor._asdict()} for key, tensor in tensors.items()]

    return {
        "name": name,
        "versions": [model.version],
        "platform": "onnxruntime_onnx",
        "inputs": described(model.inputs),
        "outputs": described(model.outputs),
    }


def describe(errors: Sequence[Any]) -> str:
    """pydantic's errors in one line, of the first: field, what is wrong, the value found."""
    first = errors[0]
    field = ".".join(str(part) for part in first["loc"] if part not in ("query", "body"))
    if first["type"] == "json_invalid":
        return f"the body is not JSON: {first['ctx']['error']}"
    if first["type"] == "extra_forbidden":
        return f"{field}: there is no such thing here; leave it out"
    got = "" if isinstance(first["input"], dict | list | bytes) else f" (got {str(first['input'])[:50]})"
    return f"{field or 'the body'}: {first['msg'][0].lower()}{first['msg'][1:]}{got}"
