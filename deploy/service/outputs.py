"""Inference responses: the outputs as JSON or binary data."""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic_core import to_json

from deploy.service.compression import compressed
from deploy.service.inputs import BINARY_SIZE, ParsedRequest
from deploy.service.models import Model
from deploy.service.protocol import JSON_LENGTH
from deploy.service.work import Feeds

PIECE = 2**13
"""Number of values that are written as JSON at once, since other threads wait meanwhile."""


class Answer(NamedTuple):
    body: bytes
    media_type: str
    headers: dict[str, str]


def answer(asked: ParsedRequest, name: str, model: Model, results: Feeds, encoding: str | None) -> Answer:
    """Build the response to a request, compressed with an encoding if there is one."""
    facts = {"model_name": name, "model_version": model.version} | ({} if asked.id is None else {"id": asked.id})
    outputs, blobs = list[bytes](), list[memoryview]()
    for output, binary in asked.outputs.items():
        value = results[output]
        entry: dict[str, Any] = {"name": output, "datatype": model.outputs[output].datatype, "shape": value.shape}
        if binary:
            little = np.ascontiguousarray(value, value.dtype.newbyteorder("<"))
            blobs.append(little.data.cast("B"))
            outputs.append(to_json({**entry, "parameters": {BINARY_SIZE: little.nbytes}}))
        else:
            outputs.append(to_json(entry)[:-1] + b',"data":' + _list(value.reshape(-1)) + b"}")
    text = to_json(facts)[:-1] + b',"outputs":[' + b",".join(outputs) + b"]}"
    headers = {JSON_LENGTH: str(len(text))} if blobs else {}
    body, more = compressed(b"".join([text, *blobs]) if blobs else text, encoding)
    return Answer(body, "application/octet-stream" if blobs else "application/json", headers | more)


def _list(values: NDArray[Any]) -> bytes:
    pieces = (to_json(values[start : start + PIECE].tolist())[1:-1] for start in range(0, len(values), PIECE))
    return b"[" + b",".join(pieces) + b"]"
