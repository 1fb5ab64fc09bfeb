"""An agent behind a chat server, with the real heartbeat loop on a real database."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator, Iterator
from datetime import datetime, timedelta
from http.server import BaseHTTPRequestHandler

import pytest
from asgiref.sync import sync_to_async

from tests.wake.chat_server import ChatServer, chat_server, chunk, says, stream, streams, whole
from tests.wake.test_heartbeat_loop import Clock, set_agent, wake
from wake.heartbeats.loop import HeartbeatLoop
from wake.models import EventState, Heartbeat, Session, SystemEvent

pytestmark = pytest.mark.django_db(transaction=True)


@pytest.fixture
def server() -> Iterator[ChatServer]:
    with chat_server() as server:
        yield server


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def loop(server: ChatServer, clock: Clock) -> AsyncIterator[HeartbeatLoop]:
    """A loop whose agent `main` is reached at the server; its clock stands until a test sets it."""
    await sync_to_async(set_agent)(
        runner="chat", url=server.url, model="llama3.2", heartbeat_every=timedelta(0)
    )
    loop = HeartbeatLoop(clock=clock)
    yield loop
    await loop.close()


async def say(loop: HeartbeatLoop, clock: Clock, text: str, key: str = "x") -> None:
    """Wake a session, and run what is due."""
    await sync_to_async(wake)(text, key)
    clock.now = max(clock.now, await due_at(key))
    assert await loop.run_once() == 1


async def due_at(key: str = "x") -> datetime:
    session = await Session.objects.aget(key=f"agent:main:{key}")
    assert session.due_at is not None
    return session.due_at


async def statuses() -> list[tuple[str, str]]:
    return [
        (heartbeat.status, heartbeat.reply) async for heartbeat in Heartbeat.objects.order_by("pk")
    ]


@pytest.mark.parametrize("streamed", [True, False])
async def test_a_turn_holds_what_was_said_before(
    loop: HeartbeatLoop, clock: Clock, server: ChatServer, streamed: bool
) -> None:
    replies = ["I see one.", "HEARTBEAT_OK", "And now three."]
    server.answers = [
        streams(stream(*reply)) if streamed else says(whole(reply)) for reply in replies
    ]
    for text in ("one event", "another event", "a third event"):
        await say(loop, clock, text)
    first, second, third = (request.messages for request in server.requests)
    assert "one event" in first[0][1]
    assert [role for role, _ in third] == ["user", "assistant", "user", "assistant", "user"]
    assert [content for role, content in third if role == "assistant"] == replies[:2]
    assert third[: len(second)] == [*first, second[1], second[2]]
    assert "a third event" in third[-1][1]
    assert [status for status, _ in await statuses()] == ["delivered", "quiet", "delivered"]


async def test_sessions_do_not_hear_each_other(
    loop: HeartbeatLoop, clock: Clock, server: ChatServer
) -> None:
    server.answers = [says(whole("fine"))]
    await say(loop, clock, "for x", "x")
    await say(loop, clock, "for y", "y")
    await say(loop, clock, "for x again", "x")
    assert [len(request.messages) for request in server.requests] == [1, 1, 3]
    assert "for y" not in str(server.requests[2].messages)


async def test_no_more_is_sent_along_than_the_agent_says(
    loop: HeartbeatLoop, clock: Clock, server: ChatServer
) -> None:
    await sync_to_async(set_agent)(transcript_bytes=0)
    server.answers = [says(whole("fine"))]
    await say(loop, clock, "one event")
    await say(loop, clock, "another event")
    assert [len(request.messages) for request in server.requests] == [1, 1]


async def test_errors_are_tried_again_and_are_no_part_of_the_transcript(
    loop: HeartbeatLoop, clock: Clock, server: ChatServer
) -> None:
    server.answers = [
        says({"error": {"message": "overloaded"}}, 500),
        streams([chunk("half a re")], breaks_off=True),
        says({"error": {"message": "slow down"}}, 429, retry_after="120"),
        streams(stream("whole")),
        streams(stream("next")),
    ]
    await say(loop, clock, "one event")
    for expected_wait in (2, 4, 120):
        wait = (await due_at() - clock.now).total_seconds()
        assert expected_wait / 2 <= wait <= expected_wait
        clock.now = await due_at()
        assert await loop.run_once() == 1
    assert wait == 120
    await say(loop, clock, "another event")
    prompts = [request.messages[-1][1] for request in server.requests]
    event = await SystemEvent.objects.order_by("pk").afirst()
    assert event is not None
    assert all(str(event.uid) in prompt for prompt in prompts[:4])
    assert server.requests[4].messages[:2] == [("user", prompts[3]), ("assistant", "whole")]
    assert len(server.requests[4].messages) == 3
    assert [status for status, _ in await statuses()] == ["failed"] * 3 + ["delivered"] * 2
    assert not await SystemEvent.objects.exclude(state=EventState.DELIVERED).aexists()


async def test_a_refused_request_is_a_dead_letter_with_the_servers_words(
    loop: HeartbeatLoop, clock: Clock, server: ChatServer
) -> None:
    server.answers = [says({"error": {"message": 'model "llama3.2" not found'}}, 404)]
    await say(loop, clock, "one event")
    event = await SystemEvent.objects.select_related("heartbeat").aget()
    assert event.state == EventState.DEAD
    assert event.heartbeat is not None
    assert event.heartbeat.error.endswith('answered 404: model "llama3.2" not found')


@pytest.mark.parametrize("begins", [False, True])
async def test_a_hang_ends_at_the_agents_time_limit(
    loop: HeartbeatLoop, clock: Clock, server: ChatServer, begins: bool
) -> None:
    def hangs(request: BaseHTTPRequestHandler) -> None:
        if begins:
            request.send_response(200)
            request.send_header("Content-Type", "text/event-stream")
            request.end_headers()
            request.wfile.write(chunk("half a re"))
        request.close_connection = True
        if request.rfile.read(1) == b"":  # the other side closed
            server.disconnected.set()

    await sync_to_async(set_agent)(timeout_seconds=1)
    server.answers = [hangs, streams(stream("whole"))]
    began = time.monotonic()
    await say(loop, clock, "one event")
    assert 1 <= time.monotonic() - began < 10
    assert server.disconnected.wait(10)
    assert (await Heartbeat.objects.aget()).error == "no answer within 1 s"
    clock.now = await due_at()
    assert await loop.run_once() == 1
    assert await statuses() == [("failed", ""), ("delivered", "whole")]
    assert len(server.requests[1].messages) == 1
