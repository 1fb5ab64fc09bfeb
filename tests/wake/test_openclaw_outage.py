"""An agent behind another gateway, with the whole heartbeat loop between: nothing is lost."""

from __future__ import annotations

import asyncio
from collections import defaultdict

import pytest
from asgiref.sync import sync_to_async

from tests.wake.test_heartbeat_loop import all_settled, serving, set_agent, until, wake
from tests.wake.upstream import Upstream
from wake.heartbeats.loop import HeartbeatLoop
from wake.models import EventState, Heartbeat, HeartbeatStatus, SystemEvent

pytestmark = pytest.mark.django_db(transaction=True)

OUTAGE_SECONDS = 2.0
SESSIONS = 5
ROUNDS = 12


async def test_an_outage_loses_nothing_and_keeps_the_order() -> None:
    """Events come before, during and after it; those in flight at its beginning may come twice."""
    async with Upstream() as upstream:
        upstream.delay = 0.01
        # One attempt: whatever counted one would make dead letters.
        await sync_to_async(set_agent)(
            runner="openclaw", url=upstream.url, max_attempts=1, max_runs_per_minute=None
        )
        async with serving(HeartbeatLoop()):
            for number in range(ROUNDS):
                for session in range(SESSIONS):
                    await sync_to_async(wake)(f"{session} {number}", f"s{session}")
                if number == ROUNDS // 3:
                    await upstream.stop()
                if number == 2 * ROUNDS // 3:
                    await asyncio.sleep(OUTAGE_SECONDS)
                    assert await SystemEvent.objects.filter(state=EventState.QUEUED).aexists()
                    await upstream.start()
            await until(all_settled, seconds=30)
    arrived: dict[str, list[str]] = defaultdict(list)
    for taken in upstream.wakes:
        # A repeat comes before anything newer of its session.
        if arrived[taken["sessionKey"]][-1:] != [taken["text"]]:
            arrived[taken["sessionKey"]].append(taken["text"])
    assert arrived == {
        f"agent:main:s{session}": [f"{session} {number}" for number in range(ROUNDS)]
        for session in range(SESSIONS)
    }
    assert not await SystemEvent.objects.exclude(state=EventState.DELIVERED).aexists()
    assert not await Heartbeat.objects.filter(status=HeartbeatStatus.FAILED).aexists()


async def test_a_refused_key_is_a_dead_letter_in_the_words_of_upstream() -> None:
    words = 'session key "agent:main:refused" is not allowed here'
    async with Upstream() as upstream:
        upstream.refused_keys["agent:main:refused"] = words
        await sync_to_async(set_agent)(runner="openclaw", url=upstream.url)
        async with serving(HeartbeatLoop()):
            await sync_to_async(wake)("one", "refused")
            await sync_to_async(wake)("two", "welcome")
            await until(all_settled)
    dead = await SystemEvent.objects.select_related("heartbeat").aget(state=EventState.DEAD)
    assert dead.text == "one"
    assert dead.heartbeat
    assert words in dead.heartbeat.error
    assert upstream.texts == ["two"]
