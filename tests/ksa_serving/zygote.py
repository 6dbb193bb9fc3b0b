"""Child processes that have imported all they need when they begin: forks of one that does nothing else.

To start Python and import the service takes a second, and ten times as long as what is killed lives.
"""

import fcntl
import gc
import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
from typing import Any

PIPE_BYTES = 2**20
"""What a child may print before someone reads it: with Linux's 64 KiB those that die late waited for their reader."""


class Child:
    """A process that was forked; as far as tests use it, like `subprocess.Popen`."""

    def __init__(self, zygote: "Zygote", pid: int, stdout: int):
        self.pid = pid
        self.stdout = os.fdopen(stdout)
        self._zygote = zygote
        self._code: int | None = None

    def send_signal(self, number: int) -> None:
        """Send a signal; the zygote keeps the process's number until it is waited for."""
        os.kill(self.pid, number)

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        if self._code is None:
            self._code = self._zygote.ask({"poll": self.pid})
        return self._code

    def wait(self, timeout: float = 60) -> int:
        """Return the exit code.

        Raises:
            subprocess.TimeoutExpired: it runs on.
        """
        until = time.monotonic() + timeout
        while (code := self.poll()) is None:
            if time.monotonic() > until:
                raise subprocess.TimeoutExpired("child", timeout)
            time.sleep(0.002)
        return code


class Zygote:
    """Forks processes that have imported `modules`."""

    def __init__(self, *modules: str):
        self._socket, there = socket.socketpair()
        command = [sys.executable, __file__, str(there.fileno()), *modules]
        self._process = subprocess.Popen(command, pass_fds=[there.fileno()])
        there.close()

    def spawn(self, function: str, *given: Any) -> Child:
        """Begin a process that calls `function`, as `module:name`."""
        read, write = os.pipe()
        fcntl.fcntl(write, fcntl.F_SETPIPE_SZ, PIPE_BYTES)
        try:
            pid = self.ask({"call": function, "given": given}, write)
        finally:
            os.close(write)
        assert pid is not None
        return Child(self, pid, read)

    def ask(self, request: dict[str, Any], *files: int) -> int | None:
        """Return the zygote's answer."""
        socket.send_fds(self._socket, [json.dumps(request).encode()], files)
        return json.loads(self._socket.recv(100))

    def close(self) -> None:
        """End it."""
        self._socket.close()
        assert self._process.wait(120) == 0


def _poll(pid: int) -> int | None:
    found, status = os.waitpid(pid, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def _child(stdout: int, function: str, given: list[Any]) -> None:
    os.dup2(stdout, 1)
    module, name = function.split(":")
    os._exit(getattr(importlib.import_module(module), name)(*given) or 0)


def _serve(control: socket.socket) -> None:
    gc.freeze()
    while True:
        message, files, _, _ = socket.recv_fds(control, 2**16, 1)
        if not message:
            return
        asked = json.loads(message)
        if "poll" in asked:
            answer = _poll(asked["poll"])
        else:
            answer = os.fork()
            if answer == 0:
                control.close()
                _child(files[0], asked["call"], asked["given"])
            os.close(files[0])
        control.send(json.dumps(answer).encode())


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    for module in sys.argv[2:]:
        importlib.import_module(module)
    _serve(socket.socket(fileno=int(sys.argv[1])))
