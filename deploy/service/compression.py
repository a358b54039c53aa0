"""gzip and deflate: of the bodies of requests, within a limit, and of responses.

Starlette's GZipMiddleware is not used: it has no deflate, and compresses up to 40 responses at once, each in memory.
"""

from __future__ import annotations

import zlib
from collections.abc import Iterator

from fastapi import HTTPException
from starlette.datastructures import Headers

from deploy.service.protocol import Invalid

WINDOW_BITS = {"gzip": zlib.MAX_WBITS + 16, "deflate": zlib.MAX_WBITS}
"""The encodings, and zlib's name for them; `deflate` has zlib's header (RFC 9110, section 8.4.1.2)."""
PIECE = 2**18
"""The most bytes that are decompressed at once, whatever they are compressed to."""
LEVEL = 1
"""Of zlib. Level 6 takes four times as long, to save another twentieth of what numbers in JSON take."""
SMALLEST = 1024
"""A response of fewer bytes fits in one packet either way."""


def sent(headers: Headers) -> str | None:
    """The encoding of a request's body, or None; raises HTTPException 415 if it is another."""
    encoding = ", ".join(headers.getlist("Content-Encoding")).strip().lower()
    if encoding in ("", "identity"):
        return None
    if encoding not in WINDOW_BITS:
        known = ", ".join(WINDOW_BITS)
        raise HTTPException(
            415, f"Content-Encoding: must be one of {known} (got {encoding[:50]})", {"Accept-Encoding": known}
        )
    return encoding


def accepted(headers: Headers) -> str | None:
    """The encoding for a response: the first one of those that the client accepts, or None."""
    given = dict[str, bool]()
    for each in ",".join(headers.getlist("Accept-Encoding")).lower().split(","):
        name, _, quality = each.partition(";")
        given[name.strip()] = quality.replace(" ", "").removeprefix("q=").rstrip("0.") != "" or not quality
    return next((encoding for encoding in WINDOW_BITS if given.get(encoding, given.get("*", False))), None)


def pieces(body: bytearray, encoding: str) -> Iterator[bytes]:
    """Decompress a body in pieces of up to PIECE bytes, without the GIL; raises Invalid if it is damaged."""
    stream = zlib.decompressobj(WINDOW_BITS[encoding])
    try:
        for start in range(0, len(body), PIECE):
            rest: bytes | bytearray = body[start : start + PIECE]
            while rest and not stream.eof:
                yield stream.decompress(rest, PIECE)
                rest = stream.unconsumed_tail
            if stream.eof and (stream.unused_data or start + PIECE < len(body)):
                raise Invalid(f"the body is not valid {encoding}: it goes on after its end")
    except zlib.error as error:
        reason = str(error).partition(": ")[2] or str(error)
        raise Invalid(f"the body is not valid {encoding}: {reason}") from None
    if not stream.eof:
        raise Invalid(f"the body is not valid {encoding}: it is incomplete")


def compressed(body: bytes, encoding: str | None) -> tuple[bytes, dict[str, str]]:
    """The body of a response, compressed unless it is short, and its headers."""
    if encoding is None or len(body) < SMALLEST:
        return body, {"Vary": "Accept-Encoding"}
    return zlib.compress(body, LEVEL, WINDOW_BITS[encoding]), {
        "Content-Encoding": encoding,
        "Vary": "Accept-Encoding",
    }
