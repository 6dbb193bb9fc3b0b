"""uvicorn with its limits set, which says when it is ready and turns unready as soon as it is told to stop."""

import math
import re
import signal
import socket
from types import FrameType
from typing import Any, cast

import uvicorn
from litestar.types import ASGIApp
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from ksa_serving.problems import no_room
from ksa_serving.room import ENTERED
from ksa_serving.service import Service

CROWDING = re.compile(
    rb"POST /v1/users/[^ \r\n]+/(?P<call>events|recommend) HTTP/1\.1\r\n"
    rb"(?i:content-length:[ ]*(?P<length>[0-9]{1,9})[ ]*\r\n"
    rb"|connection:[ ]*keep-alive[ ]*\r\n"
    rb"|(?!connection:|transfer-encoding:)[^\r\n]+\r\n)*+"  # possessive: what a line was taken for is not tried anew
    rb"\r\n"
)
"""The head of a request of the kinds that come in crowds; their body has a length, and their connection is kept."""


def crowding_call(data: bytes) -> str:
    """Return `events` or `recommend` where `data` is one whole request of this kind, which come in crowds; else ""."""
    found = CROWDING.match(data)
    if found is None or found["length"] is None or found.end() + int(found["length"]) != len(data):
        return ""
    return found["call"].decode()


def bounded_http(service: Service) -> type[HttpToolsProtocol]:
    """Return uvicorn's fast HTTP protocol with bounds.

    - On all of a request that is no body; the app counts exactly. httptools itself lets a request line, headers and
      trailers grow without end. A request with more than twice `header_bytes` of them, chunk marks included, is
      answered 400 and its connection closed.
    - On connections, and on how long one is kept where nothing comes, also within a request.
    - On requests at once: where there is no room, one that came whole is refused before it is parsed, which costs a
      tenth. All others, and all that asks for a token or a rate, are for `guards.py`.
    """
    settings = service.settings
    metrics = service.metrics
    head_bytes = 2 * settings.limits.header_bytes
    rooms = {"events": service.rooms.writing, "recommend": service.rooms.asking}
    refused = {call: metrics.requests.labels(call, "503") for call in (*rooms, "other")}
    refused_in_all = metrics.refused.labels("overloaded")
    answer = no_room()
    fields = "".join(f"{name}: {value}\r\n" for name, value in answer.headers.items())
    head = f"HTTP/1.1 503 Service Unavailable\r\ncontent-type: {answer.media_type}\r\n{fields}"
    refusal = f"{head}content-length: {len(answer.content)}\r\n\r\n".encode() + answer.content

    class BoundedHttp(HttpToolsProtocol):
        _no_body = 0
        _refused_at = -math.inf

        def data_received(self, data: bytes) -> None:
            """Refuse, or parse."""
            if len(self.connections) > settings.connections:
                self._refuse("other")
                self.transport.close()
                return
            between = self._no_body == 0 and (self.cycle is None or self.cycle.response_complete)
            call = crowding_call(data) if between else ""
            room = rooms.get(call)
            if room is not None and not room.enter():
                self._refuse(call)
                return
            cycle = self.cycle
            self._no_body += len(data)
            super().data_received(data)
            if room is not None:
                if self.cycle is cycle:  # it was no request
                    room.leave()
                else:
                    cast(dict[str, Any], self.cycle.scope)[ENTERED] = room
            if self._no_body > head_bytes and not self.transport.is_closing():
                self.send_400_response("Headers too large.")
            elif self._no_body and (self.cycle is None or self.cycle.response_complete or self.cycle.more_body):
                self._wait_for_more()

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            self._wait_for_more()

        def on_body(self, body: bytes) -> None:
            self._no_body -= len(body)
            super().on_body(body)

        def on_message_complete(self) -> None:
            self._no_body = 0
            super().on_message_complete()

        def timeout_keep_alive_handler(self) -> None:
            """Close, but not sooner after a refusal than after an answer."""
            rest = self._refused_at + self.timeout_keep_alive - self.loop.time()
            if rest > 0:
                self.timeout_keep_alive_task = self.loop.call_later(rest, self.timeout_keep_alive_handler)
            else:
                super().timeout_keep_alive_handler()

        def _wait_for_more(self) -> None:
            """Close unless more comes: uvicorn waits so between requests, and for the rest of one without end."""
            self.timeout_keep_alive_task = self.loop.call_later(
                self.timeout_keep_alive, self.timeout_keep_alive_handler
            )

        def _refuse(self, call: str) -> None:
            """Say no; nothing but that is done, for this is what the service does most when it has least time."""
            self.transport.write(refusal)
            refused[call].inc()
            refused_in_all.inc()
            self._refused_at = self.loop.time()
            if self.timeout_keep_alive_task is None:
                self.on_response_complete()  # begins to wait; later refusals prolong that

    return BoundedHttp


def server_config(app: ASGIApp, service: Service) -> uvicorn.Config:
    """Return uvicorn's configuration: bounded, and without an access log, for paths hold user ids."""
    settings = service.settings
    return uvicorn.Config(
        cast(Any, app),
        lifespan="on",
        http=bounded_http(service),
        access_log=False,
        log_level="warning",
        server_header=False,
        timeout_keep_alive=cast(int, settings.keep_alive_seconds),
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
