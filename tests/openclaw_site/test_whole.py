"""Requests and answers that are there whole; and no answer is taken faster than it is read."""

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
    assert application.whole == [True]
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


class Later(Whole):
    """Takes requests that are there whole, and answers them later, with the path and the body.

    `/other…` it serves as ASGI has it, after all; `/mine…` it does not take.
    """

    def __init__(self, seconds: float = 0.05) -> None:
        super().__init__()
        self.seconds = seconds
        self.taken: list[tuple[str, bytes]] = []
        self.served: list[tuple[str, bytes]] = []

    def take_whole(self, scope: Any, body: bytes, answer: Any, otherwise: Any) -> bool:
        path = scope["path"]
        if path.startswith("/mine"):
            return False
        self.taken.append((path, body))
        text = path.encode()[-6:] + body
        lines = header_lines([(b"x-one", b"1"), (b"content-length", b"%d" % len(text))])
        loop = asyncio.get_running_loop()
        if path.startswith("/other"):
            loop.call_later(self.seconds, otherwise, self)
        else:
            loop.call_later(self.seconds, answer, 202, lines, text)
        return True

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body, more = b"", True
        while more:
            event = await receive()
            body, more = body + event.get("body", b""), event.get("more_body", False)
        self.served.append((scope["path"], body))
        await super().__call__(scope, receive, send)


def post(path: str, body: bytes, *lines: str, version: str = "1.1") -> bytes:
    head = [f"POST {path} HTTP/{version}", "Host: localhost", f"Content-Length: {len(body)}"]
    return "\r\n".join([*head, *lines, "", ""]).encode() + body


async def test_who_takes_requests_whole_answers_as_asgi_would() -> None:
    application = Later()
    answers = []
    async with serving(application, BoundedHeadProtocol, access_log=False) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            for path in ["/other1", "/mine12", "/taken1"] * 5:
                writer.write(post(path, b""))
                answer = await asyncio.wait_for(reader.readuntil(path[-6:].encode()), 5)
                answers.append(re.sub(rb"date: [^\r]+|[a-z0-9]+$", b"", answer))
    assert application.taken == [("/other1", b""), ("/taken1", b"")] * 5
    assert application.served == [("/other1", b""), ("/mine12", b"")] * 5
    assert len(set(answers)) == 1


async def test_a_request_that_comes_in_parts_is_served_as_asgi_has_it() -> None:
    application = Later()
    async with serving(application, BoundedHeadProtocol, access_log=False) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            writer.write(post("/taken1", b"body")[:-2])
            await asyncio.sleep(0.05)
            writer.write(b"dy")
            await asyncio.wait_for(reader.readuntil(b"taken1"), 5)
    assert (application.taken, application.served) == ([], [("/taken1", b"body")])


async def test_what_is_logged_is_served_as_asgi_has_it() -> None:
    application = Later()
    async with serving(application, BoundedHeadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            writer.write(post("/taken1", b"body"))
            await asyncio.wait_for(reader.readuntil(b"taken1"), 5)
    assert (application.taken, application.served) == ([], [("/taken1", b"body")])


async def test_whoever_takes_what_comes_together_it_is_answered_in_its_order() -> None:
    application = Later()
    paths = [f"/{kind}{number}" for number, kind in enumerate(["taken", "mine1", "other", "whole"])]
    async with serving(application, BoundedHeadProtocol, access_log=False) as port:
        for turn in range(len(paths)):
            paths = [*paths[1:], paths[0]]
            reader, writer = await asyncio.open_connection("127.0.0.1", port)
            with contextlib.closing(writer):
                writer.write(b"".join(post(path, b"") for path in paths))
                found = await asyncio.wait_for(reader.readuntil(paths[-1][-6:].encode()), 5)
            text = found.decode()
            assert re.findall(r"(?:taken|mine1|other|whole)\d", text) == [
                path[1:] for path in paths
            ], turn
            assert text.count("HTTP/1.1 202") == len(paths)


@pytest.mark.parametrize(
    "request_",
    [post("/taken1", b"!", "Connection: close"), post("/taken1", b"!", version="1.0")],
    ids=["close", "1.0"],
)
async def test_who_takes_requests_whole_closes_what_does_not_stay(request_: bytes) -> None:
    application = Later()
    async with serving(application, BoundedHeadProtocol, access_log=False) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            writer.write(request_)
            answer = await asyncio.wait_for(reader.read(), 5)
    assert application.taken
    assert b"\r\nconnection: close\r\n" in answer
    assert answer.endswith(b"taken1!")


async def test_a_server_that_stops_answers_what_was_taken() -> None:
    application = Later(0.5)
    async with serving(application, BoundedHeadProtocol, access_log=False) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        writer.write(post("/taken1", b"!"))
        await asyncio.sleep(0.02)
        assert application.taken
    with contextlib.closing(writer):
        answer = await asyncio.wait_for(reader.read(), 5)
    assert b"\r\nconnection: close\r\n" in answer
    assert answer.endswith(b"taken1!")


async def test_who_reads_no_answers_is_not_asked_for_more() -> None:
    application, body = Later(0), PART
    async with serving(application, BoundedHeadProtocol, access_log=False) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1000)
        with contextlib.closing(writer):

            async def send() -> None:
                for _ in range(PARTS):
                    writer.write(post("/taken1", body))
                    await writer.drain()
                    await asyncio.sleep(0.002)

            sending = asyncio.create_task(send())
            await asyncio.sleep(2)
            assert 0 < len(application.taken) + len(application.served) < PARTS / 2
            for _ in range(PARTS):
                head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
                (length,) = re.findall(rb"content-length: (\d+)", head)
                await asyncio.wait_for(reader.readexactly(int(length)), 5)
            await sending
    assert len(application.taken) + len(application.served) == PARTS


async def test_who_leaves_before_the_answer_is_no_error(caplog: pytest.LogCaptureFixture) -> None:
    application = Later()
    async with serving(application, BoundedHeadProtocol, access_log=False) as port:
        for path in ("/taken1", "/other1") * 10:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(post(path, b"!"))
            await writer.drain()
            await asyncio.sleep(0.01)
            writer.transport.abort()
        await asyncio.sleep(0.3)
    assert len(application.taken) == 20
    assert not [record for record in caplog.records if record.levelname == "ERROR"]
