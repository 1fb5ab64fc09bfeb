"""The doorbell: telling every heartbeat loop, in any process, that there is work.

`ring()` is called inside the transaction that makes the work; listeners hear it after the commit.
In the same process they hear it directly. From another process they hear it

* on PostgreSQL through LISTEN and NOTIFY, which the database sends with the commit;
* on SQLite by asking `PRAGMA data_version` on a connection of its own: one read of shared memory
  that changes when any other connection commits.

One thread, with one connection, does so for all listeners of a process.

A ring says which sessions changed, where the way has room for it: on SQLite another process's does
not. Hearing too often is harmless. Hearing nothing is made good by the listener's own slow poll.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import sqlite3
import threading
from collections.abc import AsyncIterator, Callable, Collection
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Final

from django.db import connection, transaction

from wake import columns

logger = logging.getLogger(__name__)

CHANNEL: Final = "openclaw_wake"
# Of what other processes ring. To take each of a thousand a second would be most of a loop's work.
APART_SECONDS: Final = 0.02
RECONNECT_SECONDS: Final = 1.0
# How long a listener waits until its database is watched, and for the end of the watching.
BEGIN_SECONDS: Final = 1.0
JOIN_SECONDS: Final = 2.0
# How long the thread waits for a notification until it looks whether it is to end.
LISTEN_SECONDS: Final = 0.1
# PostgreSQL takes a notification of fewer than 8,000 bytes.
MAX_NOTIFICATION_CHARACTERS: Final = 7900

# Called with the ids of the sessions that are known to have changed.
Hear = Callable[[Collection[int]], None]

_listeners: set[Hear] = set()
_watchers: dict[str, _Watcher] = {}  # by the name of the database
_lock = threading.Lock()  # of both


def ring(sessions: Collection[int] = ()) -> None:
    """Tell the listeners, once the transaction under way is committed.

    `sessions` are the ids of those that it changed, as far as they are known.
    """
    if not columns.is_sqlite():
        named = ",".join(map(str, sessions))
        said = named if len(named) <= MAX_NOTIFICATION_CHARACTERS else ""
        columns.execute("SELECT pg_notify(%s, %s)", [CHANNEL, said])
    transaction.on_commit(partial(_tell_this_process, sessions))


def _tell_this_process(sessions: Collection[int]) -> None:
    with _lock:
        listeners = list(_listeners)
    for listener in listeners:
        listener(sessions)


class _OnLoop:
    """Lets any thread call `heard` on the running event loop. What rings at once is heard at once:
    to wake a loop takes longer than all else about a ring.
    """

    def __init__(self, heard: Hear, is_awaited: Callable[[], bool]) -> None:
        self._loop = asyncio.get_running_loop()
        self._heard = heard
        self._is_awaited = is_awaited
        self._sessions: set[int] = set()
        self._is_called = False
        self._lock = threading.Lock()

    def __call__(self, sessions: Collection[int]) -> None:
        if not self._is_awaited():
            return
        with self._lock:
            self._sessions.update(sessions)
            is_called, self._is_called = self._is_called, True
        if not is_called:
            # The loop may be closing while another thread rings.
            with contextlib.suppress(RuntimeError):
                self._loop.call_soon_threadsafe(self._hear)

    def _hear(self) -> None:
        with self._lock:
            sessions, self._sessions = self._sessions, set()
            self._is_called = False
        self._heard(sessions)


@contextlib.asynccontextmanager
async def listen(heard: Hear, is_awaited: Callable[[], bool] = lambda: True) -> AsyncIterator[None]:
    """Call `heard` on the event loop at every ring, with the sessions that it names.

    `is_awaited` is asked first, on any thread: who is going to look anyway need not be told.
    """
    hear = _OnLoop(heard, is_awaited)
    with _lock:
        _listeners.add(hear)
    try:
        async with _listen_to_other_processes(hear):
            yield
    finally:
        with _lock:
            _listeners.discard(hear)


@contextlib.asynccontextmanager
async def _listen_to_other_processes(hear: Hear) -> AsyncIterator[None]:
    """Have the database watched while this lasts. The last one to leave ends the watching."""
    watch = _way_to_watch()
    if watch is None:
        yield
        return
    name = str(connection.settings_dict["NAME"])
    with _lock:
        watcher = _watchers.get(name) or _watchers.setdefault(name, _Watcher(watch))
        watcher.listeners += 1
    try:
        await asyncio.to_thread(watcher.began.wait, BEGIN_SECONDS)
        hear(())  # what was committed while nobody listened
        yield
    finally:
        with _lock:
            watcher.listeners -= 1
            is_last = not watcher.listeners
            if is_last:
                del _watchers[name]
        if is_last:
            watcher.stopped.set()
            await asyncio.to_thread(watcher.thread.join, JOIN_SECONDS)


class _Watcher:
    """A thread that watches a database, and how many listeners there are for it."""

    def __init__(self, watch: Callable[[_Watcher], None]) -> None:
        self.listeners = 0
        self.began = threading.Event()
        self.stopped = threading.Event()
        self.thread = threading.Thread(target=watch, args=(self,), name="doorbell", daemon=True)
        self.thread.start()


def _way_to_watch() -> Callable[[_Watcher], None] | None:
    if connection.vendor == "postgresql":
        return partial(_watch_postgresql, connection.get_connection_params())
    if connection.vendor == "sqlite" and not connection.is_in_memory_db():  # type: ignore[attr-defined]
        return partial(_watch_sqlite, Path(str(connection.settings_dict["NAME"])))
    return None


def _watch_postgresql(parameters: dict[str, Any], watcher: _Watcher) -> None:
    import psycopg

    # Django's own wrappers for cursors and types are of no use on a connection that only listens.
    wanted = {
        name: value
        for name, value in parameters.items()
        if name not in {"cursor_factory", "context", "prepare_threshold"}
    }
    while not watcher.stopped.is_set():
        try:
            with psycopg.connect(**wanted, autocommit=True) as listening:
                listening.execute(f"LISTEN {CHANNEL}")
                watcher.began.set()
                _tell_this_process(())  # what was rung while nobody listened
                while not watcher.stopped.is_set():
                    # What has come is taken at once, and then what came within a moment.
                    rung = list(listening.notifies(timeout=LISTEN_SECONDS, stop_after=1))
                    if rung:
                        named = chain.from_iterable(one.payload.split(",") for one in rung)
                        _tell_this_process({int(pk) for pk in named if pk.isdigit()})
                        watcher.stopped.wait(APART_SECONDS)
        except psycopg.Error as error:
            logger.warning("doorbell: lost the database (%s); trying again", error)
            watcher.stopped.wait(RECONNECT_SECONDS)


def _watch_sqlite(path: Path, watcher: _Watcher) -> None:
    while not watcher.stopped.is_set():
        try:
            with contextlib.closing(
                sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True)
            ) as watching:
                watcher.began.set()
                seen = None
                while not watcher.stopped.wait(APART_SECONDS):
                    (version,) = watching.execute("PRAGMA data_version").fetchone()
                    if version != seen:
                        seen = version
                        _tell_this_process(())
        except sqlite3.Error as error:
            logger.warning("doorbell: cannot watch the database (%s); trying again", error)
            watcher.stopped.wait(RECONNECT_SECONDS)
