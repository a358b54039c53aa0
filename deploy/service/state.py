"""The state of the service, shared by the routes."""

import asyncio
from collections import Counter
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, TypeVar

from cachetools import LRUCache

from deploy.service.batching import Batcher
from deploy.service.keys import Keys
from deploy.service.metrics import Metrics
from deploy.service.served import Models
from deploy.service.work import Observe

T = TypeVar("T")
OVERHEAD = 512
"""Bytes that the cache needs for a picture besides its file."""


class Pictures(LRUCache[str, bytes]):
    """Pictures by ETag, in some bytes of memory; the one that was not asked for longest makes room for another."""

    def __init__(self, size: int) -> None:
        super().__init__(size, lambda png: len(png) + OVERHEAD)


@dataclass
class Service:
    """State shared by the routes."""

    models: Models
    batcher: Batcher
    metrics: Metrics
    max_images: int = 64
    max_body: int = 16 * 2**20
    body_seconds: float = 10.0
    """Time for the body of a request to arrive."""
    max_seconds: float = 300.0
    """Time to compute a response."""
    max_buffered: int = 128 * 2**20
    """Bytes of bodies at a time, of which a client may use what it leaves to others."""
    keys: Keys | None = None
    """The keys of clients; None if everyone may use the service."""
    cors: Sequence[str] = ()
    """Origins whose pages may use the service, or "*"."""
    log_requests: bool = False
    observe: Callable[[str, str], Observe] | None = None
    """What to call, with the name and version of the model, when a request begins to wait for it."""
    cache: Pictures = field(default_factory=partial(Pictures, 2**26))
    """Those that were asked for by seed."""
    draining: bool = False
    """After SIGTERM or SIGINT: readiness checks fail, and each response closes its connection."""
    buffered: Counter[str] = field(default_factory=Counter)
    """Bytes of bodies whose requests are not done, by client."""
    threads: ThreadPoolExecutor = field(default_factory=partial(ThreadPoolExecutor, 2, "conversion"))
    """For JSON, gzip and PNG. Few, since each may need several times the memory of what it converts."""

    def kept(self, etag: str | None, count: bool = True) -> bytes | None:
        """A picture from the cache, if it has it; `count` it as found in the metrics."""
        png = self.cache.get(etag) if etag else None
        if png is not None and count:
            self.metrics.cached.inc()
        return png

    def keep(self, etag: str, png: bytes) -> None:
        """Put a picture into the cache, unless it is too large for it."""
        with suppress(ValueError):
            self.cache[etag] = png

    async def convert(self, call: Callable[..., T], *arguments: Any) -> T:
        """Call a function in one of these threads."""
        return await asyncio.get_running_loop().run_in_executor(self.threads, call, *arguments)
