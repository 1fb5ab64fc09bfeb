"""HTTP byte by byte, to a server in this process: what well-behaved clients cannot do."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import uvicorn


@contextlib.asynccontextmanager
async def serving(
    application: Any, http: Any = "auto", *, access_log: bool = True
) -> AsyncIterator[int]:
    """Serve an ASGI application, perhaps with a protocol of ours, and give its port."""
    listening = socket.create_server(("127.0.0.1", 0))
    config = uvicorn.Config(
        application,
        http=http,
        lifespan="off",
        log_config=None,
        access_log=access_log,
        proxy_headers=False,
        timeout_graceful_shutdown=1,
    )
    server = uvicorn.Server(config)
    with contextlib.closing(listening):
        task = asyncio.create_task(server.serve([listening]))
        try:
            yield listening.getsockname()[1]
        finally:
            server.should_exit = True
            await task


def head(token: str, *lines: str, path: str = "/hooks/wake") -> bytes:
    """Return the head of a POST with this token and these further lines."""
    fields = ["Host: localhost", f"Authorization: Bearer {token}", *lines]
    return "\r\n".join([f"POST {path} HTTP/1.1", *fields, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    """Return data as a chunk of a body without an announced length; the empty one ends it."""
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


async def talk(port: int, *parts: bytes) -> bytes:
    """Send parts and return the beginning of the answer, which must come soon."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        async with asyncio.timeout(5):
            for part in parts:
                writer.write(part)
                await writer.drain()
            answer = await reader.readuntil(b"\r\n\r\n")
    # Without the reason: Python 3.13 words it anew.
    return b" ".join(answer.split(b" ")[:2])
