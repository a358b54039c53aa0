"""A uvicorn server that survives slow and idle clients, and shuts down without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import json
import logging
import os
import signal
import socket
import struct
import sys
import time
from collections import Counter
from types import FrameType
from typing import Any

import h11
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.h11_impl import H11Protocol

from deploy.service.state import Service

log = logging.getLogger("ddpm.service")
LINGER_SECONDS = 1.0
"""How long an open connection may still send its request once no new connections are accepted."""
FINISH_SECONDS = 10.0
"""How long accepted requests may take after that; the rest get a 503."""
SHUTDOWN_TIMEOUT_SECONDS = 15
"""How long uvicorn waits for all of these, so that a client that does not read its response cannot block shutdown."""
HEAD_SECONDS = 10.0
"""How long a connection may take until the headers of its next request are complete."""
READ_SECONDS = 60.0
"""How long a client may take to read a response, or to read on in a stream."""
MAX_UNREAD = 256 * 2**20
"""Bytes of responses that clients have not read yet; beyond it, those of the client with most are dropped."""
BACKLOG = 2048
"""Connections that wait until they are accepted."""
MAX_ACCEPTED = 16
"""Connections that are accepted before other work goes on."""
MAX_CONNECTIONS = 1000
"""A further connection replaces the oldest one without a complete request, of the client that has most of these."""


class Connection(H11Protocol):
    """uvicorn's protocol, with limits for connections without a request, and errors as {"error": "one line"}."""

    cycle: Any
    """The last request, or None."""
    _timer: asyncio.TimerHandle | None = None
    _reading: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_request()
        if len(self.connections) > MAX_CONNECTIONS:
            idle = [each for each in self._all() if each._idle]
            counts = Counter(each._host for each in idle)
            oldest = max(idle, key=lambda each: (counts[each._host], -each._since))
            oldest._refuse(503, f"more than {MAX_CONNECTIONS} connections; try again later")

    def connection_lost(self, exc: Exception | None) -> None:
        for timer in (self._timer, self._reading):
            if timer:
                timer.cancel()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """The client does not keep up with a response, which may be a stream that goes on only once it has read."""
        super().pause_writing()
        self._reading = self.loop.call_later(READ_SECONDS, self.transport.abort)
        self._limit_unread()

    def resume_writing(self) -> None:
        if self._reading:
            self._reading.cancel()
        super().resume_writing()

    def on_response_complete(self) -> None:
        if self._unread:
            self.loop.call_later(READ_SECONDS, self._check_read, self.cycle)
            self._limit_unread()
        self._await_request()
        super().on_response_complete()

    def _limit_unread(self) -> None:
        unread = Counter[str]()
        for each in self._all():
            unread[each._host] += each._unread
        if unread.total() > MAX_UNREAD:
            max(self._all(), key=lambda each: (unread[each._host], each._unread)).transport.abort()

    def _all(self) -> list[Connection]:
        return [each for each in self.connections if isinstance(each, Connection)]

    @property
    def _host(self) -> str:
        return self.client[0] if self.client else ""

    @property
    def _unread(self) -> int:
        return self.transport.get_write_buffer_size()

    @property
    def _idle(self) -> bool:
        """Whether it waits for a request, or for the rest of one."""
        return self.cycle is None or self.cycle.response_complete or self.cycle.more_body

    def _await_request(self) -> None:
        if self._timer:
            self._timer.cancel()
        self._since = self.loop.time()
        self._timer = self.loop.call_later(HEAD_SECONDS, self._check_request)

    def _check_request(self) -> None:
        if (self.cycle is None or self.cycle.response_complete) and not self.transport.is_closing():
            self._refuse(408, f"no request arrived within {HEAD_SECONDS:g} s")

    def _check_read(self, cycle: Any) -> None:
        if self.cycle is cycle and self._unread:
            self.transport.abort()

    def _should_upgrade(self) -> bool:
        return False  # a request for another protocol is answered in this one

    def send_400_response(self, msg: str) -> None:
        self._refuse(400, msg)

    def _refuse(self, status: int, line: str) -> None:
        """Answer and close."""
        body = json.dumps({"error": line}).encode()
        headers = [("Content-Type", "application/json"), ("Content-Length", str(len(body))), ("Connection", "close")]
        with contextlib.suppress(h11.LocalProtocolError):  # the response has begun already
            for event in (h11.Response(status_code=status, headers=headers), h11.Data(data=body), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None:  # else the rest of its request would be answered, too
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        if self._unread:
            self.transport.abort()
        else:
            self.transport.close()


class Server(uvicorn.Server):
    """Shuts down gracefully on SIGTERM or SIGINT, with exit status 0, and immediately on a second signal.

    While draining it still accepts and answers requests, but reports not ready and closes each connection after its
    response. Then it stops accepting, answers what it has accepted, and ends.
    """

    def __init__(self, app: FastAPI, service: Service, drain: float) -> None:
        super().__init__(
            uvicorn.Config(
                app,
                lifespan="off",
                log_config=None,
                log_level="warning",
                access_log=False,
                http=Connection,
                ws="none",
                backlog=MAX_ACCEPTED,  # asyncio accepts as many at once, and reduces the listener's to it
                timeout_graceful_shutdown=SHUTDOWN_TIMEOUT_SECONDS,
            )
        )
        self._service, self._drain, self._ending = service, drain, 0.0

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:  # noqa: ARG002 uvicorn's
        if self._service.draining:
            os._exit(128 + sig)
        self._service.draining, self._ending = True, time.monotonic() + self._drain
        log.info("%s: shutting down; a second signal stops immediately", signal.Signals(sig).name)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start as uvicorn does, and log the address once signal handlers are installed."""
        await super().startup(sockets)
        for listener in sockets or []:
            listener.listen(BACKLOG)
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        served = self._service.models.served
        for each in served:
            log.info("%s: %s", each.title, each.current.summary)
        titles = ", ".join(each.title for each in served)
        log.info("serving %s on http://%s:%d", titles, f"[{host}]" if ":" in host else host, port)

    async def on_tick(self, counter: int) -> bool:
        ends = self._service.draining and time.monotonic() >= self._ending
        return await super().on_tick(counter) or ends

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve pending connections first: uvicorn drops those not yet accepted or whose request is in transit."""
        for listener in sockets or []:
            ignore_new(listener)
        await asyncio.sleep(0.1)  # for connections that are being established
        accepted = list[socket.socket]()
        for listener in sockets or []:
            with contextlib.suppress(OSError):  # no more pending, or out of file descriptors
                while True:
                    accepted.append(listener.accept()[0])
        for server in self.servers:
            server.close()
        loop, protocol = asyncio.get_running_loop(), self.config.http_protocol_class
        for connection in accepted:
            await loop.connect_accepted_socket(
                lambda: protocol(self.config, self.server_state, self.lifespan.state),  # type: ignore[call-arg]
                connection,
            )
        until = time.monotonic() + LINGER_SECONDS
        await asyncio.sleep(0.1)  # asyncio registers newly accepted connections only after a moment
        while self.server_state.connections and time.monotonic() < until:
            await asyncio.sleep(0.05)
        loop.call_later(FINISH_SECONDS, self._service.batcher.close)
        loop.call_later(FINISH_SECONDS + LINGER_SECONDS, self._abort)
        await super().shutdown(sockets)

    def _abort(self) -> None:
        """Close the connections whose clients neither send their request nor read their response."""
        for connection in self.server_state.connections:
            connection.transport.abort()


def ignore_new(listener: socket.socket) -> None:
    """Have Linux drop the SYN segments of new connections, which clients send again after a second.

    It would accept connections until the listener is closed, and then reset those that nobody took from its queue,
    with the requests that they carry.
    """
    if sys.platform != "linux":
        return
    # A classic BPF program: load byte 13 of the TCP header; if SYN (2) is set in it, drop the segment; else keep it.
    program = [(0x30, 0, 0, 13), (0x45, 0, 1, 2), (0x06, 0, 0, 0), (0x06, 0, 0, 2**32 - 1)]
    instructions = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *each) for each in program))
    attach_filter = 26  # SO_ATTACH_FILTER, which the module socket does not name
    with contextlib.suppress(OSError):  # a sandbox may not have it
        listener.setsockopt(
            socket.SOL_SOCKET, attach_filter, struct.pack("HP", len(program), ctypes.addressof(instructions))
        )
