"""What connections are told by themselves: one hub for each event loop tells those connected to it.

The hub serves while anyone is connected, and a little longer. It learns what changed from the
database, whichever process changed it, and reads each change once for all its connections. Nothing
here waits for a client: what is told goes into outboxes.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import Awaitable, Callable, Collection
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final, ParamSpec, Protocol, TypeVar
from weakref import WeakKeyDictionary

import msgspec
from django.db import DatabaseError, connections
from django.utils import timezone

from wake import configuration, doorbell, status
from wake.gateway import credentials, presence, scopes
from wake.gateway.changes import Follower, many_changed
from wake.gateway.credentials import CREDENTIAL_ENDED
from wake.gateway.frames import SessionDefaults, Snapshot, StateVersion
from wake.gateway.handshake import CLOSE_POLICY_VIOLATION
from wake.gateway.methods import Caller
from wake.gateway.presence import DISCONNECTED
from wake.session_keys import SessionKey
from wake.threads import call_in

logger = logging.getLogger(__name__)

# The least time between two looks at what changed, and the slow poll behind the doorbell.
LOOK_SECONDS: Final = 0.1
POLL_SECONDS: Final = 1.0
# Less than a second, with the age of a snapshot: a revoked credential ends within one.
CREDENTIALS_SECONDS: Final = 0.4
PRESENCE_SECONDS: Final = 1.0
# Where many come and go, all of them are not told all of it every second.
PRESENCE_BYTES_A_SECOND: Final = 4_000_000
REFRESH_SECONDS: Final = 60.0
HEALTH_SECONDS: Final = 1.0
# So that what rang is told of first.
HEALTH_AFTER_SECONDS: Final = 0.3
# Counting may take this share of the time, on a database where it takes long.
HEALTH_SHARE: Final = 0.05
LINGER_SECONDS: Final = 30.0
START_SECONDS: Final = 5.0
RETRY_SECONDS: Final = 1.0
# Many that connect at once, after a restart, read once how things stand.
SNAPSHOT_SECONDS: Final = 0.5

P = ParamSpec("P")
T = TypeVar("T")


class Member(Protocol):
    """A connection past its handshake, as the hub sees it."""

    caller: Caller
    # What is known of the client, under its key; None for one that is not to be seen.
    report: presence.Report | None

    def tell(self, event: str, payload: msgspec.Raw) -> None: ...

    def end(self, code: int, reason: str) -> None: ...


class Hub:
    """Tells its members what happens. Everything but the database work is on one event loop."""

    def __init__(self) -> None:
        # With the time at which each joined, in this order.
        self._members: dict[Member, float] = {}
        self._serving: asyncio.Task[None] | None = None
        self._wanted_at = time.monotonic()
        self._is_following = asyncio.Event()
        self._follower = Follower()
        # Set by the doorbell for each of those who look when it rings.
        self._heard = asyncio.Event()
        self._changed: set[int] = set()
        self._health_changed = asyncio.Event()
        self._is_presence_stale = True
        # What was told last, and when that was read.
        self._health: dict[str, Any] = {}
        self._count_took = 0.0  # seconds, last
        self._present: list[dict[str, Any]] = []
        self._read_at = -SNAPSHOT_SECONDS
        self._reading = asyncio.Lock()
        # When the queue was counted last, and when what was told last had been heard of.
        self._counted_at = self._told_from = time.monotonic()
        # When the doorbell rang first since the last look at what changed.
        self._heard_at: float | None = None
        # One thread follows, one looks after the rest, so that neither waits for the other.
        self._following = ThreadPoolExecutor(1, thread_name_prefix="gateway-changes")
        self._database = ThreadPoolExecutor(1, thread_name_prefix="gateway-hub")

    # --- Who is there ---------------------------------------------------------------------------

    async def ready(self) -> None:
        """Wait until the hub follows what happens: from then on nothing is missed.

        Raises DatabaseError when it cannot.
        """
        self._wanted_at = time.monotonic()
        if self._serving is None or self._serving.done():
            self._serving = asyncio.create_task(self._serve())
        try:
            await asyncio.wait_for(self._is_following.wait(), START_SECONDS)
        except TimeoutError as error:
            raise DatabaseError("the gateway cannot follow its database now") from error

    def add(self, member: Member) -> None:
        """Tell a member what happens from now on; the hub is ready."""
        self._members[member] = time.monotonic()

    def remove(self, member: Member) -> None:
        self._members.pop(member, None)

    async def snapshot(self) -> Snapshot:
        """Return what a client is told at its start: what all others were told last.

        What changed since is told to it with them. Raises DatabaseError.
        """
        async with self._reading:
            is_old = time.monotonic() - self._read_at > SNAPSHOT_SECONDS
            if is_old and not self._readers():
                read_at = time.monotonic()
                self._health, self._present = await self._in_database(_read)
                self._read_at = self._counted_at = read_at
        settings = configuration.gateway()
        return Snapshot(
            presence=self._present,
            health=self._health,
            # Times of the newest change: they grow, and are the same in all processes.
            state_version=StateVersion(
                presence=max((entry["ts"] for entry in self._present), default=0),
                health=self._health["ts"],
            ),
            uptime_ms=status.uptime_ms(),
            session_defaults=SessionDefaults(
                default_agent_id=settings.default_agent,
                main_key=settings.main_key,
                main_session_key=settings.main_session(settings.default_agent).key,
                scope=status.wire_scope(settings.scope),
            ),
        )

    def _readers(self) -> list[Member]:
        # A copy first, because database threads ask too.
        return [
            member
            for member in tuple(self._members)
            if scopes.includes(member.caller.scopes, scopes.READ)
        ]

    def _tell(self, event: str, payload: object, members: Collection[Member]) -> int:
        """Tell members something, and return how many bytes that is in all."""
        encoded = msgspec.json.encode(payload)
        for member in members:
            member.tell(event, msgspec.Raw(encoded))
        return len(encoded) * len(members)

    # --- Serving --------------------------------------------------------------------------------

    async def _serve(self) -> None:
        """Do all there is to do until nobody has been there for a while."""
        self._follower = Follower()
        steps = (self._follow, self._watch_credentials, self._keep_presence, self._tell_health)
        async with doorbell.listen(self._hear), asyncio.TaskGroup() as group:
            tasks = [group.create_task(self._again_and_again(step)) for step in steps]
            while self._members or time.monotonic() - self._wanted_at < LINGER_SECONDS:
                await asyncio.sleep(POLL_SECONDS)
                if self._members:
                    self._wanted_at = time.monotonic()
            self._begin_anew()
            for task in tasks:
                task.cancel()

    def _begin_anew(self) -> None:
        """Let who comes while the present tasks end find new ones, not those."""
        self._serving = None
        self._is_following.clear()

    async def close(self) -> None:
        """End at once, whoever is there, and leave the database alone from then on.

        For a process that goes on without its server, as one does that runs tests.
        """
        if serving := self._serving:
            self._begin_anew()
            serving.cancel()
            await asyncio.wait([serving])
        # Who was cancelled did not wait for what its thread is doing.
        for thread in (self._following, self._database):
            await call_in(thread, connections.close_all)

    def _hear(self, sessions: Collection[int]) -> None:
        self._changed.update(sessions)
        self._heard_at = self._heard_at or time.monotonic()
        self._health_changed.set()
        self._is_presence_stale = True
        self._heard.set()

    async def _again_and_again(self, step: Callable[[], Awaitable[float]]) -> None:
        """Call a step for ever; it returns after how many seconds it is to be called again."""
        while True:
            try:
                pause = await step()
            except DatabaseError as error:
                logger.warning("gateway: %s failed: %s; trying again", step.__name__, error)
                pause = RETRY_SECONDS
            except Exception:
                logger.exception("gateway: %s failed; trying again", step.__name__)
                pause = RETRY_SECONDS
            await asyncio.sleep(pause)

    async def _in_database(
        self, function: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs
    ) -> T:
        return await call_in(self._database, function, *args, **kwargs)

    # --- What changed ---------------------------------------------------------------------------

    async def _follow(self) -> float:
        """Look at what changed when the doorbell rings, or after a while, and tell it."""
        if not self._is_following.is_set():
            await call_in(self._following, self._follower.start)
            self._is_following.set()
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._heard.wait(), POLL_SECONDS)
        self._heard.clear()
        changed, self._changed = self._changed, set()
        heard_at, self._heard_at = self._heard_at or time.monotonic(), None
        try:
            found = await call_in(
                self._following,
                self._follower.look,
                changed,
                # Asked after the look at what is new: who subscribed before it misses nothing.
                lambda: self._followers().keys(),
                lambda: bool(self._listing()),
                now=timezone.now(),
            )
        except Exception:
            self._changed |= changed
            self._heard_at = heard_at
            raise
        for payload in found.heartbeats:
            self._tell("heartbeat", payload, self._readers())
        followers = self._followers()
        for session, payload in found.messages:
            self._tell("session.message", payload, followers.get(session, ()))
        for payload in found.sessions:
            self._told_from = heard_at
            self._tell("sessions.changed", payload, self._listing())
        if not found.is_all:
            self._heard.set()
            return 0.0
        return LOOK_SECONDS

    def _listing(self) -> list[Member]:
        return [member for member in self._readers() if member.caller.subscriptions.sessions]

    def _followers(self) -> dict[SessionKey, list[Member]]:
        followers: dict[SessionKey, list[Member]] = {}
        for member in self._readers():
            for session in tuple(member.caller.subscriptions.messages):
                followers.setdefault(session, []).append(member)
        return followers

    async def _tell_health(self) -> float:
        """Tell how things stand when that may have changed, and every so often anyway.

        Numbers that changed though no session did tell of work by hand in another process: not
        every ring has room for the sessions that it is about.
        """
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._health_changed.wait(), REFRESH_SECONDS)
        if not self._readers():
            return HEALTH_SECONDS
        await asyncio.sleep(HEALTH_AFTER_SECONDS)
        self._health_changed.clear()
        began = time.monotonic()
        try:
            health = await self._in_database(status.health)
        except DatabaseError:
            self._health_changed.set()
            raise
        # What was heard before the last count is in that count, however late it is told.
        is_missed = health["queue"] != self._health["queue"] and self._told_from < self._counted_at
        self._health, self._counted_at = health, began
        self._tell("health", health, self._readers())
        if is_missed:
            self._tell("sessions.changed", many_changed(timezone.now()), self._listing())
        took, self._count_took = self._count_took, time.monotonic() - began
        # One that was slow says nothing: the first one has to connect, or the machine was busy.
        return max(HEALTH_SECONDS, min(took, self._count_took) / HEALTH_SHARE)

    # --- Who may stay, and who is seen ----------------------------------------------------------

    async def _watch_credentials(self) -> float:
        """End the connections whose credential does not hold any more."""
        held = {member.caller.credential for member in self._members}
        if held:
            ended = await self._in_database(credentials.ended, held, timezone.now())
            for member in [one for one in self._members if one.caller.credential in ended]:
                member.end(CLOSE_POLICY_VIOLATION, CREDENTIAL_ENDED)
        return CREDENTIALS_SECONDS

    async def _keep_presence(self) -> float:
        """Report who is connected here, and tell who is there anywhere, until cancelled."""
        noted: dict[str, presence.Report] = {}
        tell_from = refreshed_at = time.monotonic()
        while True:
            here = self._here()
            newest = dict(list(here.items())[-presence.MAX_ENTRIES :])
            arrived = [report for key, report in newest.items() if noted.get(key) != report]
            left = noted.keys() - here.keys()
            if arrived or left:
                await self._in_database(presence.keep, arrived, left, timezone.now())
                noted = {key: noted[key] for key in noted.keys() - left} | newest
            is_time = time.monotonic() - refreshed_at >= REFRESH_SECONDS
            if is_time:
                refreshed_at = time.monotonic()
                await self._in_database(presence.give_sign, newest.keys(), timezone.now())
            is_due = self._is_presence_stale and time.monotonic() >= tell_from
            if (is_due or is_time) and self._readers():
                self._is_presence_stale = False
                present = await self._in_database(presence.entries, timezone.now())
                is_news = presence.without_times(present) != presence.without_times(self._present)
                self._present = present
                # Another process said so of a client that is connected here as well.
                gone = {entry["key"] for entry in present if entry["reason"] == DISCONNECTED}
                noted = {key: report for key, report in noted.items() if key not in gone}
                if is_news or is_time:
                    size = self._tell("presence", {"presence": present}, self._readers())
                    tell_from = time.monotonic() + size / PRESENCE_BYTES_A_SECOND
            await asyncio.sleep(PRESENCE_SECONDS)

    def _here(self) -> dict[str, presence.Report]:
        """Return those who are to be seen, by key, the newest last: who is here for a second."""
        since = time.monotonic() - PRESENCE_SECONDS
        return {
            member.report.key: member.report
            for member, joined_at in self._members.items()
            if member.report and joined_at <= since
        }


def _read() -> tuple[dict[str, Any], list[dict[str, Any]]]:
    return status.health(), presence.entries(timezone.now())


_hubs: WeakKeyDictionary[asyncio.AbstractEventLoop, Hub] = WeakKeyDictionary()


def of_this_loop() -> Hub:
    """Return the hub of the running event loop."""
    loop = asyncio.get_running_loop()
    hub = _hubs.get(loop)
    if hub is None:
        hub = _hubs[loop] = Hub()
    return hub
