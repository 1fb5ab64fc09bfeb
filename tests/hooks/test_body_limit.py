"""A body over the limit is refused without being read, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import time
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from asgiref.typing import ASGIReceiveCallable, ASGISendCallable, Scope
from django.core.asgi import get_asgi_application
from django.test import RequestFactory
from rest_framework.request import Request

from hooks import tokens
from hooks.bodies import BodyLimit, read_body
from hooks.errors import BodyTooLarge
from hooks.models import HookPolicy
from tests.hooks.conftest import rows, set_policy
from tests.hooks.raw_http import chunk, head, serving, talk
from tests.live import LiveGateway

pytestmark = pytest.mark.django_db(transaction=True)

LIMIT = 2048
SECONDS = 1


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
    async with serving(BodyLimit(counting, SECONDS)) as port:
        yield port, counting


@pytest.fixture
async def token() -> str:
    return (await sync_to_async(tokens.create)("tests"))[1]


Sending = Callable[[str, int], Iterator[bytes]]


def announced(token: str, size: int) -> Iterator[bytes]:
    """Give a request whose head tells how many bytes follow."""
    yield head(token, f"Content-Length: {size}")
    for _ in range(size // 10_000):
        yield b"x" * 10_000


def chunked(token: str, size: int) -> Iterator[bytes]:
    """Give a request of which nobody knows how long it will be."""
    yield head(token, "Transfer-Encoding: chunked")
    for _ in range(size // 10_000):
        yield chunk(b"x" * 10_000)
    yield chunk(b"")


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


@pytest.mark.parametrize("sending", [announced, chunked])
async def test_a_client_that_sends_all_before_it_reads_gets_its_refusal(
    server: tuple[int, Counting], token: str, sending: Sending
) -> None:
    port, _ = server
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    async with asyncio.timeout(5):
        for part in sending(token, 10_000_000):
            writer.write(part)
            await writer.drain()
        answer = await reader.read()
    writer.close()
    assert answer.startswith(b"HTTP/1.1 413")
    assert b"\r\nconnection: close\r\n" in answer
    assert b"the body is larger than 2048 bytes" in answer


async def test_a_body_without_an_end_is_not_taken_for_ever(
    server: tuple[int, Counting], token: str
) -> None:
    port, _ = server
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    writer.write(head(token, f"Content-Length: {10**12}"))
    started = time.monotonic()
    async with asyncio.timeout(5):
        answer = await reader.readuntil(b"\r\n\r\n")
        assert answer.startswith(b"HTTP/1.1 413")
        assert time.monotonic() - started < SECONDS / 2
        with contextlib.suppress(OSError):  # reset or broken pipe, as it comes
            while not reader.at_eof():
                writer.write(b"x" * 10_000)
                await writer.drain()
                await asyncio.sleep(0.01)
    assert SECONDS - 0.1 < time.monotonic() - started < SECONDS + 1
    writer.close()


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


def test_a_body_is_there_for_whoever_reads_it_next() -> None:
    request = RequestFactory().generic("POST", "/hooks/wake", b"12345")
    assert [read_body(Request(request), 5) for _ in range(2)] == [b"12345"] * 2


def test_a_body_that_was_too_large_stays_so_when_the_limit_is_raised() -> None:
    for announced in ("5", ""):
        request = RequestFactory().generic("POST", "/hooks/wake", b"12345")
        request.META["CONTENT_LENGTH"] = announced
        for limit in (4, 100):
            with pytest.raises(BodyTooLarge):
                read_body(Request(request), limit)


def test_bodies_that_are_refused_take_no_memory(live_gateway: LiveGateway) -> None:
    def refuse(sending: Sending, size: int) -> None:
        with socket.create_connection(("127.0.0.1", live_gateway.port), timeout=10) as client:
            for part in sending(live_gateway.hook_token, size):
                client.sendall(part)
            assert client.recv(12) == b"HTTP/1.1 413"

    def peak_bytes() -> int:
        """Return the most memory that the process has had at once."""
        assert live_gateway.process
        lines = Path(f"/proc/{live_gateway.process.pid}/status").read_text().splitlines()
        return 1024 * int(next(line.split()[1] for line in lines if line.startswith("VmHWM")))

    for sending in (announced, chunked):
        refuse(sending, 300_000)
    before = peak_bytes()
    for _ in range(15):
        refuse(announced, 10_000_000)
        refuse(chunked, 10_000_000)
    assert peak_bytes() - before < 5_000_000
