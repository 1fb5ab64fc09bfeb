"""A body that does not come in time is answered with 408, over a real socket."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import time
from collections.abc import AsyncIterator
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from asgiref.typing import ASGIReceiveCallable, ASGISendCallable, Scope
from django.core.asgi import get_asgi_application

from hooks import tokens
from hooks.bodies import BODY_SECONDS, BodyLimit
from tests.hooks.conftest import rows
from tests.hooks.raw_http import chunk, head, serving

pytestmark = pytest.mark.django_db(transaction=True)

SECONDS = 0.3
HEAD = head("wrong", "Content-Length: 100")


@pytest.fixture
async def port() -> AsyncIterator[int]:
    """The port of a gateway's HTTP whose bodies must come within `SECONDS`."""
    django_application: Any = get_asgi_application()  # Django types its scopes loosely
    async with serving(BodyLimit(django_application, SECONDS)) as port:
        yield port


@contextlib.asynccontextmanager
async def connected(port: int) -> AsyncIterator[tuple[asyncio.StreamReader, asyncio.StreamWriter]]:
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        async with asyncio.timeout(5):
            yield reader, writer


async def read_answer(reader: asyncio.StreamReader) -> tuple[int, dict[str, str], bytes]:
    """Read one answer and return its status, headers and body."""
    status_line, *lines = (await reader.readuntil(b"\r\n\r\n")).decode().strip().split("\r\n")
    headers = dict(line.lower().split(": ", 1) for line in lines)
    body = await reader.readexactly(int(headers["content-length"]))
    return int(status_line.split()[1]), headers, body


def test_a_body_has_30_seconds() -> None:
    assert BODY_SECONDS == 30


@pytest.mark.parametrize(
    ("path", "length", "sent"),
    [
        ("/hooks/wake", "Content-Length: 100", b""),
        ("/hooks/wake", "Content-Length: 100", b"x" * 99),
        ("/admin/login/", "Transfer-Encoding: chunked", chunk(b"x" * 100)),
        ("/nothing", "Content-Length: 100", b""),
    ],
    ids=["nothing comes", "all but one byte", "no end", "no such page"],
)
async def test_a_body_that_stops_coming_is_answered_with_408(
    port: int, path: str, length: str, sent: bytes, caplog: pytest.LogCaptureFixture
) -> None:
    tasks = asyncio.all_tasks()
    started = time.monotonic()
    async with connected(port) as (reader, writer):
        writer.write(head("wrong", length, path=path) + sent)
        status, headers, body = await read_answer(reader)
    assert SECONDS <= time.monotonic() - started < SECONDS + 1
    assert status == 408
    assert headers["connection"] == "close"
    assert headers["content-type"] == "application/json"
    assert json.loads(body) == {"ok": False, "error": "the body did not arrive within 0.3 s"}
    if left := asyncio.all_tasks() - tasks:  # until the server has seen that the client is gone
        _, left = await asyncio.wait(left, timeout=0.5)
    assert not left
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


async def test_the_time_is_that_of_the_whole_body_and_not_between_its_bytes(port: int) -> None:
    started = time.monotonic()
    async with connected(port) as (reader, writer):
        writer.write(HEAD)
        answer = asyncio.create_task(read_answer(reader))
        for _ in range(99):
            writer.write(b"x")
            await asyncio.sleep(0.05)
            if answer.done():
                break
        assert (await answer)[0] == 408
    assert time.monotonic() - started < SECONDS + 1


async def test_the_connection_ends_soon_after_the_408(port: int) -> None:
    async with connected(port) as (reader, writer):
        writer.write(HEAD)
        assert (await read_answer(reader))[0] == 408
        with contextlib.suppress(OSError):  # reset or broken pipe, as it comes
            while not reader.at_eof():
                writer.write(b"x")
                await writer.drain()  # says so where the end was a reset
                await asyncio.sleep(0.05)


async def test_a_body_that_comes_slowly_and_in_time_is_taken(port: int) -> None:
    token = (await sync_to_async(tokens.create)("tests"))[1]
    body = b'{"text": "hello"}'
    async with connected(port) as (reader, writer):
        writer.write(head(token, f"Content-Length: {len(body)}", "Connection: close"))
        for start in range(0, len(body), 5):
            await asyncio.sleep(SECONDS / 10)
            writer.write(body[start : start + 5])
        assert (await read_answer(reader))[0] == 200
    assert (await sync_to_async(rows)())[1] == 1


async def test_the_answer_may_take_longer_than_the_body() -> None:
    async with (
        serving(BodyLimit(_Pausing(before_the_answer=2 * SECONDS), SECONDS)) as port,
        connected(port) as (reader, writer),
    ):
        writer.write(head("x", "Content-Length: 1", "Connection: close") + b"x")
        assert (await read_answer(reader))[0] == 200


async def test_a_quiet_connection_may_be_used_again(port: int) -> None:
    async with connected(port) as (reader, writer):
        for _ in range(2):
            writer.write(head("wrong", "Content-Length: 1") + b"x")
            assert (await read_answer(reader))[0] == 401
            await asyncio.sleep(1.5 * SECONDS)


async def test_an_answer_that_has_begun_is_not_mixed_with_another_one(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with (
        serving(BodyLimit(_Pausing(begins_early=True), SECONDS)) as port,
        connected(port) as (reader, writer),
    ):
        writer.write(HEAD)
        assert (await read_answer(reader))[0] == 200
        assert await reader.read() == b""
    assert not [record for record in caplog.records if record.exc_info]


class _Pausing:
    """An application that takes the whole body and answers 200, unless the client leaves first."""

    def __init__(self, *, before_the_answer: float = 0, begins_early: bool = False) -> None:
        self.before_the_answer = before_the_answer
        self.begins_early = begins_early

    async def __call__(
        self, scope: Scope, receive: ASGIReceiveCallable, send: ASGISendCallable
    ) -> None:
        start: Any = {
            "type": "http.response.start",
            "status": 200,
            "headers": [(b"content-length", b"0")],
        }
        if self.begins_early:
            await send(start)
        event: Any = await receive()
        while event.get("more_body"):
            event = await receive()
        if event["type"] == "http.disconnect":
            return
        try:
            async with asyncio.timeout(self.before_the_answer):
                await receive()
        except TimeoutError:
            await send(start)
            await send({"type": "http.response.body", "body": b"", "more_body": False})
