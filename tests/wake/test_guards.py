"""What keeps an agent's heartbeats within bounds, and who goes first."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import defaultdict
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from hypothesis import given
from hypothesis import strategies as st

from tests.claims import terms
from tests.wake.test_heartbeat_loop import Clock, all_settled, serving, set_agent, until
from wake import configuration, guards, queue
from wake.dispatch import Receipt, WakeRequest, dispatch, dispatch_batch
from wake.heartbeats.loop import HeartbeatLoop
from wake.models import (
    Agent,
    DueReason,
    Heartbeat,
    HeartbeatStatus,
    RunnerKind,
    Session,
    SystemEvent,
)
from wake.queue import Claim
from wake.session_states import SessionState, sentences, with_state
from wake.signing import new_signing_secret

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
LEASE = timedelta(seconds=15)
MINUTE = timedelta(minutes=1)


@given(
    st.lists(st.integers(0, 200), max_size=60),
    st.integers(1, 20),
)
def test_no_minute_has_more_runs_than_the_limit(wishes: list[int], limit: int) -> None:
    """Whoever wants to begin when, and waits for the end of a hold, keeps the limit."""
    started: list[datetime] = []
    at = NOW
    for wish in wishes:
        at = max(at, NOW + timedelta(seconds=wish))
        while hold := guards.rate_hold(started[::-1], limit, at):
            assert at < hold <= at + MINUTE
            at = hold
        started.append(at)
    for first, last in zip(started, started[limit:], strict=False):
        assert last - first >= MINUTE


def wake(text: str, key: str = "x", agent: str = "main", **more: Any) -> Receipt:
    result = dispatch_batch([WakeRequest(text, "cli", session_key=key, agent_id=agent, **more)],
                            now=NOW)[0]  # fmt: skip
    assert isinstance(result, Receipt)
    return result


def claim(*, now: datetime = NOW, limit: int = 1, **more: Any) -> list[Claim]:
    agents = configuration.gateway().agents
    return queue.claim(terms(*agents, **more), limit=limit, owner="test", now=now, lease=LEASE)


def run(*, now: datetime = NOW, **more: Any) -> bool:
    """Take one heartbeat to its end, and say whether one was due."""
    claims = claim(now=now, **more)
    for taken in claims:
        queue.settle(taken, HeartbeatStatus.DELIVERED, now=now)
    return bool(claims)


def said_of(key: str, now: datetime) -> str:
    snapshot = configuration.gateway()
    (row,) = with_state(Session.objects.filter(key=key), snapshot, now)
    return sentences(row, SessionState(row.state), dead=0, snapshot=snapshot, now=now)[0]


@pytest.mark.django_db
def test_a_session_over_its_rate_says_so_and_delivers_what_waited_together() -> None:
    set_agent(runner="command", command=["/bin/cat"], max_runs_per_minute=3)
    for number in range(3):
        wake(f"event {number}")
        assert run(now=NOW + timedelta(seconds=number), max_runs_per_minute=3)
    for number in range(5):
        wake(f"late {number}")
    assert not run(now=NOW + timedelta(seconds=59), max_runs_per_minute=3)
    said = said_of("agent:main:x", NOW + timedelta(seconds=5))
    assert said.startswith("Held back until 12:01:00 UTC by the limit of 3 runs a minute")
    wake("another session is free", "y")
    assert run(now=NOW + timedelta(seconds=10), max_runs_per_minute=3)
    (taken,) = claim(now=NOW + MINUTE, max_runs_per_minute=3)
    assert [event.text for event in taken.events] == [f"late {number}" for number in range(5)]


@pytest.mark.django_db
@pytest.mark.parametrize("ending", ["fail", "lose"])
def test_a_retry_keeps_to_the_rate_too(ending: str) -> None:
    wake("x")
    (taken,) = claim(max_runs_per_minute=1)
    if ending == "fail":
        queue.fail(taken, "no", now=NOW, max_attempts=8)
    else:
        queue.lose(taken, "gone", now=NOW, max_attempts=8)
    assert Session.objects.get().due_at == NOW + MINUTE
    # A clock that was set back would give such a time too; this one is meant.
    assert queue.correct_due_times(now=NOW) == 0


@pytest.mark.django_db
def test_a_hold_ends_with_its_limit_and_at_a_persons_word() -> None:
    for key in ("a", "b"):
        wake("1", key)
        assert run(max_runs_per_minute=1)
        wake("2", key)
    held = Session.objects.get(key="agent:main:a")
    assert queue.wake_sessions([held.pk], now=NOW) == 1
    assert run(max_runs_per_minute=1)
    assert not run(max_runs_per_minute=1)
    assert queue.lift_holds({"main": (None, 5)}, now=NOW) == 2
    assert run()


@pytest.mark.django_db
def test_a_clock_that_is_set_back_leaves_no_session_held_for_longer_than_a_minute() -> None:
    wake("1")
    run(max_runs_per_minute=1)
    wake("2")
    earlier = NOW - timedelta(hours=5)
    assert queue.correct_due_times(now=earlier) == 1
    assert run(now=earlier, max_runs_per_minute=1)


@pytest.mark.django_db
def test_a_session_that_only_wakes_itself_is_held_until_somebody_else_wakes_it() -> None:
    set_agent(runner="command", command=["/bin/cat"], max_self_wakes=2)
    wake("somebody")
    runs = 0
    for _ in range(10):
        claims = claim()
        if not claims:
            break
        runs += 1
        wake(f"go on {runs}", run_id=claims[0].run_id)
        queue.settle(claims[0], HeartbeatStatus.DELIVERED, now=NOW)
    assert runs == 3, "one for somebody, and as many as the limit by itself"
    said = said_of("agent:main:x", NOW)
    assert said.startswith(
        "Held back until 13:00:00 UTC by the limit of 2 wakes in a row by its own runs"
    )
    wake("somebody again")
    (taken,) = claim()
    assert [event.text for event in taken.events] == ["go on 3", "somebody again"]
    wake("go on", run_id=taken.run_id)
    queue.settle(taken, HeartbeatStatus.DELIVERED, now=NOW)
    assert run(), "it counts from the beginning again"


@pytest.mark.django_db
def test_a_session_that_is_held_for_waking_itself_runs_at_last() -> None:
    set_agent(max_self_wakes=1)
    wake("somebody")
    for _ in range(2):
        (taken,) = claim()
        wake(f"go on {taken.run_id}", run_id=taken.run_id)
        queue.settle(taken, HeartbeatStatus.DELIVERED, now=NOW)
    assert not run()
    assert run(now=NOW + guards.SELF_WAKE_HOLD)


@pytest.mark.django_db
def test_waking_another_session_is_nobodys_self_wake() -> None:
    set_agent(max_self_wakes=1)
    wake("somebody")
    for number in range(6):
        (taken,) = claim()
        wake(f"go on {number}", f"key-{number}", run_id=taken.run_id)
        queue.settle(taken, HeartbeatStatus.DELIVERED, now=NOW)
    assert run()


@pytest.mark.django_db
def test_an_agent_runs_no_more_at_once_than_it_may_wherever() -> None:
    for number in range(5):
        wake("x", f"key-{number}")
    here = claim(limit=9, max_parallel_runs=2)
    assert len(here) == 2
    elsewhere = claim(limit=9, max_parallel_runs=2)
    assert elsewhere == []
    assert claim(limit=9, running=2, max_parallel_runs=3) != [], "its own are not counted twice"


@pytest.mark.django_db
def test_a_person_goes_first_and_a_schedule_last() -> None:
    Agent.objects.bulk_create([Agent(id=f"a{number}") for number in range(20)])
    configuration.gateway.forget()
    schedules = {
        configuration.gateway().main_session(f"a{number}"): NOW - MINUTE for number in range(20)
    }
    queue.keep_schedules(schedules, now=NOW - 2 * MINUTE)
    wake("a machine's", "machine", "a7")
    wake("a person's", "person", "a8", by_person=True)
    first = claim(limit=3, now=NOW + MINUTE)
    assert [taken.session.key for taken in first[:2]] == ["agent:a8:person", "agent:a7:machine"]
    assert first[2].reason == DueReason.SCHEDULE


@pytest.mark.django_db
def test_what_is_due_already_is_due_for_the_more_urgent_reason() -> None:
    main = configuration.gateway().main_session("main")
    queue.keep_schedules({main: NOW - MINUTE}, now=NOW - 2 * MINUTE)
    wake("hurry", "main", by_person=True)
    session = Session.objects.get()
    assert (session.due_at, session.due_reason) == (NOW - MINUTE, DueReason.OPERATOR)
    wake("no hurry", "main")
    session.refresh_from_db()
    assert session.due_reason == DueReason.OPERATOR


@pytest.mark.django_db
def test_an_agent_that_wants_events_has_no_idle_heartbeats() -> None:
    main = configuration.gateway().main_session("main")
    queue.keep_schedules({main: NOW}, now=NOW - MINUTE)
    assert not run(only_with_events=True)
    assert Session.objects.get().due_at is None
    assert not Heartbeat.objects.exists()
    wake("there is something", "main")
    assert run(only_with_events=True)
    queue.wake_sessions([Session.objects.get().pk], now=NOW)
    assert run(only_with_events=True), "a person's wish is not idle"


@pytest.mark.django_db(transaction=True)
async def test_each_runner_and_hold_is_recorded_by_the_loop() -> None:
    clock = Clock()
    await sync_to_async(set_agent)(
        runner="command", command=["/bin/cat"], max_runs_per_minute=1, heartbeat_every=timedelta(0)
    )
    loop = HeartbeatLoop(clock=clock)

    def send(text: str) -> None:
        dispatch_batch([WakeRequest(text, "cli", session_key="x")], now=clock())

    await sync_to_async(send)("one")
    assert await loop.run_once() == 1
    await sync_to_async(send)("two")
    assert await loop.run_once() == 0
    # Without the limit it runs at once, in whichever process.
    await sync_to_async(set_agent)(max_runs_per_minute=None)
    configuration.gateway.forget()
    assert await loop.run_once() == 1
    await loop.close()
    async for heartbeat in Heartbeat.objects.all():
        assert heartbeat.runner == RunnerKind.COMMAND


class Receiver(BaseHTTPRequestHandler):
    """An agent that notes when each event came."""

    protocol_version = "HTTP/1.1"
    arrived: dict[str, float]
    texts: dict[str, list[list[str]]]

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        for event in body["events"]:
            self.arrived[event["id"]] = time.monotonic()
        self.texts[body["sessionKey"]].append([event["text"] for event in body["events"]])
        self.send_response(200)
        self.send_header("content-length", "0")
        self.end_headers()

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[tuple[str, type[Receiver]]]:
    kept = type("Kept", (Receiver,), {"arrived": {}, "texts": defaultdict(list)})
    with ThreadingHTTPServer(("127.0.0.1", 0), kept) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/", kept
        server.shutdown()


# The limit of the promise, with room for a machine that runs other tests beside this one.
QUIET_SECONDS = 0.2
ROOM = 15


@pytest.mark.django_db(transaction=True)
async def test_a_noisy_session_never_delays_a_quiet_one(
    receiver: tuple[str, type[Receiver]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """1,000 events within a second for one session, and 100 others woken once each meanwhile."""
    url, kept = receiver
    # The minute is shortened, so that the end of the hold is seen.
    monkeypatch.setattr(guards, "MINUTE", timedelta(seconds=6))
    await sync_to_async(set_agent)(
        runner="http",
        url=url,
        signing_secret=new_signing_secret(),
        max_runs_per_minute=4,
        heartbeat_every=timedelta(0),
    )
    woken: dict[str, float] = {}

    def make_noise() -> None:
        for batch in range(20):
            requests = [
                WakeRequest(f"noise {batch * 50 + number}", "cli", session_key="noisy")
                for number in range(50)
            ]
            dispatch_batch(requests)
            time.sleep(0.02)

    def wake_quietly() -> None:
        for number in range(100):
            receipt = dispatch(WakeRequest("quiet", "cli", session_key=f"quiet-{number}"))
            woken[str(receipt.event_id)] = time.monotonic()
            time.sleep(0.005)

    async with serving(HeartbeatLoop()):
        await asyncio.gather(asyncio.to_thread(make_noise), asyncio.to_thread(wake_quietly))
        await until(lambda: woken.keys() <= kept.arrived.keys(), 20)
        waits = sorted(kept.arrived[event_id] - at for event_id, at in woken.items())
        assert waits[-1] < QUIET_SECONDS * ROOM, waits
        assert sum(len(run) for run in kept.texts["agent:main:noisy"]) < 1000, "it is held"
        await until(all_settled, 30)
    print(f"slowest of 100 quiet sessions: {waits[-1] * 1000:.0f} ms")  # noqa: T201
    runs = kept.texts["agent:main:noisy"]
    assert [text for run in runs for text in run] == [f"noise {n}" for n in range(1000)]
    assert len(runs) <= 4 + 6, "what was held came together"
    assert await SystemEvent.objects.filter(state="delivered").acount() == 1100
