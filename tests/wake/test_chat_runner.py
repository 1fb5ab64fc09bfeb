"""The chat runner against a real HTTP server that stands in for a chat server."""

from __future__ import annotations

import asyncio
import json
import logging
import threading
import time
from collections.abc import Iterator
from contextlib import suppress
from datetime import timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pytest_django import Settings

from tests.wake.chat_server import (
    DONE,
    Answer,
    ChatServer,
    chat_server,
    chunk,
    event,
    says,
    stream,
    streams,
    whole,
)
from tests.wake.turns import chat_turn
from wake.heartbeats.runners import MAX_REPLY_BYTES, Delivered, Exchange, Failed, Outcome
from wake.heartbeats.runners.chat import (
    MAX_ERROR_BODY_BYTES,
    MAX_HELD_BYTES,
    ChatError,
    ChatRunner,
    ReplyParts,
    completions_url,
    refusal_in,
)
from wake.heartbeats.runners.event_stream import EventStream

UNREADABLE = "\N{REPLACEMENT CHARACTER}"
KEY = "sk-local-0123456789"
TRANSCRIPT = tuple(Exchange(f"asked {number}", f"said {number}") for number in range(5))
TOO_LONG = {
    "error": {
        "message": "This model's maximum context length is 4096 tokens.",
        "type": "invalid_request_error",
        "param": "messages",
        "code": "context_length_exceeded",
    }
}


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as server:
        yield server


@pytest.fixture
def key(monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of the variable that holds the key."""
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    return "OPENAI_API_KEY"


async def ask(url: str, **turn: Any) -> Outcome:
    runner = ChatRunner()
    try:
        return await asyncio.wait_for(runner.run(chat_turn(url, **turn)), 20)
    finally:
        await runner.close()


async def answered(server: ChatServer, answer: Answer, **turn: Any) -> Outcome:
    server.answers = [answer]
    return await ask(server.url, **turn)


# --- What is sent -------------------------------------------------------------------------------


async def test_the_earlier_turns_and_the_prompt_are_sent(server: ChatServer) -> None:
    await answered(server, says(whole("fine")), prompt="größer", transcript=TRANSCRIPT[:2])
    [request] = server.requests
    assert request.path == "/v1/chat/completions"
    assert request.headers["content-type"] == "application/json"
    assert "authorization" not in request.headers
    assert request.body == {
        "model": "llama3.2",
        "stream": True,
        "messages": [
            {"role": "user", "content": "asked 0"},
            {"role": "assistant", "content": "said 0"},
            {"role": "user", "content": "asked 1"},
            {"role": "assistant", "content": "said 1"},
            {"role": "user", "content": "größer"},
        ],
    }


@pytest.mark.parametrize(
    ("url", "expected"),
    [
        ("http://h:1/v1", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/chat/completions", "http://h:1/v1/chat/completions"),
        ("http://h:1/v1/chat/completions/", "http://h:1/v1/chat/completions"),
        ("https://h", "https://h/chat/completions"),
        ("https://h/a?api-version=1#b", "https://h/a/chat/completions?api-version=1"),
        ("https://user:word@h/v1", "https://user:word@h/v1/chat/completions"),
    ],
)
def test_the_url_is_the_base_or_the_whole_one(url: str, expected: str) -> None:
    assert completions_url(url) == expected


@pytest.mark.parametrize(
    "url", ["", "http://", "http://[::1", "http://h:port/", "ws://h/", "http://h\0/", "x" * 70_000]
)
async def test_a_url_that_is_none_is_a_failure(url: str) -> None:
    outcome = await ask(url)
    assert isinstance(outcome, Failed)
    assert not outcome.permanent


# --- The key ------------------------------------------------------------------------------------


@pytest.mark.parametrize("credentials", ["", "user:word@"])
async def test_the_key_is_sent_and_goes_before_what_the_url_holds(
    server: ChatServer, key: str, credentials: str
) -> None:
    server.answers = [says(whole("fine"))]
    url = server.url.replace("//", f"//{credentials}")
    assert await ask(url, key_variable=key) == Delivered("fine")
    assert server.requests[0].headers["authorization"] == f"Bearer {KEY}"


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("OPENAI_API_KEY", None, "the environment variable OPENAI_API_KEY is not set or empty"),
        ("OPENAI_API_KEY", " ", "the environment variable OPENAI_API_KEY is not set or empty"),
        ("OPENAI_API_KEY", "a\nb", "the environment variable OPENAI_API_KEY does not hold a key"),
        ("OPENAI_API_KEY", "schlüssel", "the environment variable OPENAI_API_KEY does not hold"),
        ("SECRET_KEY", "secret", "SECRET_KEY is not in the setting AGENT_KEY_VARIABLES"),
    ],
)
async def test_without_the_key_that_it_names_nothing_is_sent(
    server: ChatServer,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    value: str | None,
    reason: str,
) -> None:
    monkeypatch.delenv(variable, raising=False)
    if value is not None:
        monkeypatch.setenv(variable, value)
    outcome = await answered(server, says(whole("fine")), key_variable=variable)
    assert isinstance(outcome, Failed)
    assert outcome.error.startswith(f"nothing was sent: {reason}")
    assert not outcome.permanent
    assert server.requests == []


async def test_a_variable_that_is_allowed_no_more_is_not_used(
    server: ChatServer, key: str, settings: Settings
) -> None:
    settings.AGENT_KEY_VARIABLES = []
    assert isinstance(await answered(server, says(whole("fine")), key_variable=key), Failed)
    assert server.requests == []


@pytest.mark.parametrize(
    "answer",
    [
        says({"error": {"message": f"Incorrect API key provided: {KEY}."}}, 401),
        says(f"<p>no such key: {KEY}".encode(), 403, "text/html"),
        says(("x" * 990 + KEY).encode(), 500),
        says(b" " * (MAX_ERROR_BODY_BYTES - 10) + KEY.encode(), 500),
        says({"error": KEY}),
        streams([event({"error": {"message": "no", "key": KEY}})]),
        streams([event({"error": {"key": KEY}})]),
    ],
)
async def test_the_key_is_in_no_error_and_no_log(
    server: ChatServer, key: str, answer: Answer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    outcome = await answered(server, answer, key_variable=key)
    assert isinstance(outcome, Failed)
    assert not outcome.permanent
    for start in range(len(KEY) - 8):
        assert KEY[start : start + 8] not in outcome.error
    assert KEY not in caplog.text
    assert "the prompt" not in caplog.text


# --- Replies ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("answer", "reply"),
    [
        (whole("All is größer."), "All is größer."),
        (whole("thought", reasoning_content="hm", tool_calls=[{"id": "1"}]), "thought"),
        (whole("cut by the server", "length"), "cut by the server"),
        (whole("no reason", None), "no reason"),
        (whole(None, "tool_calls", tool_calls=[{"id": "1"}]), ""),
        (whole(None, reasoning="hm"), ""),
        (whole(""), ""),
        (whole("a\0b"), f"a{UNREADABLE}b"),
        (whole([{"type": "text", "text": "a"}, {"type": "thinking"}, {"text": "b"}]), "ab"),  # type: ignore[arg-type]
        ({"choices": [{"message": {"content": "least"}}]}, "least"),
        ({"choices": [{"index": 1, "message": {"content": "x"}}, *whole("y")["choices"]]}, "y"),
    ],
)
async def test_a_server_that_does_not_stream(
    server: ChatServer, answer: dict[str, Any], reply: str
) -> None:
    assert await answered(server, says(answer)) == Delivered(reply)


@pytest.mark.parametrize(
    ("pieces", "reply"),
    [
        (stream("All ", "is ", "größer."), "All is größer."),
        (stream(), ""),
        # Ollama, before and after it wrote null.
        ([chunk("Hi", "", role="assistant"), chunk("", "stop"), DONE], "Hi"),
        ([chunk("Hi", role="assistant"), chunk(" there", "stop"), DONE], "Hi there"),
        # vLLM, and models that think.
        ([chunk(reasoning_content="hm"), chunk(reasoning="hm"), *stream("So.")], "So."),
        ([chunk(reasoning="hm", finish_reason="stop"), *stream("So.")], "So."),
        # Some end without a reason, and some without the end.
        ([chunk("Hi"), DONE], "Hi"),
        ([chunk("Hi"), chunk(finish_reason="stop")], "Hi"),
        # Azure begins with its filters; some end with null for no choices.
        ([event({"choices": [], "prompt_filter_results": []}), *stream("Hi")], "Hi"),
        ([chunk("Hi", "stop"), event({"choices": None}), DONE], "Hi"),
        ([event({"choices": [{"delta": None}]}), event({}), *stream("Hi")], "Hi"),
        ([b": keep-alive\r\n\r\n", b"event: message\r\n", *stream("Hi")], "Hi"),
        ([b'data: {"choices":\ndata: [{"delta": {"content": "Hi"}}]}\n\n', DONE], "Hi"),
        (
            [b'data: {"choices": [{"delta": {"content": "\xff"}}]}\n\n', DONE],
            UNREADABLE,
        ),
        (
            [chunk("\ud83d"), chunk("\ude00 "), chunk("\ud83d"), DONE],
            "😀 \N{REPLACEMENT CHARACTER}",
        ),
        ([*stream("Hi"), b"data: what comes after\n\n"], "Hi"),
        ([b"".join(stream("Hi", " there")), chunk("!"), DONE], "Hi there"),
    ],
)
async def test_a_server_that_streams(server: ChatServer, pieces: list[bytes], reply: str) -> None:
    assert await answered(server, streams(pieces)) == Delivered(reply)


@given(st.lists(st.text(max_size=5), max_size=5), st.data())
def test_it_does_not_matter_where_a_stream_is_cut(words: list[str], data: st.DataObject) -> None:
    written = b"".join(stream(*words))
    size = data.draw(st.integers(1, 20))
    events, reply = EventStream(MAX_HELD_BYTES), ReplyParts()
    for start in range(0, len(written), size):
        for read in events.feed(written[start : start + size]):
            reply.add(read)
    assert reply.is_over
    assert reply.text() == "".join(words).replace("\0", UNREADABLE)


async def test_a_stream_that_comes_byte_by_byte(server: ChatServer) -> None:
    written = b"".join(stream("grö", "ßer")).replace(b"\n", b"\r\n")
    bytewise = [bytes([byte]) for byte in written]
    assert await answered(server, streams(bytewise)) == Delivered("größer")


@pytest.mark.parametrize(
    "answer",
    [
        streams([chunk("half"), chunk(" a reply")]),
        streams([chunk("half"), chunk(" a reply")], breaks_off=True),
        streams([chunk("half"), chunk("", "stop")[:-1]]),
        streams([chunk("half"), chunk(" a reply", "abort"), DONE]),
        streams([chunk("half"), chunk(" a reply", "error"), DONE]),
        streams([chunk("half"), b"data: {\n\n", *stream("more")]),
        streams([chunk("half"), event({"choices": "none"}), *stream("more")]),
        streams([chunk("half"), event([]), *stream("more")]),
        streams([chunk("half"), b'{"error": "the model crashed"}\n']),
        streams([chunk("half"), event({"error": {"message": "crashed", "code": 500}}), DONE]),
        streams([DONE]),
        streams([chunk("", role="assistant"), DONE]),
        streams([]),
        streams([b"data: " + b"[" * 100_000 + b"\n\n"]),
        says(json.dumps(whole("half a reply")).encode()[:-9]),
        says(whole("half a reply", "abort")),
        says({"choices": []}),
        says({"choices": [{"message": {"content": {"text": "no"}}}]}),
        says({"reply": "no"}),
        says([]),
        says(b"", 204),
        says(b"[" * 100_000),
        says(b"<html>ok</html>", kind="text/html"),
        says(b"data: [DONE]\n\n", kind="text/plain"),
    ],
)
async def test_half_a_reply_is_none(server: ChatServer, answer: Answer) -> None:
    outcome = await answered(server, answer)
    assert isinstance(outcome, Failed)
    assert not outcome.permanent
    assert "half" not in outcome.error


async def test_a_whole_reply_whose_connection_breaks_is_kept(server: ChatServer) -> None:
    pieces = [chunk("All is well."), chunk(finish_reason="stop")]
    assert await answered(server, streams(pieces, breaks_off=True)) == Delivered("All is well.")


@pytest.mark.parametrize(
    "reply", ["é" * MAX_REPLY_BYTES, "x" * (MAX_REPLY_BYTES + 1), "\0" * MAX_REPLY_BYTES]
)
async def test_a_long_reply_is_cut(server: ChatServer, reply: str) -> None:
    expected = reply.replace("\0", UNREADABLE).encode()[:MAX_REPLY_BYTES]
    kept = Delivered(expected.decode("utf-8", "ignore"))
    assert await answered(server, says(whole(reply))) == kept
    words = [reply[start : start + 10_000] for start in range(0, len(reply), 10_000)]
    assert await answered(server, streams(stream(*words))) == kept


@pytest.mark.parametrize("content", [b"x" * 1000, b""])
@pytest.mark.parametrize("kind", ["text/event-stream", "application/json"])
async def test_an_endless_answer_is_read_no_further_than_its_limit(
    server: ChatServer, kind: str, content: bytes, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("wake.heartbeats.runners.chat.MAX_STREAM_BYTES", 2 * MAX_HELD_BYTES)
    piece = chunk(content.decode(), reasoning="x" * 10_000)
    written = 0

    def endless(request: BaseHTTPRequestHandler) -> None:
        nonlocal written
        request.send_response(200)
        request.send_header("Content-Type", kind)
        request.end_headers()
        request.close_connection = True
        with suppress(OSError):
            while True:
                request.wfile.write(piece * 10)
                written += len(piece) * 10
        server.disconnected.set()

    outcome = await answered(server, endless)
    if content and kind == "text/event-stream":
        assert outcome == Delivered("x" * MAX_REPLY_BYTES)
    else:
        assert isinstance(outcome, Failed)
        assert len(outcome.error) < 200
    assert await asyncio.to_thread(server.disconnected.wait, 10)
    # What the kernel holds on its way comes on top.
    assert written < 2 * MAX_HELD_BYTES + 16 * 1024 * 1024


# --- Errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", [400, 404, 405, 410, 413, 415, 422])
async def test_a_wrong_request_is_permanent_in_the_servers_words(
    server: ChatServer, status: int
) -> None:
    answer = says({"error": {"message": 'model "x"\n not\x00 found', "code": None}}, status)
    assert await answered(server, answer) == Failed(
        f'{server.url}/chat/completions answered {status}: model "x" not found', permanent=True
    )


@pytest.mark.parametrize(
    "status", [401, 402, 403, 408, 409, 425, 429, 500, 502, 503, 504, 529, 599]
)
async def test_the_rest_can_be_tried_again(server: ChatServer, status: int) -> None:
    assert await answered(server, says(b"", status)) == Failed(
        f"{server.url}/chat/completions answered {status}"
    )
    answer = says({"error": {"message": "later"}}, status, retry_after="120")
    assert await answered(server, answer) == Failed(
        f"{server.url}/chat/completions answered {status}: later",
        retry_after=timedelta(seconds=120),
    )


@pytest.mark.parametrize(
    ("body", "said"),
    [
        (b'{"error": {"message": "a"}}', "a"),
        (b'{"error": "a"}', "a"),
        (b'{"object": "error", "message": "a", "code": 40001}', "a"),
        (b'{"detail": [{"msg": "a"}]}', '{"detail": [{"msg": "a"}]}'),
        (b'{"error": {"code": 5}}', '{"code": 5}'),
        (b'["a"]', '["a"]'),
        (b"<p>a", "<p>a"),
        (b'{"error"', '{"error"'),
        (b"\xff", UNREADABLE),
        (b"", ""),
    ],
)
def test_an_error_is_read_in_any_shape(body: bytes, said: str) -> None:
    assert refusal_in(body, 500).said == said


@given(st.binary(), st.sampled_from([400, 500]))
def test_no_error_raises(body: bytes, status: int) -> None:
    assert refusal_in(body, status).status == status


async def test_a_model_without_room_for_a_word_has_not_taken_the_turn(server: ChatServer) -> None:
    outcome = await answered(server, says(whole(None, "length")))
    assert outcome == Failed(
        f"no reply from {server.url}/chat/completions: the model had no room left to say anything"
    )


@given(
    st.recursive(
        st.none() | st.booleans() | st.floats() | st.text(max_size=3),
        lambda inner: (
            st.lists(inner, max_size=3)
            | st.dictionaries(
                st.sampled_from(
                    [
                        "choices",
                        "delta",
                        "message",
                        "content",
                        "index",
                        "error",
                        "code",
                        "finish_reason",
                        "text",
                    ]
                ),
                inner,
                max_size=4,
            )
        ),
        max_leaves=12,
    )
)
def test_no_answer_raises_anything_else(answer: Any) -> None:
    reply = ReplyParts()
    with suppress(ChatError):
        reply.add(json.dumps(answer))
        reply.text().encode()


async def test_a_long_error_is_cut(server: ChatServer) -> None:
    outcome = await answered(server, says(b"x" * 1_000_000, 500))
    assert isinstance(outcome, Failed)
    assert len(outcome.error) < 1200


@pytest.mark.parametrize(
    ("error", "permanent"),
    [
        ({"message": "bad", "type": "BadRequestError", "code": 400}, True),
        ({"message": "bad", "code": 401}, False),
        ({"message": "bad", "code": 429}, False),
        ({"message": "bad", "code": "server_error"}, False),
        ({"message": "bad", "code": 7}, False),
        ({"message": "bad"}, False),
        ("bad", False),
    ],
)
@pytest.mark.parametrize("streamed", [True, False])
async def test_an_error_in_an_answer_with_200(
    server: ChatServer, error: Any, permanent: bool, streamed: bool
) -> None:
    answer = says({"error": error})
    if streamed:
        answer = streams([chunk("half"), event({"error": error}), DONE])
    outcome = await answered(server, answer)
    assert isinstance(outcome, Failed)
    assert outcome.error.endswith(": bad")
    assert outcome.permanent == permanent


async def test_redirects_are_not_followed(server: ChatServer) -> None:
    answer = says(b"moved", 307, location=f"{server.origin}/elsewhere")
    assert await answered(server, answer) == Failed(
        f"{server.url}/chat/completions answered 307: redirects are not followed"
    )
    assert len(server.requests) == 1


async def test_a_server_that_is_away_is_named_without_its_credentials() -> None:
    with chat_server() as server:
        away = server.url.replace("//", "//user:pass-word@")
    outcome = await ask(f"{away}?key=hidden")
    assert isinstance(outcome, Failed)
    assert not outcome.permanent
    assert outcome.error.startswith(
        f"no reply from {server.url}/chat/completions: cannot connect: "
    )
    assert "word" not in outcome.error
    assert "hidden" not in outcome.error


# --- Too long for the model ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal",
    [
        says(TOO_LONG, 400),
        # vLLM, once and now.
        says({"object": "error", "message": "maximum context length is 9", "code": 400}, 400),
        says({"error": {"message": "The decoder prompt (length 9) is longer than the …"}}, 400),
        # llama.cpp, and what builds on it.
        says({"error": {"message": "…", "type": "exceed_context_size_error", "code": 400}}, 400),
        says({"error": {"message": "Context size has been exceeded."}}, 500),
        says({"error": {"message": "prompt is too long: 9 tokens > 8 maximum"}}, 400),
        says(b"", 413),
        streams([event(TOO_LONG), DONE]),
        # Ollama cuts the request and has no room for the reply.
        streams([chunk("", "length", reasoning="hm"), DONE]),
        says(whole("", "length")),
    ],
)
async def test_a_request_that_is_too_long_goes_without_the_older_half(
    server: ChatServer, refusal: Answer
) -> None:
    server.answers = [refusal, refusal, says(whole("fine"))]
    assert await ask(server.url, transcript=TRANSCRIPT) == Delivered("fine")
    assert [request.messages[0][1] for request in server.requests] == [
        "asked 0",
        "asked 3",
        "asked 4",
    ]
    assert {request.messages[-1] for request in server.requests} == {("user", "the prompt")}


async def test_a_prompt_that_is_too_long_by_itself_is_permanent(server: ChatServer) -> None:
    outcome = await answered(server, says(TOO_LONG, 400), transcript=TRANSCRIPT)
    assert isinstance(outcome, Failed)
    assert outcome.permanent
    assert outcome.error.endswith("maximum context length is 4096 tokens.")
    assert [len(request.messages) for request in server.requests] == [11, 5, 3, 1]


@pytest.mark.parametrize("status", [401, 404, 429, 503])
async def test_no_other_error_is_tried_again_within_the_turn(
    server: ChatServer, status: int
) -> None:
    await answered(server, says(TOO_LONG, status), transcript=TRANSCRIPT)
    assert len(server.requests) == 1


# --- Time ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("begins", [False, True])
async def test_a_cancelled_run_lets_go_of_the_connection(server: ChatServer, begins: bool) -> None:
    waiting = threading.Event()

    def hangs(request: BaseHTTPRequestHandler) -> None:
        if begins:
            request.send_response(200)
            request.send_header("Content-Type", "text/event-stream")
            request.end_headers()
            request.wfile.write(chunk("half"))
        waiting.set()
        request.close_connection = True
        if request.rfile.read(1) == b"":  # the other side closed
            server.disconnected.set()

    task = asyncio.create_task(answered(server, hangs))
    assert await asyncio.to_thread(waiting.wait, 10)
    await asyncio.sleep(0.05)
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task
    assert await asyncio.to_thread(server.disconnected.wait, 10)


async def test_one_runner_serves_many_runs_at_once(server: ChatServer) -> None:
    together = threading.Barrier(20)

    def answer(request: BaseHTTPRequestHandler) -> None:
        together.wait(10)
        streams(stream("done"))(request)

    server.answers = [answer]
    runner = ChatRunner()
    outcomes = await asyncio.gather(*(runner.run(chat_turn(server.url)) for _ in range(20)))
    await runner.close()
    assert outcomes == [Delivered("done")] * 20


async def test_a_reply_is_there_as_soon_as_it_is_whole(server: ChatServer) -> None:
    def lingers(request: BaseHTTPRequestHandler) -> None:
        request.send_response(200)
        request.send_header("Content-Type", "text/event-stream")
        request.end_headers()
        request.wfile.write(b"".join(stream("done")))
        request.close_connection = True
        time.sleep(2)

    began = time.monotonic()
    assert await answered(server, lingers) == Delivered("done")
    assert time.monotonic() - began < 1.5
