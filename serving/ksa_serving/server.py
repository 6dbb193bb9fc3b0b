"""uvicorn with its limits set, which says when it is ready and turns unready as soon as it is told to stop."""

import signal
import socket
from types import FrameType
from typing import Any, cast

import uvicorn
from litestar.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ksa_serving.service import Service
from ksa_serving.settings import ServeSettings


def bounded_http(head_bytes: int) -> type[HttpToolsProtocol]:
    """Return uvicorn's fast HTTP protocol with a bound on all of a request that is no body; the app counts exactly.

    httptools itself lets a request line, headers and trailers grow without end. A request with more than `head_bytes`
    of them, chunk marks included, is answered 400 and its connection closed.
    """

    class BoundedHttp(HttpToolsProtocol):
        _no_body = 0

        def data_received(self, data: bytes) -> None:
            self._no_body += len(data)
            super().data_received(data)
            if self._no_body > head_bytes and not self.transport.is_closing():
                self.send_400_response("Headers too large.")

        def on_body(self, body: bytes) -> None:
            self._no_body -= len(body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._no_body = 0
            super().on_message_complete()

    return BoundedHttp


def server_config(app: ASGIApp, settings: ServeSettings) -> uvicorn.Config:
    """Return uvicorn's configuration: bounded, and without an access log, for paths hold user ids."""
    return uvicorn.Config(
        cast(Any, app),
        lifespan="on",
        http=bounded_http(2 * settings.limits.header_bytes),
        access_log=False,
        log_level="warning",
        server_header=False,
        limit_concurrency=2
        * settings.concurrent_requests,  # connections; the app bounds requests, with a better answer
        timeout_keep_alive=int(settings.keep_alive_seconds),
        timeout_graceful_shutdown=settings.graceful_seconds,
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
