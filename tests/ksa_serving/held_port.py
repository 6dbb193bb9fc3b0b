"""Ports on loopback for servers that are told where to listen."""

import contextlib
import socket
from collections.abc import Iterator


@contextlib.contextmanager
def held_port() -> Iterator[int]:
    """A port where connections are refused until a server listens there, and which the system gives to nobody else.

    The server sets SO_REUSEADDR, as servers do: then it may listen where another socket is bound and does not.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
