"""uvicorn's server, ended without losing a request."""

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
"""Seconds in which a connection that was accepted may send its request, after no new ones are."""
SHUTDOWN_TIMEOUT_SECONDS = 60
"""Seconds for what was accepted to be answered; then a client that never ends its request is no longer waited for."""


class Server(uvicorn.Server):
    """On SIGTERM or SIGINT it drains, answers what it accepted and ends with status 0; on a second one it ends at once.

    While it drains it accepts and answers as before, but is not ready, and each answer ends its connection.
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
        log.info("%s: ending; a second signal ends at once", signal.Signals(sig).name)

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """As uvicorn's; the line that tells of it comes when signals are heeded."""
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
        """As uvicorn's, which alone would drop connections that wait to be accepted, or whose request is on its way."""
        accepted = list[socket.socket]()
        for listener in sockets or []:
            with contextlib.suppress(OSError):  # none is left, or no descriptor for it
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
        await asyncio.sleep(0.1)  # those that asyncio has just accepted are not among the connections yet
        while self.server_state.connections and time.monotonic() < until:
            await asyncio.sleep(0.05)
        await super().shutdown(sockets)
