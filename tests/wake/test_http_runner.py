"""The http runner against a real HTTP server."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from hypothesis import example, given
from hypothesis import strategies as st
from standardwebhooks import Webhook, WebhookVerificationError

from tests.wake.agent_server import AgentServer, agent_server, says
from tests.wake.turns import EVENT, RUN_ID, http_turn
from wake.heartbeats.runners import MAX_REPLY_BYTES, Delivered, Failed, Outcome
from wake.heartbeats.runners.http import MAX_BODY_BYTES, HttpRunner, reply_in
from wake.heartbeats.runners.http_client import parse_retry_after
from wake.signing import new_signing_secret, signing_key

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
SECRET = new_signing_secret()


@pytest.fixture
def server() -> Iterator[AgentServer]:
    with agent_server("/turns") as serving:
        yield serving


async def post(url: str, secret: str = SECRET, prompt: str = "the prompt") -> Outcome:
    runner = HttpRunner()
    try:
        return await runner.run(http_turn(url, secret, prompt=prompt))
    finally:
        await runner.close()


async def test_the_turn_is_posted_as_json(server: AgentServer) -> None:
    assert await post(server.url, prompt="größer") == Delivered("")
    [request] = server.requests
    assert request.path == "/turns"
    assert request.headers["content-type"] == "application/json"
    assert json.loads(request.body) == {
        "runId": str(RUN_ID),
        "agentId": "main",
        "sessionKey": "agent:main:discord:channel:123",
        "reason": "wake",
        "attempt": 2,
        "prompt": "größer",
        "events": [
            {
                "id": str(EVENT.event_id),
                "text": EVENT.text,
                "source": "hook:ci",
                "external": True,
                "at": "2026-11-22T12:30:00Z",
            }
        ],
    }


async def test_the_bytes_sent_are_signed_per_standard_webhooks(server: AgentServer) -> None:
    await post(server.url)
    [request] = server.requests
    assert request.headers["webhook-id"] == str(RUN_ID)
    assert abs(int(request.headers["webhook-timestamp"]) - time.time()) < 5
    Webhook(SECRET).verify(request.body, request.headers)
    for body, secret in ((request.body + b" ", SECRET), (request.body, new_signing_secret())):
        with pytest.raises(WebhookVerificationError):
            Webhook(secret).verify(body, request.headers)


@pytest.mark.parametrize("secret", ["", "whsec_", "whsec_short", "not a secret", "whsec_ä"])
async def test_without_a_usable_secret_nothing_is_sent(server: AgentServer, secret: str) -> None:
    outcome = await post(server.url, secret)
    assert isinstance(outcome, Failed)
    assert "signing secret" in outcome.error
    assert not outcome.permanent
    assert server.requests == []


@pytest.mark.parametrize(
    ("body", "reply"),
    [
        (b'{"reply": "All is well."}', "All is well."),
        ('{"reply": "größer", "more": [1, {}]}'.encode(), "größer"),
        (b'{"reply": ""}', ""),
        (b'{"reply": null}', ""),
        (b'{"reply": {"text": "no"}}', ""),
        (b'{"answer": "x"}', ""),
        (b'["reply"]', ""),
        (b'{"reply": "cut off', ""),
        (b'{"reply": "\xff"}', ""),
        (b"<html>ok</html>", ""),
        (b"", ""),
        (b'{"reply": "a\\u0000b"}', "a\N{REPLACEMENT CHARACTER}b"),
    ],
)
@pytest.mark.parametrize("status", [200, 202])
async def test_2xx_is_delivered_and_its_reply_kept(
    server: AgentServer, status: int, body: bytes, reply: str
) -> None:
    server.answer = says(status, body)
    assert await post(server.url) == Delivered(reply)


async def test_204_is_delivered(server: AgentServer) -> None:
    server.answer = says(204)
    assert await post(server.url) == Delivered("")


async def test_a_long_reply_is_cut(server: AgentServer) -> None:
    server.answer = says(200, json.dumps({"reply": "é" * MAX_REPLY_BYTES}).encode())
    assert len(json.dumps("é" * MAX_REPLY_BYTES)) < MAX_BODY_BYTES
    assert await post(server.url) == Delivered("é" * (MAX_REPLY_BYTES // 2))


@pytest.mark.parametrize("status", [200, 500])
async def test_an_endless_answer_is_read_no_further_than_its_limit(
    server: AgentServer, status: int
) -> None:
    written = 0

    def endless(request: BaseHTTPRequestHandler) -> None:
        nonlocal written
        request.send_response(status)
        request.end_headers()
        request.close_connection = True
        with suppress(OSError):
            while True:
                request.wfile.write(b"x" * 65536)
                written += 65536
        server.disconnected.set()

    server.answer = endless
    outcome = await asyncio.wait_for(post(server.url), 10)
    assert isinstance(outcome, Delivered if status == 200 else Failed)
    assert len(getattr(outcome, "error", "")) < 2000
    assert server.disconnected.wait(10)
    # What the kernel holds on its way comes on top.
    assert written < MAX_BODY_BYTES + 16 * 1024 * 1024


@pytest.mark.parametrize("status", [400, 401, 403, 404, 405, 409, 410, 413, 422, 451])
async def test_4xx_is_permanent(server: AgentServer, status: int) -> None:
    server.answer = says(status, b'{"error":\n  "no such\x00 session"}', retry_after="5")
    outcome = await post(server.url)
    assert isinstance(outcome, Failed)
    assert outcome.permanent
    assert outcome.error == f'{server.url} answered {status}: {{"error": "no such session"}}'


@pytest.mark.parametrize("status", [408, 425, 429, 500, 502, 503, 504, 599])
async def test_the_rest_can_be_tried_again(server: AgentServer, status: int) -> None:
    server.answer = says(status, b"")
    assert await post(server.url) == Failed(f"{server.url} answered {status}")
    server.answer = says(status, b"later", retry_after="120")
    assert await post(server.url) == Failed(
        f"{server.url} answered {status}: later", retry_after=timedelta(seconds=120)
    )


async def test_redirects_are_not_followed_and_can_be_tried_again(server: AgentServer) -> None:
    for status in (301, 302, 303, 307, 308):
        server.answer = says(status, b"moved", location=server.url + "/elsewhere")
        assert await post(server.url) == Failed(
            f"{server.url} answered {status}: redirects are not followed"
        )
    assert {request.path for request in server.requests} == {"/turns"}


async def test_an_answer_that_breaks_off_is_no_delivery(server: AgentServer) -> None:
    def breaks_off(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Length", "1000")
        request.end_headers()
        request.wfile.write(b'{"reply":')
        request.close_connection = True

    server.answer = breaks_off
    outcome = await post(server.url)
    assert isinstance(outcome, Failed)
    assert not outcome.permanent
    assert outcome.error.startswith(f"could not reach {server.url}: ClientPayloadError: ")


@pytest.mark.parametrize(
    "said",
    [
        b"SSH-2.0-OpenSSH_9.2\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nno colon\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nContent-Length: many\r\n\r\n",
        b"HTTP/1.1 200 OK\r\nX: " + b"x" * 100_000 + b"\r\n\r\n",
        b"",
    ],
)
async def test_what_is_no_answer_is_told_without_what_is_in_the_url(
    server: AgentServer, said: bytes
) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        request.wfile.write(said)
        request.close_connection = True

    server.answer = answer
    outcome = await post(server.url.replace("//", "//user:pass-word@") + "?key=hidden")
    assert isinstance(outcome, Failed)
    assert not outcome.permanent
    assert outcome.error.startswith(f"could not reach {server.url}: ")
    assert "pass-word" not in outcome.error
    assert "hidden" not in outcome.error
    assert len(outcome.error) < 300


async def test_a_server_without_tls_is_no_answer(server: AgentServer) -> None:
    outcome = await post(server.url.replace("http:", "https:"))
    assert isinstance(outcome, Failed)
    assert "cannot connect: " in outcome.error


async def test_an_agent_that_is_away_is_named_without_its_credentials() -> None:
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as listening:
        port = listening.server_port
    outcome = await post(f"http://user:pass-word@127.0.0.1:{port}/turns?key=hidden#part")
    assert isinstance(outcome, Failed)
    assert not outcome.permanent
    assert outcome.error.startswith(
        f"could not reach http://127.0.0.1:{port}/turns: cannot connect: "
    )
    assert "pass-word" not in outcome.error
    assert "hidden" not in outcome.error


@pytest.mark.parametrize(
    "url",
    [
        "",
        "http://",
        "http://[::1",
        "http://h:port/",
        "ftp://h/?key=hidden",
        "http://h\0/",
        "x" * 70_000,
    ],
)
async def test_a_url_that_is_none_is_a_failure(url: str) -> None:
    outcome = await post(url)
    assert isinstance(outcome, Failed)
    assert "hidden" not in outcome.error


async def test_credentials_in_the_url_are_sent_and_never_shown(server: AgentServer) -> None:
    server.answer = says(500, b"broken")
    outcome = await post(server.url.replace("//", "//user:pass-word@"))
    assert server.requests[0].headers["authorization"].startswith("Basic ")
    assert outcome == Failed(f"{server.url} answered 500: broken")


async def test_turns_share_no_cookies(server: AgentServer) -> None:
    server.answer = says(200, set_cookie="session=1; Path=/")
    runner = HttpRunner()
    await runner.run(http_turn(server.url, SECRET))
    await runner.run(http_turn(server.url, SECRET))
    await runner.close()
    assert len(server.requests) == 2
    assert all("cookie" not in request.headers for request in server.requests)


async def test_an_agent_on_this_machine_is_reached_past_the_proxy(
    server: AgentServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    monkeypatch.setenv("HTTP_PROXY", "http://127.0.0.1:1")
    assert await post(server.url) == Delivered("")
    assert await post(server.url.replace("127.0.0.1", "localhost")) == Delivered("")

    monkeypatch.setenv("HTTP_PROXY", server.url)
    assert await post("http://agent.example/turns") == Delivered("")
    assert server.requests[-1].path == "http://agent.example/turns"


async def test_a_cancelled_run_lets_go_of_the_connection(server: AgentServer) -> None:
    waiting = threading.Event()

    def never_answers(request: BaseHTTPRequestHandler) -> None:
        waiting.set()
        request.close_connection = True
        if request.rfile.read(1) == b"":  # the other side closed
            server.disconnected.set()

    server.answer = never_answers
    task = asyncio.create_task(post(server.url))
    assert await asyncio.to_thread(waiting.wait, 10)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.disconnected.wait, 10)


async def test_one_runner_serves_many_runs_at_once(server: AgentServer) -> None:
    together = threading.Barrier(30)

    def answer(request: BaseHTTPRequestHandler) -> None:
        together.wait(10)
        says(200, b'{"reply": "done"}')(request)

    server.answer = answer
    runner = HttpRunner()
    outcomes = await asyncio.gather(*(runner.run(http_turn(server.url, SECRET)) for _ in range(30)))
    await runner.close()
    assert outcomes == [Delivered("done")] * 30


@pytest.mark.parametrize(
    ("value", "seconds"),
    [
        ("0", None),
        ("1", 1),
        (" 120 ", 120),
        ("-5", None),
        ("1.5", None),
        ("٣", None),
        ("soon", None),
        ("", None),
        (None, None),
        ("9" * 5000, None),
        (format_datetime(NOW + timedelta(seconds=90), usegmt=True), 90),
        (format_datetime(NOW - timedelta(seconds=90), usegmt=True), None),
        ("Sun, 22 Nov 2026 12:01:30 -0000", 90),
        ("Sun, 22 Nov 2026 13:01:30 +0100", 90),
    ],
)
def test_retry_after_is_seconds_or_a_date_and_nothing_else(
    value: str | None, seconds: int | None
) -> None:
    expected = timedelta(seconds=seconds) if seconds is not None else None
    assert parse_retry_after(value, NOW) == expected


@given(st.one_of(st.text(), st.from_regex(r"[A-Z][a-z]{2}, \d+ [A-Z][a-z]{2} \d+ \d+:\d+:\d+ .*")))
@example("Fri, 31 Dec 9999 23:59:59 -2359")
@example("Mon, 01 Jan 0001 00:00:00 +2359")
def test_no_retry_after_raises_or_lies_in_the_past(value: str) -> None:
    wait = parse_retry_after(value, NOW)
    assert wait is None or wait > timedelta(0)


@given(st.binary())
@example(b"[" * 100_000)
@example(b'{"a":' * 100_000)
@example(b'{"reply": "\\ud800"}')
def test_no_body_raises(body: bytes) -> None:
    reply_in(body).encode()


def test_new_signing_secrets_are_long_and_differ() -> None:
    keys = {signing_key(new_signing_secret()) for _ in range(100)}
    assert len(keys) == 100
    assert {len(key) for key in keys} == {32}
