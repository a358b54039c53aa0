"""The digest embedded in an ONNX file: its last 64 bytes are the hexadecimal SHA-256 of all bytes before them.

ONNX readers see these bytes as the value of the metadata entry `ddpm.sha256`, since in protobuf's encoding a repeated
field may continue at the end of a message.
"""

import hashlib

KEY = "ddpm.sha256"
LENGTH = 64
_VALUE = b"\x12" + bytes([LENGTH])  # field 2 of StringStringEntryProto, of 64 bytes
_KEY = b"\x0a" + bytes([len(KEY)]) + KEY.encode()  # field 1
ENTRY = b"\x72" + bytes([len(_KEY) + len(_VALUE) + LENGTH]) + _KEY + _VALUE
"""The encoded entry without its value: field 14 of ModelProto, `metadata_props`."""


def seal(model: bytes) -> bytes:
    """Append the entry with the digest to a serialized model."""
    content = model + ENTRY
    return content + hashlib.sha256(content).hexdigest().encode()


def check(content: bytes) -> bytes:
    """Verify and remove the digest of a serialized model; raises ValueError, in one line, if it does not match."""
    body, found = content[:-LENGTH], content[-LENGTH:]
    if not body.endswith(ENTRY):
        raise ValueError(
            f"does not end with {KEY}: truncated, modified, or written by another version; export it again"
        )
    if hashlib.sha256(body).hexdigest().encode() != found:
        raise ValueError(f"does not match the SHA-256 in {KEY}: damaged or modified; export it again")
    return body.removesuffix(ENTRY)
