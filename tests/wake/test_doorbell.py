"""The doorbell: who hears that there is work, and when."""

from __future__ import annotations

import asyncio
import contextlib
import time

import pytest
from asgiref.sync import sync_to_async
from django.db import connection, transaction

from wake import doorbell

pytestmark = pytest.mark.django_db(transaction=True)


async def heard_within(heard: asyncio.Event, seconds: float) -> bool:
    try:
        await asyncio.wait_for(heard.wait(), seconds)
    except TimeoutError:
        return False
    heard.clear()
    return True


async def settle_down(heard: asyncio.Event) -> None:
    """Wait until a fresh listener has heard what it hears at its start."""
    while await heard_within(heard, 0.2):
        pass


async def test_a_ring_is_heard_after_the_commit_and_not_before() -> None:
    heard, rung, commit = asyncio.Event(), asyncio.Event(), asyncio.Event()
    loop = asyncio.get_running_loop()

    def work() -> None:
        with transaction.atomic():
            doorbell.ring()
            loop.call_soon_threadsafe(rung.set)
            asyncio.run_coroutine_threadsafe(commit.wait(), loop).result(5)

    async with doorbell.listen(lambda _: heard.set()):
        await settle_down(heard)
        working = asyncio.create_task(sync_to_async(work)())
        await rung.wait()
        assert not await heard_within(heard, 0.1)
        commit.set()
        assert await heard_within(heard, 1)
        await working


async def test_a_transaction_that_fails_rings_nothing() -> None:
    heard = asyncio.Event()

    def work() -> None:
        with transaction.atomic():
            doorbell.ring()
            transaction.set_rollback(True)

    async with doorbell.listen(lambda _: heard.set()):
        await settle_down(heard)
        await sync_to_async(work)()
        assert not await heard_within(heard, 0.1)


async def test_work_of_another_process_is_heard_at_once() -> None:
    """A bare connection commits: nothing of this process but the database can tell."""

    def work_elsewhere() -> None:
        if connection.vendor == "postgresql":
            import psycopg

            parameters = connection.get_connection_params()
            parameters = {name: parameters[name] for name in ("dbname", "user", "host", "port")
                          if parameters.get(name)}  # fmt: skip
            with psycopg.connect(**parameters) as other:
                other.execute("SELECT pg_notify(%s, '')", [doorbell.CHANNEL])
        else:
            import sqlite3

            with contextlib.closing(sqlite3.connect(connection.settings_dict["NAME"])) as elsewhere:
                elsewhere.execute("UPDATE wake_agent SET name = name || '!'")
                elsewhere.commit()

    heard = asyncio.Event()
    async with doorbell.listen(lambda _: heard.set()):
        await settle_down(heard)
        await asyncio.to_thread(work_elsewhere)
        began = time.monotonic()
        assert await heard_within(heard, 1)
        assert time.monotonic() - began < 0.5, "that was the slow poll's work"


async def test_a_listener_that_left_hears_nothing() -> None:
    heard = asyncio.Event()
    async with doorbell.listen(lambda _: heard.set()):
        await settle_down(heard)
    await sync_to_async(doorbell.ring)()
    assert not await heard_within(heard, 0.1)


async def test_a_ring_names_the_sessions_that_changed() -> None:
    named: asyncio.Queue[set[int]] = asyncio.Queue()
    async with doorbell.listen(lambda sessions: named.put_nowait(set(sessions))):
        await sync_to_async(doorbell.ring)([3, 5])
        while await asyncio.wait_for(named.get(), 5) != {3, 5}:
            pass


async def test_more_sessions_than_a_notification_holds_are_rung_all_the_same() -> None:
    named: asyncio.Queue[set[int]] = asyncio.Queue()
    async with doorbell.listen(lambda sessions: named.put_nowait(set(sessions))):
        await sync_to_async(doorbell.ring)(range(10_000))
        while await asyncio.wait_for(named.get(), 5) != set(range(10_000)):
            pass
