"""uvicorn with its limits set, which says when it is ready and turns unready as soon as it is told to stop."""

import signal
import socket
from types import FrameType
from typing import Any, cast

import uvicorn
from litestar.types import ASGIApp

from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings


def server_config(app: ASGIApp, settings: ServeSettings) -> uvicorn.Config:
    """Return uvicorn's configuration: bounded, and without an access log, for paths hold user ids."""
    return uvicorn.Config(
        cast(Any, app),
        lifespan="on",
        http="h11",  # httptools is faster, but lets headers grow without bound
        access_log=False,
        log_level="warning",
        server_header=False,
        limit_concurrency=2
        * settings.concurrent_requests,  # connections; the app bounds requests, with a better answer
        timeout_keep_alive=int(settings.keep_alive_seconds),
        timeout_graceful_shutdown=settings.graceful_seconds,
        h11_max_incomplete_event_size=2 * settings.limits.header_bytes,  # while reading; the app counts exactly
        ws="none",
    )


class ReadyServer(uvicorn.Server):
    """Prints `ready` once it listens; on SIGTERM it is unready at once, then finishes what it began."""

    def __init__(self, config: uvicorn.Config, service: Service, ready: str):
        super().__init__(config)
        self._service = service
        self._ready = ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, then say so."""
        await super().startup(sockets)
        if not self.should_exit:
            print(self._ready, flush=True)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Turn unready, then stop with exit code 0; a second SIGINT stops without waiting."""
        self._service.workers.draining = True
        if self.should_exit and sig == signal.SIGINT:
            self.force_exit = True
        self.should_exit = True
