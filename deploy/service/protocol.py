"""Messages of the Open Inference Protocol, version 2, with its extension for binary tensors.

https://github.com/kserve/open-inference-protocol/blob/main/specification/protocol/inference_rest.md
https://kserve.github.io/website/docs/concepts/architecture/data-plane/v2-protocol/binary-tensor-data-extension
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, FailFast, Field

from deploy.service.models import Model, Tensor

EXTENSIONS = ["binary_tensor_data"]
"""What this service implements besides the protocol itself."""
JSON_LENGTH = "Inference-Header-Content-Length"
"""The header with the number of bytes of JSON in a body, which binary data follows."""


class Invalid(Exception):
    """An invalid request; the message says in one line what is wrong and what to do."""


class Message(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True)

    parameters: dict[str, Any] = Field({}, description="Those that are not mentioned are ignored.")


class RequestInput(Message):
    name: str = Field(max_length=100)
    shape: Annotated[list[int], FailFast()]  # otherwise a million bad items would give a million errors
    datatype: str
    data: list[Any] | None = Field(
        None,
        description="The values in C order, flat or nested; without them, `parameters.binary_data_size` is the number "
        f"of bytes that the tensor has after the JSON: little-endian, in the order of the inputs. `{JSON_LENGTH}` is "
        "the length of the JSON.",
    )


class RequestOutput(Message):
    name: str = Field(max_length=100)
    parameters: dict[str, Any] = Field({}, description="`binary_data`: whether to send it as binary data.")


class InferenceRequest(Message):
    id: str | None = None
    inputs: Annotated[list[RequestInput], FailFast()]
    outputs: Annotated[list[RequestOutput], FailFast()] = Field([], description="All, if there are none.")
    parameters: dict[str, Any] = Field({}, description="`binary_data_output`: the default of `binary_data`, if true.")


class TensorFacts(BaseModel):
    name: str
    datatype: str
    shape: list[int] = Field(description="-1 stands for any size.")


class ModelFacts(BaseModel):
    name: str
    versions: list[str]
    platform: str
    inputs: list[TensorFacts]
    outputs: list[TensorFacts]
    parameters: dict[str, Any] = Field(description="Classes, defaults, limits, and what runs the model.")


class IndexedModel(BaseModel):
    name: str
    version: str
    alias: str | None
    state: str


class ResponseOutput(BaseModel):
    name: str
    datatype: str
    shape: list[int]
    parameters: dict[str, int] = Field({}, description="`binary_data_size`: its bytes after the JSON.")
    data: list[float] | None = Field(None, description="The values in C order, unless they are binary.")


class InferenceResponse(BaseModel):
    model_name: str
    model_version: str
    id: str | None = None
    outputs: list[ResponseOutput]


class ServerFacts(BaseModel):
    name: str
    version: str
    extensions: list[str]


class Live(BaseModel):
    live: bool


class Ready(Live):
    ready: bool


class ModelReady(BaseModel):
    name: str
    ready: bool


def metadata(model: Model, versions: list[str], max_images: int) -> dict[str, Any]:
    """Build the model metadata of the protocol, with `parameters` for what it does not define."""

    def described(tensors: dict[str, Tensor]) -> list[dict[str, Any]]:
        return [{"name": key, **tensor._asdict()} for key, tensor in tensors.items()]

    return {
        "name": model.name,
        "versions": versions,
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
