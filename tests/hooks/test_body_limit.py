"""A body over the limit is refused without being read, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
from collections.abc import AsyncIterator
from typing import Any

import pytest
import uvicorn
from asgiref.sync import sync_to_async
from asgiref.typing import ASGIReceiveCallable, ASGISendCallable, Scope
from django.core.asgi import get_asgi_application

from hooks import tokens
from hooks.bodies import BodyLimit
from hooks.models import HookPolicy
from tests.hooks.conftest import rows, set_policy

pytestmark = pytest.mark.django_db(transaction=True)

LIMIT = 2048


class Counting:
    """Counts the bytes of bodies that the application inside receives."""

    def __init__(self, application: Any) -> None:
        self.application = application
        self.received = 0

    async def __call__(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        async def counting() -> Any:
            event: Any = await receive()
            self.received += len(event.get("body", b""))
            return event

        await self.application(scope, counting, send)


@pytest.fixture
async def server() -> AsyncIterator[tuple[int, Counting]]:
    """A server with the limit around Django; its port and what reached Django."""
    await sync_to_async(set_policy)(max_body_bytes=LIMIT)
    counting = Counting(get_asgi_application())
    listening = socket.create_server(("127.0.0.1", 0))
    configuration = uvicorn.Config(BodyLimit(counting), lifespan="off", log_level="warning")
    server = uvicorn.Server(configuration)
    with contextlib.closing(listening):
        serving = asyncio.create_task(server.serve([listening]))
        yield listening.getsockname()[1], counting
        server.should_exit = True
        await serving


async def talk(port: int, *parts: bytes) -> bytes:
    """Send raw bytes and return the beginning of the answer, which must come soon."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        async with asyncio.timeout(5):
            for part in parts:
                writer.write(part)
                await writer.drain()
            answer = await reader.readuntil(b"\r\n\r\n")
    # Without the reason: Python 3.13 words it anew.
    return b" ".join(answer.split(b" ")[:2])


def head(token: str, *lines: str, path: str = "/hooks/wake") -> bytes:
    fields = ["Host: localhost", f"Authorization: Bearer {token}", *lines]
    return "\r\n".join([f"POST {path} HTTP/1.1", *fields, "", ""]).encode()


def chunk(data: bytes) -> bytes:
    return f"{len(data):x}\r\n".encode() + data + b"\r\n"


@pytest.fixture
async def token() -> str:
    return (await sync_to_async(tokens.create)("tests"))[1]


async def test_a_length_over_the_limit_is_refused_before_the_body_comes(
    server: tuple[int, Counting], token: str
) -> None:
    port, counting = server
    before = await sync_to_async(rows)()
    for length in (LIMIT + 1, 10**12):
        answer = await talk(port, head(token, f"Content-Length: {length}"))
        assert answer == b"HTTP/1.1 413"
    assert counting.received == 0
    assert await sync_to_async(rows)() == before


async def test_a_wrong_credential_still_comes_first(server: tuple[int, Counting]) -> None:
    port, counting = server
    answer = await talk(port, head("wrong", "Content-Length: 1000000"))
    assert answer == b"HTTP/1.1 401"
    assert counting.received == 0


async def test_an_unannounced_body_is_read_to_the_limit_only(
    server: tuple[int, Counting], token: str
) -> None:
    port, counting = server
    opening = head(token, "Transfer-Encoding: chunked") + chunk(b'{"text": "')
    # It never ends: an answer can only come because reading stopped.
    answer = await talk(port, opening, *[chunk(b"x" * 1000)] * 5)
    assert answer == b"HTTP/1.1 413"
    assert counting.received == LIMIT + 1


async def test_a_body_within_the_limit_is_taken_whole(
    server: tuple[int, Counting], token: str
) -> None:
    port, _ = server
    body = b'{"text": "hello"}'
    body += b" " * (LIMIT - len(body))
    assert await talk(port, head(token, f"Content-Length: {LIMIT}"), body) == b"HTTP/1.1 200"
    parts = [chunk(body[start : start + 100]) for start in range(0, LIMIT, 100)]
    answer = await talk(port, head(token, "Transfer-Encoding: chunked"), *parts, b"0\r\n\r\n")
    assert answer == b"HTTP/1.1 200"
    assert await sync_to_async(rows)() == (1, 1, 0)


async def test_other_paths_are_left_alone(server: tuple[int, Counting], token: str) -> None:
    port, counting = server
    body = b"x" * (LIMIT + 10)
    request = head(token, f"Content-Length: {len(body)}", path="/elsewhere")
    assert await talk(port, request, body) == b"HTTP/1.1 404"
    assert counting.received == len(body)


async def test_a_changed_limit_counts_at_once(server: tuple[int, Counting], token: str) -> None:
    port, _ = server
    request = head(token, f"Content-Length: {LIMIT + 1}")
    body = b'{"text": "x"}'.ljust(LIMIT + 1)
    assert b"413" in await talk(port, request, body)
    await sync_to_async(set_policy)(max_body_bytes=2 * LIMIT)
    assert b"200" in await talk(port, request, body)
    assert await sync_to_async(HookPolicy.objects.count)() == 1
