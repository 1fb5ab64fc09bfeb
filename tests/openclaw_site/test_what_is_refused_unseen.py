"""What the server refuses before any view has looked at it."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.test import Client

from tests.hooks.raw_http import serving
from tests.live import ROOT, LiveGateway
from wake.http_protocol import BoundedHeadProtocol


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    with LiveGateway(tmp_path_factory.mktemp("gateway")) as gateway:
        yield gateway


def test_headers_without_an_end_are_cut_off(gateway: LiveGateway) -> None:
    with socket.create_connection(("127.0.0.1", gateway.port), timeout=10) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: localhost\r\nX-A: ")
        sent = 0
        with contextlib.suppress(OSError):  # reset or broken pipe, as it comes
            while sent < 50_000_000:
                sent += connection.send(b"a" * 16_384)
                time.sleep(0.001)
    assert sent < 10_000_000


def test_a_request_after_another_one_has_a_head_of_its_own(gateway: LiveGateway) -> None:
    with httpx.Client() as client:
        for _ in range(5):
            answer = client.get(f"{gateway.url}/nothing", headers={"X-A": "a" * 40_000})
            assert answer.status_code == 404


def test_a_body_for_a_page_that_takes_none_is_not_stored(gateway: LiveGateway) -> None:
    received = 0

    def chunks() -> Iterator[bytes]:
        nonlocal received
        for _ in range(640):
            received += 65_536
            yield b"x" * 65_536

    before = _bytes_written(gateway)
    httpx.post(f"{gateway.url}/nothing", content=chunks(), timeout=30)
    assert received > 40_000_000
    assert _bytes_written(gateway) - before < 10_000_000


def _bytes_written(gateway: LiveGateway) -> int:
    assert gateway.process
    counters = Path(f"/proc/{gateway.process.pid}/io").read_text().splitlines()
    return int(next(line.split()[1] for line in counters if line.startswith("wchar")))


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("path", "cookie"),
    [("/admin/login/", '"\\000aaaaaaaaaaaa"'), ("/admin/login/?next=%00", ""), ("/a%00b", "")],
)
def test_a_nul_is_a_bad_request(client: Client, path: str, cookie: str) -> None:
    answer = client.get(path, headers={"Cookie": f"sessionid={cookie}"} if cookie else {})
    assert (answer.status_code, answer.content) == (400, b"a NUL character is not allowed\n")


def test_a_port_that_is_none_is_refused() -> None:
    refused = subprocess.run(
        [sys.executable, ROOT / "manage.py", "gateway", "--port", "99999"],
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert refused.stderr == "CommandError: --port takes a number from 0 to 65535, not 99999\n"


def test_the_database_file_is_its_owners_alone(gateway: LiveGateway) -> None:
    files = list(gateway.directory.glob("live.sqlite3*"))
    assert all(file.stat().st_mode & 0o077 == 0 for file in files if file.suffix != ".lock")


@pytest.mark.parametrize("closed", ["1>&-", "> /dev/full"])
def test_a_stored_event_is_a_success_even_if_nobody_reads_the_receipt(
    gateway: LiveGateway, closed: str
) -> None:
    command = f'"{sys.executable}" "{ROOT}/manage.py" system_event stored --session-key x {closed}'
    done = subprocess.run(
        ["/bin/sh", "-c", command], env=gateway.environment, capture_output=True, text=True
    )
    assert (done.returncode, done.stderr) == (0, "")


@pytest.mark.django_db
def test_more_parameters_than_a_url_may_have_and_a_nul_end_in_no_traceback(
    client: Client, caplog: pytest.LogCaptureFixture
) -> None:
    query = "&".join([*(f"a{number}=1" for number in range(1100)), "b=%00"])
    assert client.post(f"/hooks/wake?{query}").status_code == 400
    assert "Traceback" not in caplog.text


def request_bytes(*lines: str) -> bytes:
    return "\r\n".join([*lines, "", ""]).encode()


def long_head(size: int) -> bytes:
    """Return a head of so many bytes."""
    head = request_bytes("GET / HTTP/1.1", "Host: x", "X-Long: ")
    return head.replace(b"X-Long: ", b"X-Long: " + b"x" * (size - len(head)))


@pytest.mark.parametrize("splits", [[], [100], [100, 40_000], [40_000]], ids=str)
@pytest.mark.parametrize(("size", "status"), [(60_000, b"204"), (70_000, b"400")])
async def test_a_head_may_take_64_kib_however_it_comes(
    splits: list[int], size: int, status: bytes
) -> None:
    head = long_head(size)
    async with serving(answered, http=BoundedHeadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            for start, end in itertools.pairwise([0, *splits, size]):
                writer.write(head[start:end])
                await asyncio.sleep(0.02)
            answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
    assert answer.split()[1] == status


async def test_a_head_that_does_not_end_is_refused_before_long() -> None:
    async with serving(answered, http=BoundedHeadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            writer.write(b"GET / HTTP/1.1\r\nHost: x\r\n")
            sent = 0
            while not reader._buffer and sent < 2_000_000:  # type: ignore[attr-defined]
                writer.write(b"X-Long: " + b"x" * 1000 + b"\r\n")
                sent += 1010
                await asyncio.sleep(0)
            assert (await asyncio.wait_for(reader.read(12), 5)) == b"HTTP/1.1 400"
    assert sent < 1_000_000


@pytest.mark.parametrize("count", [1, 40], ids=["a large body", "many requests"])
async def test_what_comes_after_a_head_is_not_counted_with_it(count: int) -> None:
    body = b"x" * (100_000 // count)
    one = request_bytes("POST / HTTP/1.1", "Host: x", f"Content-Length: {len(body)}") + body
    sent = one * count
    async with serving(answered, http=BoundedHeadProtocol) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            for part in (sent[:30], sent[30:]):
                writer.write(part)
                await asyncio.sleep(0.05)
            for _ in range(count):
                answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 5)
                assert answer.startswith(b"HTTP/1.1 204")


class Impatient(BoundedHeadProtocol):
    head_seconds = 0.3


async def answered(scope: Any, receive: Any, send: Any) -> None:
    """The smallest application there is."""
    await send({"type": "http.response.start", "status": 204, "headers": []})
    await send({"type": "http.response.body", "body": b""})


async def heard(port: int, sent: bytes, seconds: float = 2) -> bytes:
    """Return all that comes until the connection is closed; b"open" where it is not."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port)
    with contextlib.closing(writer):
        writer.write(sent)
        try:
            return await asyncio.wait_for(reader.read(), seconds)
        except TimeoutError:
            return b"open"


@pytest.mark.parametrize("sent", [b"", b"GET", b"GET / HTTP/1.1\r\nHost: x\r\n"])
async def test_a_head_that_does_not_come_in_time_ends_the_connection(sent: bytes) -> None:
    async with serving(answered, http=Impatient) as port:
        assert await heard(port, sent) == b""


async def test_a_connection_whose_head_came_is_left_alone() -> None:
    async with serving(answered, http=Impatient) as port:
        get = request_bytes("GET / HTTP/1.1", "Host: x")
        assert await heard(port, get, 1) == b"open"


class Forgetful(BoundedHeadProtocol):
    """Closes a connection that has been idle for a moment."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.timeout_keep_alive = 0.7  # type: ignore[assignment] # uvicorn takes whole seconds


async def test_a_connection_is_closed_when_it_has_been_idle_since_its_last_answer() -> None:
    get = request_bytes("GET / HTTP/1.1", "Host: x")
    async with serving(answered, http=Forgetful) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            for _ in range(4):
                writer.write(get)
                assert (await reader.readuntil(b"\r\n\r\n")).startswith(b"HTTP/1.1 204")
                await asyncio.sleep(0.25)
            assert await asyncio.wait_for(reader.read(), 2) == b""


async def test_a_connection_with_a_request_under_way_is_not_idle() -> None:
    async def slow(scope: Any, receive: Any, send: Any) -> None:
        if scope["path"] == "/slow":
            await asyncio.sleep(1)
        await answered(scope, receive, send)

    async with serving(slow, http=Forgetful) as port:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        with contextlib.closing(writer):
            for path in ("/", "/slow", "/"):
                writer.write(request_bytes(f"GET {path} HTTP/1.1", "Host: x"))
                answer = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 3)
                assert answer.startswith(b"HTTP/1.1 204")
            assert await asyncio.wait_for(reader.read(), 2) == b""


async def test_only_get_becomes_a_websocket() -> None:
    upgrade = ("Host: x", "Upgrade: websocket", "Connection: Upgrade", "Content-Length: 2")
    async with serving(answered, http=BoundedHeadProtocol) as port:
        answer = await heard(port, request_bytes("POST / HTTP/1.1", *upgrade) + b"{}")
    assert answer.startswith(b"HTTP/1.1 400")
