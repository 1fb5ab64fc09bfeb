"""Replies, posted to a real server that checks them as a receiver would."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import os
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.conf import settings
from django.db import IntegrityError, connection, transaction
from django.utils import timezone
from standardwebhooks import Webhook, WebhookVerificationError
from uuid_utils.compat import uuid7

from tests.live import ROOT
from tests.wake.agent_server import AgentServer, Answer, agent_server, says
from wake import doorbell, pruning
from wake.dispatch import WakeRequest, dispatch
from wake.heartbeats import replies
from wake.heartbeats.loop import HeartbeatLoop
from wake.heartbeats.replies import LEASE, POSTS_AT_ONCE, ReplyPoster, queue_reply, send_again
from wake.models import (
    Agent,
    EventState,
    GatewaySettings,
    Heartbeat,
    HeartbeatStatus,
    ReplyPost,
    ReplyState,
    Session,
    SystemEvent,
)
from wake.signing import new_signing_secret

pytestmark = pytest.mark.django_db(transaction=True)

SECRET = new_signing_secret()
NOON = datetime(2026, 11, 22, 12, tzinfo=UTC)


class Clock:
    def __init__(self, now: datetime = NOON) -> None:
        self.now = now

    def __call__(self) -> datetime:
        return self.now


@pytest.fixture
def receiver(transactional_db: None) -> Iterator[AgentServer]:
    """Where the replies of the agent `main` go."""
    with agent_server("/replies") as server:
        set_agent(reply_url=server.url, signing_secret=SECRET)
        yield server


def set_agent(**fields: Any) -> None:
    GatewaySettings.ensure()
    Agent.objects.filter(pk="main").update(**fields)


def said(reply: str = "All is well.", *, now: datetime = NOON, events: int = 1) -> Heartbeat:
    """Store a run that was delivered and has its reply on the way."""
    session, _ = Session.objects.get_or_create(agent_id="main", key="agent:main:hook:x")
    with transaction.atomic():
        run = Heartbeat.objects.create(
            run_id=uuid7(),
            session=session,
            reason="wake",
            status=HeartbeatStatus.DELIVERED,
            started_at=now,
            finished_at=now,
            prompt="the prompt",
            reply=reply,
        )
        SystemEvent.objects.bulk_create(
            SystemEvent(
                uid=uuid7(),
                session=session,
                text="an event",
                source="cli",
                state=EventState.DELIVERED,
                created_at=now,
                settled_at=now,
                heartbeat=run,
            )
            for _ in range(events)
        )
        queue_reply(run.run_id, now=now)
        doorbell.ring([session.pk])
    return run


async def post_due(clock: Callable[[], datetime]) -> int:
    """Make all attempts that are due; return how many there were."""
    poster = ReplyPoster(clock=clock)
    try:
        return await poster.run_once()
    finally:
        await poster.close()


async def only_post() -> ReplyPost:
    return await ReplyPost.objects.aget()


@contextlib.asynccontextmanager
async def posting(poster: ReplyPoster) -> AsyncIterator[ReplyPoster]:
    task = asyncio.create_task(poster.run())
    try:
        yield poster
    finally:
        poster.stop()
        await asyncio.wait_for(task, 20)


async def until(condition: Callable[[], bool], seconds: float = 20) -> None:
    """Wait for what happens in another task or process."""
    deadline = time.monotonic() + seconds
    while not await sync_to_async(condition)():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def all_sent() -> bool:
    return not ReplyPost.objects.exclude(state=ReplyState.SENT).exists()


def hangs(let_go: threading.Event) -> Answer:
    """Answer once the event is set."""

    def answer(request: BaseHTTPRequestHandler) -> None:
        let_go.wait(30)
        with contextlib.suppress(OSError):
            says(200)(request)

    return answer


async def test_a_reply_is_posted_as_json_and_signed(receiver: AgentServer) -> None:
    run = await sync_to_async(said)("größer\n\N{SNOWMAN}", events=3)
    assert await post_due(Clock()) == 1
    (request,) = receiver.requests
    assert request.path == "/replies"
    assert request.headers["content-type"] == "application/json"
    assert request.headers["webhook-id"] == str(run.run_id)
    Webhook(SECRET).verify(request.body, request.headers)
    with pytest.raises(WebhookVerificationError):
        Webhook(new_signing_secret()).verify(request.body, request.headers)
    uids = [str(uid) async for uid in run.events.order_by("pk").values_list("uid", flat=True)]
    assert json.loads(request.body) == {
        "runId": str(run.run_id),
        "agentId": "main",
        "sessionKey": "agent:main:hook:x",
        "status": "delivered",
        "reply": "größer\n\N{SNOWMAN}",
        "at": "2026-11-22T12:00:00Z",
        "events": uids,
    }
    post = await only_post()
    assert (post.state, post.attempts, post.due_at, post.error) == ("sent", 1, None, "")
    assert post.settled_at == NOON
    assert await post_due(Clock(NOON + timedelta(days=1))) == 0


async def test_what_failed_is_posted_again_later_under_the_same_id(receiver: AgentServer) -> None:
    run = await sync_to_async(said)()
    clock = Clock()
    receiver.answer = says(500, b"out of order")
    assert await post_due(clock) == 1
    post = await only_post()
    assert (post.state, post.attempts) == ("pending", 1)
    assert post.error == f"{receiver.url} answered 500: out of order"
    assert post.due_at
    assert timedelta(seconds=1) <= post.due_at - NOON <= timedelta(seconds=2)

    receiver.answer = says(200)
    clock.now = post.due_at - timedelta(milliseconds=1)
    assert await post_due(clock) == 0
    clock.now = post.due_at
    assert await post_due(clock) == 1
    post = await only_post()
    assert (post.state, post.attempts, post.error) == ("sent", 2, "")
    assert [request.headers["webhook-id"] for request in receiver.requests] == [str(run.run_id)] * 2


@pytest.mark.parametrize(
    ("header", "seconds"), [("120", 120), ("86400", 3600), ("Sun, 22 Nov 1998 12:00:00 GMT", 0)]
)
async def test_retry_after_lengthens_the_wait(
    receiver: AgentServer, header: str, seconds: int
) -> None:
    await sync_to_async(said)()
    receiver.answer = says(429, retry_after=header)
    await post_due(Clock())
    post = await only_post()
    assert post.due_at
    if seconds:
        assert post.due_at == NOON + timedelta(seconds=seconds)
    else:
        assert post.due_at <= NOON + timedelta(seconds=2)


@pytest.mark.parametrize("status", [400, 401, 404, 410])
async def test_what_is_wrong_and_stays_so_fails_at_once(receiver: AgentServer, status: int) -> None:
    await sync_to_async(said)()
    receiver.answer = says(status, b"no such hook")
    await post_due(Clock())
    post = await only_post()
    assert (post.state, post.attempts, post.due_at) == ("failed", 1, None)
    assert post.error == f"{receiver.url} answered {status}: no such hook"


async def test_after_eight_attempts_it_has_failed_until_a_person_sends_it_again(
    receiver: AgentServer,
) -> None:
    await sync_to_async(said)()
    clock = Clock()
    receiver.answer = says(503)
    for attempt in range(1, 9):
        assert await post_due(clock) == 1
        post = await only_post()
        assert post.attempts == attempt
        clock.now = post.due_at or clock.now + timedelta(days=1)
    assert (post.state, len(receiver.requests)) == ("failed", 8)
    assert await post_due(clock) == 0

    receiver.answer = says(200)
    assert await sync_to_async(send_again)([post.pk], now=clock.now) == 1
    assert await sync_to_async(send_again)([post.pk], now=clock.now) == 0
    assert await post_due(clock) == 1
    post = await only_post()
    assert (post.state, post.attempts, post.error) == ("sent", 1, "")


async def test_a_receiver_that_hangs_has_its_time_and_no_more(
    receiver: AgentServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "TIME_LIMIT_SECONDS", 0.3)
    await sync_to_async(said)()
    let_go = threading.Event()
    receiver.answer = hangs(let_go)
    await asyncio.wait_for(post_due(Clock()), 10)
    let_go.set()
    post = await only_post()
    assert (post.state, post.error) == ("pending", "no answer within 0.3 s")


async def test_a_receiver_that_is_away_is_tried_again() -> None:
    with agent_server("/replies?key=hidden") as gone:
        pass
    url = gone.url.replace("//", "//user:pass-word@")
    await sync_to_async(set_agent)(reply_url=url, signing_secret=SECRET)
    await sync_to_async(said)()
    await post_due(Clock())
    post = await only_post()
    assert (post.state, post.attempts) == ("pending", 1)
    assert post.error.startswith(f"could not reach {gone.url.partition('?')[0]}: cannot connect: ")
    assert "hidden" not in post.error
    assert "pass-word" not in post.error


async def test_redirects_are_not_followed(receiver: AgentServer) -> None:
    await sync_to_async(said)()
    receiver.answer = says(307, location=receiver.url + "/elsewhere")
    await post_due(Clock())
    assert (await only_post()).error.endswith("answered 307: redirects are not followed")
    assert [request.path for request in receiver.requests] == ["/replies"]


async def test_a_reply_goes_where_replies_go_now(receiver: AgentServer) -> None:
    await sync_to_async(said)()
    receiver.answer = says(500)
    await post_due(Clock())
    new_secret = new_signing_secret()
    with agent_server("/moved") as moved:
        await sync_to_async(set_agent)(reply_url=moved.url, signing_secret=new_secret)
        await post_due(Clock(NOON + timedelta(minutes=1)))
        (request,) = moved.requests
    Webhook(new_secret).verify(request.body, request.headers)
    assert len(receiver.requests) == 1


async def test_without_a_reply_url_any_more_it_has_failed(receiver: AgentServer) -> None:
    await sync_to_async(said)()
    await sync_to_async(set_agent)(reply_url="")
    await post_due(Clock())
    post = await only_post()
    assert (post.state, post.error) == ("failed", "the agent has no reply URL any more")
    assert receiver.requests == []


async def test_without_a_secret_nothing_is_sent(receiver: AgentServer) -> None:
    await sync_to_async(said)()
    await sync_to_async(set_agent)(signing_secret="")
    await post_due(Clock())
    post = await only_post()
    assert post.state == "pending"
    assert "no usable signing secret" in post.error
    assert receiver.requests == []


async def test_a_reply_is_queued_with_its_run_or_not_at_all(receiver: AgentServer) -> None:
    def twice() -> None:
        with transaction.atomic():
            queue_reply(said().run_id, now=NOON)

    with pytest.raises(IntegrityError):
        await sync_to_async(twice)()
    assert await ReplyPost.objects.acount() == await Heartbeat.objects.acount() == 0


@pytest.mark.parametrize(
    ("reply", "is_posted"), [("All is well.", True), ("HEARTBEAT_OK", False), (" \n", False)]
)
async def test_what_an_agent_says_is_posted_unless_it_says_nothing(
    receiver: AgentServer, reply: str, is_posted: bool
) -> None:
    command = ["/bin/sh", "-c", 'cat > /dev/null; printf %s "$0"', reply]
    await sync_to_async(set_agent)(runner="command", command=command)
    receipt = await sync_to_async(dispatch)(WakeRequest("an event", "cli", session_key="x"))
    loop = HeartbeatLoop()
    await loop.run_once()
    await loop.close()
    await post_due(timezone.now)
    assert [
        (body["reply"], body["events"])
        for body in (json.loads(request.body) for request in receiver.requests)
        if body["sessionKey"] == "agent:main:x"
    ] == [(reply, [str(receipt.event_id)])] * is_posted


async def test_the_doorbell_is_heard_and_few_are_posted_at_once(
    receiver: AgentServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(replies, "POLL_SECONDS", 60.0)
    together = threading.Barrier(POSTS_AT_ONCE)
    at_once, most = 0, 0
    counting = threading.Lock()

    def answer(request: BaseHTTPRequestHandler) -> None:
        nonlocal at_once, most
        with counting:
            at_once += 1
            most = max(most, at_once)
        together.wait(10)
        time.sleep(0.02)
        with counting:
            at_once -= 1
        says(200)(request)

    receiver.answer = answer
    async with posting(ReplyPoster()):
        await asyncio.sleep(0.3)
        for _ in range(3 * POSTS_AT_ONCE):
            await sync_to_async(said)()
        await until(all_sent)
    assert len(receiver.requests) == 3 * POSTS_AT_ONCE
    assert most == POSTS_AT_ONCE


async def test_two_posters_share_the_work_and_post_nothing_twice(receiver: AgentServer) -> None:
    def answer(request: BaseHTTPRequestHandler) -> None:
        time.sleep(0.01)
        says(200)(request)

    receiver.answer = answer
    runs = [await sync_to_async(said)(f"reply {number}") for number in range(60)]
    async with posting(ReplyPoster()), posting(ReplyPoster()):
        await until(all_sent)
    assert Counter(request.headers["webhook-id"] for request in receiver.requests) == {
        str(run.run_id): 1 for run in runs
    }
    assert {post.attempts async for post in ReplyPost.objects.all()} == {1}


async def test_who_is_late_has_no_say(receiver: AgentServer) -> None:
    await sync_to_async(said)()
    let_go = threading.Event()

    def answer(request: BaseHTTPRequestHandler) -> None:
        if len(receiver.requests) == 1:
            let_go.wait(30)
            says(410)(request)
        else:
            says(200)(request)

    receiver.answer = answer
    clock = Clock()
    late = asyncio.create_task(post_due(clock))
    await until(lambda: len(receiver.requests) == 1)
    assert await post_due(Clock(NOON + LEASE - timedelta(seconds=1))) == 0
    assert await post_due(Clock(NOON + LEASE)) == 1
    let_go.set()
    await late
    post = await only_post()
    assert (post.state, post.attempts, post.error) == ("sent", 2, "")


async def test_stopped_in_the_middle_it_is_given_back(receiver: AgentServer) -> None:
    await sync_to_async(said)()
    let_go = threading.Event()
    receiver.answer = hangs(let_go)
    clock = Clock()
    async with posting(ReplyPoster(clock=clock)):
        await until(lambda: len(receiver.requests) == 1)
    post = await only_post()
    assert (post.state, post.attempts, post.due_at) == ("pending", 0, NOON)
    let_go.set()
    assert await post_due(clock) == 1
    assert (await only_post()).state == "sent"


async def test_killed_in_the_middle_it_is_posted_again_after_the_lease(
    receiver: AgentServer,
) -> None:
    run = await sync_to_async(said)()
    let_go = threading.Event()
    receiver.answer = hangs(let_go)
    process = subprocess.Popen(  # noqa: ASYNC220 - it only begins here
        [sys.executable, ROOT / "manage.py", "heartbeats"],
        env={**os.environ, "DATABASE_URL": database_url(), "SECRET_KEY": settings.SECRET_KEY},
        stdout=subprocess.DEVNULL,
    )
    try:
        await until(lambda: len(receiver.requests) == 1, 60)
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    let_go.set()
    post = await only_post()
    assert (post.state, post.attempts) == ("pending", 1)
    assert post.due_at
    assert await post_due(Clock(post.due_at - timedelta(seconds=1))) == 0
    assert await post_due(Clock(post.due_at)) == 1
    post = await only_post()
    assert (post.state, post.attempts) == ("sent", 2)
    assert [request.headers["webhook-id"] for request in receiver.requests] == [str(run.run_id)] * 2


def database_url() -> str:
    """Return where the tests' own database is, for another process."""
    database = connection.settings_dict
    if connection.vendor == "sqlite":
        return f"sqlite:///{database['NAME']}"
    return f"postgres://{database['USER']}@{database['HOST']}:{database['PORT']}/{database['NAME']}"


async def test_a_clock_that_was_set_back_holds_nothing_up_for_long(receiver: AgentServer) -> None:
    await sync_to_async(said)(now=NOON + timedelta(days=400))
    assert await post_due(Clock()) == 1
    assert (await only_post()).state == "sent"


async def test_logs_tell_the_run_and_neither_the_reply_nor_the_answer(
    receiver: AgentServer, caplog: pytest.LogCaptureFixture
) -> None:
    run = await sync_to_async(said)("a confidence")
    receiver.answer = says(400, b"I do not like: a confidence")
    with caplog.at_level(logging.INFO):
        await post_due(Clock())
    assert str(run.run_id) in caplog.text
    assert "confidence" not in caplog.text
    assert SECRET not in caplog.text


@pytest.mark.parametrize("state", ReplyState)
def test_pruning_takes_replies_along_but_none_on_its_way(state: ReplyState) -> None:
    GatewaySettings.ensure()
    run = said(now=NOON - timedelta(days=200))
    is_on_its_way = state == ReplyState.PENDING
    ReplyPost.objects.update(state=state, due_at=NOON if is_on_its_way else None)
    for kind in pruning.kinds(NOON):
        list(pruning.delete_in_batches(kind, pause=lambda _: None))
    assert Heartbeat.objects.filter(pk=run.pk).exists() == is_on_its_way
    assert ReplyPost.objects.exists() == is_on_its_way


def test_a_lease_does_not_show_what_is_posted() -> None:
    set_agent(reply_url="http://127.0.0.1/", signing_secret=SECRET)
    said("a confidence")
    (attempt,) = replies.begin_attempts(now=NOON, limit=1)
    assert attempt.secret == SECRET
    assert SECRET not in repr(attempt)
    assert "confidence" not in repr(attempt)
