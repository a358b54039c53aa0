"""A uvicorn server that shuts down without losing a request."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import signal
import socket
import time
from types import FrameType

import uvicorn
from fastapi import FastAPI

from deploy.service.app import Service

log = logging.getLogger("ddpm.service")
LINGER_SECONDS = 1.0
"""How long an open connection may still send its request once no new connections are accepted."""
SHUTDOWN_TIMEOUT_SECONDS = 60
"""How long to wait for accepted requests, so that a client that never completes its request cannot block shutdown."""


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
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        place, model = (
            f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}",
            self._service.served.current,
        )
        log.info(
            "serving %s version %s (weights %s) on %s", self._service.name, model.version, model.weights[:12], place
        )

    async def on_tick(self, counter: int) -> bool:
        ends = self._service.draining and time.monotonic() >= self._ending
        return await super().on_tick(counter) or ends

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Serve pending connections first: uvicorn drops those not yet accepted or whose request is in transit."""
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
        await super().shutdown(sockets)
