"""The digest that an ONNX file carries of itself: its last 64 bytes are the SHA-256 of all bytes before them, in hex.

To readers of ONNX these bytes are the value of the metadata entry `ddpm.sha256`: in protobuf's encoding a repeated
field may be continued at the end of a message.
"""

import hashlib

KEY = "ddpm.sha256"
LENGTH = 64
_VALUE = b"\x12" + bytes([LENGTH])  # field 2 of StringStringEntryProto, of 64 bytes
_KEY = b"\x0a" + bytes([len(KEY)]) + KEY.encode()  # field 1
ENTRY = b"\x72" + bytes([len(_KEY) + len(_VALUE) + LENGTH]) + _KEY + _VALUE
"""The entry up to its value: field 14 of ModelProto, `metadata_props`."""


def seal(model: bytes) -> bytes:
    """A serialized model with the entry that holds its digest."""
    content = model + ENTRY
    return content + hashlib.sha256(content).hexdigest().encode()


def check(content: bytes) -> bytes:
    """The serialized model without its digest; raises ValueError, in one line, unless it is as it was written."""
    body, found = content[:-LENGTH], content[-LENGTH:]
    if not body.endswith(ENTRY):
        raise ValueError(
            f"does not end with {KEY}: it was cut, changed, or written by another version; export it again"
        )
    if hashlib.sha256(body).hexdigest().encode() != found:
        raise ValueError(f"its bytes do not have the SHA-256 in {KEY}: it is damaged or was changed; export it again")
    return body.removesuffix(ENTRY)
