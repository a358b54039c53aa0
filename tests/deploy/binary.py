"""Requests with binary tensors, as the extension of the protocol has them, written without the service."""

import json
import math
import struct
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray

from deploy.service.work import Feeds
from tests.deploy.services import INFER, tensor

JSON_LENGTH = "Inference-Header-Content-Length"
TYPES = {"FP32": ("f", 4), "INT64": ("q", 8), "UINT8": ("B", 1)}


def packed(value: NDArray[Any]) -> bytes:
    """Little-endian, in C order."""
    kind = {"f": "f", "i": "q"}[value.dtype.kind]
    return struct.pack(f"<{value.size}{kind}", *value.reshape(-1).tolist())


def message(feeds: Feeds, binary: set[str], **more: Any) -> tuple[dict[str, Any], bytes]:
    """The JSON of a request, and the binary data of some of its inputs."""
    inputs, blobs = [], b""
    for name, value in feeds.items():
        entry = tensor(name, value)
        if name in binary:
            del entry["data"]
            entry["parameters"] = {"binary_data_size": len(packed(value))}
            blobs += packed(value)
        inputs.append(entry)
    return {"inputs": inputs, **more}, blobs


def request(fields: Any, blobs: bytes = b"", **headers: str) -> httpx.Request:
    """Some JSON and binary data as a request; `length` is that of the JSON, unless it is given."""
    text = json.dumps(fields).encode()
    length = headers.pop("length", str(len(text)))
    return httpx.Request("POST", f"http://test{INFER}", content=text + blobs, headers={JSON_LENGTH: length, **headers})


def received(answer: httpx.Response) -> Feeds:
    """The outputs in a response, JSON or binary."""
    assert answer.status_code == 200, answer.text
    length = int(answer.headers.get(JSON_LENGTH, len(answer.content)))
    fields, blobs = json.loads(answer.content[:length]), answer.content[length:]
    outputs: Feeds = {}
    for output in fields["outputs"]:
        (kind, size), count = TYPES[output["datatype"]], math.prod(output["shape"])
        if "data" not in output:
            assert output["parameters"] == {"binary_data_size": count * size}
            output["data"], blobs = struct.unpack(f"<{count}{kind}", blobs[: count * size]), blobs[count * size :]
        dtype = {"FP32": np.float32, "UINT8": np.uint8}[output["datatype"]]
        outputs[output["name"]] = np.array(output["data"], dtype).reshape(output["shape"])
    assert not blobs
    return outputs
