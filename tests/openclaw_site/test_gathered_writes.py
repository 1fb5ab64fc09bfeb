"""How answers are written: in one piece, but never faster than they are read."""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

from tests.hooks.raw_http import serving
from wake.http_protocol import BoundedHeadProtocol

PART = b"x" * 100_000
PARTS = 400
REQUEST = b"GET / HTTP/1.1\r\nHost: localhost\r\n\r\n"


class Application:
    """Answers with many parts, and counts those that were taken from it."""

    def __init__(self, parts: int, part: bytes) -> None:
        self.parts, self.part = parts, part
        self.taken = 0

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        length = str(self.parts * len(self.part)).encode()
        headers = [(b"content-length", length)]
        await send({"type": "http.response.start", "status": 200, "headers": headers})
        for number in range(self.parts):
            more = number < self.parts - 1
            await send({"type": "http.response.body", "body": self.part, "more_body": more})
            self.taken += 1


async def test_head_and_body_are_written_together() -> None:
    async with serving(Application(1, b"done"), BoundedHeadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            for _ in range(20):
                writer.write(REQUEST)
                answer = await asyncio.wait_for(reader.read(65_536), 5)
                assert answer.startswith(b"HTTP/1.1 200 OK\r\n")
                assert answer.endswith(b"\r\n\r\ndone")


async def test_an_answer_that_nobody_reads_is_not_taken_whole() -> None:
    application = Application(PARTS, PART)
    async with serving(application, BoundedHeadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
        with contextlib.closing(writer):
            writer.write(REQUEST)
            await asyncio.sleep(1)
            assert 0 < application.taken < PARTS / 2
            await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
            whole = await asyncio.wait_for(reader.readexactly(PARTS * len(PART)), 20)
    assert whole == PART * PARTS


async def test_a_client_that_leaves_is_no_error(caplog: Any) -> None:
    async with serving(Application(1, b"done"), BoundedHeadProtocol) as port:
        for _ in range(50):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(REQUEST)
            writer.transport.abort()
        await asyncio.sleep(0.3)
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
