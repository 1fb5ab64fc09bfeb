"""Serving an ASGI function in a process of its own, with uvicorn as it comes."""

from __future__ import annotations

import signal
import socket
import subprocess
import sys
from types import TracebackType
from typing import Any, Self

import uvicorn


def serve(application: Any) -> None:
    """Serve on a free port until SIGTERM. Says `ready URL` on standard output first."""
    listening = socket.create_server(("127.0.0.1", 0), backlog=2048)
    # None of the gateway's own parts: what they save is to be seen.
    config = uvicorn.Config(
        application,
        http="httptools",
        ws="none",
        lifespan="off",
        log_config=None,
        access_log=False,
        server_header=False,
        proxy_headers=False,
    )
    # Who connects from now on waits until the server takes the socket over.
    print(f"ready http://127.0.0.1:{listening.getsockname()[1]}", flush=True)
    # The server raises the signal that ended it once more: that is a good end.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    uvicorn.Server(config).run(sockets=[listening])


class Served:
    """A module of this package that serves: `python -m bench.MODULE`, and its URL."""

    url: str

    def __init__(self, module: str) -> None:
        self._module = module

    def __enter__(self) -> Self:
        self._process = subprocess.Popen(
            [sys.executable, "-m", f"bench.{self._module}"], stdout=subprocess.PIPE, text=True
        )
        assert self._process.stdout
        said = self._process.stdout.readline().split()
        assert said[:1] == ["ready"], f"bench.{self._module} did not start"
        self.url = said[1]
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._process.terminate()
        try:
            self._process.wait(10)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    @property
    def pid(self) -> int:
        return self._process.pid
