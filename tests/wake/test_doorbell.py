"""The doorbell: who hears that there is work, and when."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import Collection

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


def work_elsewhere() -> None:
    """Commit on a bare connection: nothing of this process but the database can tell."""
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


async def test_work_of_another_process_is_heard_at_once() -> None:
    heard = asyncio.Event()
    async with doorbell.listen(lambda _: heard.set()):
        await settle_down(heard)
        await asyncio.to_thread(work_elsewhere)
        began = time.monotonic()
        assert await heard_within(heard, 1)
        assert time.monotonic() - began < 0.5, "that was the slow poll's work"


async def test_a_listener_that_stays_hears_other_processes_when_the_others_have_left() -> None:
    first, second = asyncio.Event(), asyncio.Event()
    async with doorbell.listen(lambda _: second.set()):
        async with doorbell.listen(lambda _: first.set()):
            await settle_down(first)
        await settle_down(second)
        await asyncio.to_thread(work_elsewhere)
        assert await heard_within(second, 1)
    assert not first.is_set()


async def test_whoever_comes_later_looks_at_what_was_there_before() -> None:
    early, late = asyncio.Event(), asyncio.Event()
    async with doorbell.listen(lambda _: early.set()):
        await settle_down(early)
        async with doorbell.listen(lambda _: late.set()):
            assert await heard_within(late, 1)


def watching() -> int:
    return sum(thread.name == "doorbell" for thread in threading.enumerate())


async def test_one_thread_watches_for_all_listeners_of_whatever_loop() -> None:
    async def listen_here(heard: asyncio.Event, loop: asyncio.AbstractEventLoop) -> None:
        elsewhere = asyncio.Event()
        async with doorbell.listen(lambda _: elsewhere.set()):
            await settle_down(elsewhere)
            loop.call_soon_threadsafe(heard.set)
            assert await heard_within(elsewhere, 5)

    before, loop = watching(), asyncio.get_running_loop()
    heard, is_listening = asyncio.Event(), asyncio.Event()
    async with doorbell.listen(lambda _: heard.set()), doorbell.listen(lambda _: None):
        on_another = asyncio.create_task(
            asyncio.to_thread(asyncio.run, listen_here(is_listening, loop))
        )
        await asyncio.wait_for(is_listening.wait(), 5)
        assert watching() == before + 1
        await settle_down(heard)
        await asyncio.to_thread(work_elsewhere)
        assert await heard_within(heard, 1)
        await on_another
    assert watching() == before


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


async def test_who_looks_anyway_is_not_told() -> None:
    told: list[object] = []
    is_awaited = True
    async with doorbell.listen(told.append, lambda: is_awaited):
        await sync_to_async(doorbell.ring)([3])
        await asyncio.sleep(0.2)
        assert told
        is_awaited = False
        await asyncio.sleep(0.1)
        told.clear()
        await sync_to_async(doorbell.ring)([3])
        await asyncio.sleep(0.2)
        assert not told


async def test_many_rings_of_another_process_are_heard_together_and_none_is_missed() -> None:
    if connection.vendor != "postgresql":
        pytest.skip("on SQLite rings of other processes name no sessions: set DATABASE_URL")
    import psycopg

    parameters = connection.get_connection_params()
    wanted = ("dbname", "user", "host", "port", "password")
    parameters = {name: parameters[name] for name in wanted if parameters.get(name)}
    heard: list[set[int]] = []

    def ring_often() -> None:
        with psycopg.connect(**parameters, autocommit=True) as other:
            for pk in range(200):
                other.execute("SELECT pg_notify(%s, %s)", [doorbell.CHANNEL, str(pk)])
                time.sleep(0.001)

    begun = asyncio.Event()

    def hear(sessions: Collection[int]) -> None:
        heard.append(set(sessions))
        begun.set()

    async with doorbell.listen(hear):
        await asyncio.wait_for(begun.wait(), 10)  # it listens when it has said so
        await asyncio.to_thread(ring_often)
        deadline = time.monotonic() + 5
        while set().union(*heard) != set(range(200)):
            assert time.monotonic() < deadline
            await asyncio.sleep(0.01)
    assert len(heard) < 100
