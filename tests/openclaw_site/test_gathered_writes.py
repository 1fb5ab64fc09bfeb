"""How answers are written: in one piece, but never faster than they are read."""

from __future__ import annotations

import asyncio
import contextlib
import re
from typing import Any

import pytest

from tests.hooks.raw_http import serving
from wake.http_protocol import WHOLE_ANSWER, BoundedHeadProtocol, header_lines

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


class Whole:
    """Answers `/whole…` whole where that is possible, all else as ASGI has it; with the path."""

    def __init__(self) -> None:
        self.whole: list[bool] = []

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = scope["path"].encode()[-6:]
        headers = [(b"x-one", b"1"), (b"content-length", b"%d" % len(body))]
        if scope["path"].startswith("/whole"):
            write = scope["extensions"][WHOLE_ANSWER]["write"]
            self.whole.append(write(scope, 202, header_lines(headers), body))
            if self.whole[-1]:
                return
        await send({"type": "http.response.start", "status": 202, "headers": headers})
        await send({"type": "http.response.body", "body": body})


def get(path: str, *lines: str, version: str = "1.1") -> bytes:
    return "\r\n".join([f"GET {path} HTTP/{version}", "Host: localhost", *lines, "", ""]).encode()


async def test_an_answer_that_is_written_whole_is_the_same() -> None:
    application = Whole()
    answers = []
    async with serving(application, BoundedHeadProtocol, access_log=False) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            for path in ["/other1", "/whole1"] * 10:
                writer.write(get(path))
                answer = await asyncio.wait_for(reader.readuntil(path[-6:].encode()), 5)
                answers.append(re.sub(rb"date: [^\r]+|[a-z]+1$", b"", answer))
    assert application.whole == [True] * 10
    assert len(set(answers)) == 1
    assert b"x-one: 1\r\n" in answers[0]


async def test_requests_that_come_together_are_answered_in_their_order() -> None:
    application = Whole()
    paths = [f"/whole{number}" for number in range(8)]
    async with serving(application, BoundedHeadProtocol, access_log=False) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            writer.write(b"".join(map(get, paths)))
            whole = await asyncio.wait_for(reader.readuntil(b"whole7"), 5)
    assert re.findall(r"whole\d", whole.decode()) == [path[1:] for path in paths]
    assert whole.count(b"HTTP/1.1 202") == len(paths)


@pytest.mark.parametrize(
    "request_", [get("/whole1", "Connection: close"), get("/whole1", version="1.0")]
)
async def test_a_connection_that_does_not_stay_is_told_so_and_closed(request_: bytes) -> None:
    application = Whole()
    async with serving(application, BoundedHeadProtocol, access_log=False) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            writer.write(request_)
            answer = await asyncio.wait_for(reader.read(), 5)
    assert application.whole == [False]
    assert b"\r\nconnection: close\r\n" in answer
    assert answer.endswith(b"whole1")


async def test_an_answer_that_is_logged_is_sent_as_asgi_has_it() -> None:
    application = Whole()
    async with serving(application, BoundedHeadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            writer.write(get("/whole1"))
            await asyncio.wait_for(reader.readuntil(b"whole1"), 5)
    assert application.whole == [False]
