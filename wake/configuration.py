"""The configuration as every decision sees it: a frozen snapshot held in memory.

A snapshot is at most half a second old in any process, so that a change made in the admin is in
force everywhere within one second without a query per request. In the process that made the
change it is in force at once.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time as clock
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, time, timedelta
from hashlib import blake2b
from types import MappingProxyType
from typing import Any, Generic, TypeVar, cast

from django.db import DatabaseError, connection, connections, transaction
from django.db.models import Model
from django.utils import timezone

from wake import columns
from wake.errors import AgentError
from wake.models import Agent, AgentReach, GatewaySettings, IdleRuns, RunnerKind
from wake.schedule import Schedule
from wake.session_keys import Scope, SessionKey, main_session_key
from wake.threads import on_kept_connection

MAX_AGE_SECONDS = 0.5
# What is made of rows that do not change may still say something else with time.
MAX_CONFIRMED_SECONDS = 10.0
# A process says again how it reaches its agents well within this time.
REACH_COUNTS_FOR = timedelta(seconds=90)
JOIN_SECONDS = 2.0

logger = logging.getLogger(__name__)

T = TypeVar("T")


class _Held(Generic[T]):
    """What was read; times are of the monotonic clock.

    `contents` stands for the rows that it was made of, if they were looked at before it was read.
    """

    def __init__(self, value: T, read_at: float, contents: bytes | None) -> None:
        self.value, self.read_at, self.contents = value, read_at, contents
        self.as_of = read_at  # when the database was last known to be so


class Snapshot(Generic[T]):
    """A value read from the database, read again when it is older than `max_age` seconds.

    In a server the value is kept fresh by a thread (`keep_fresh`), and an event loop takes what is
    there, so that a database that hangs stops no loop. When reading fails, the last value stays in
    force. `tables` are the models whose rows alone `read` looks at, and the time of day.
    """

    def __init__(
        self,
        read: Callable[[], T],
        tables: Sequence[type[Model]] = (),
        *,
        max_age: float = MAX_AGE_SECONDS,
    ) -> None:
        self._read = read
        self.tables = tables
        self._max_age = max_age
        self._held: _Held[T] | None = None
        self._last: T | None = None
        # How often the value was forgotten: what was read before the last time is not held.
        self._forgotten = 0
        self._lock = threading.Lock()
        _snapshots.append(self)

    def __call__(self) -> T:
        """Return the present value. Reads the database when the held one is too old.

        Raises DatabaseError when it cannot be read and never was.
        """
        if (young := self._young()) is not None:
            return young
        if _in_event_loop() and (last := self.at_hand()) is not None:
            return last
        return self.refresh()

    def at_hand(self) -> T | None:
        """Return the value where an event loop has it without reading, else None."""
        if (young := self._young()) is not None:
            return young
        return self._last if _is_kept_fresh else None

    def _young(self) -> T | None:
        held = self._held
        if held is None or clock.monotonic() - held.as_of > self._max_age:
            return None
        return held.value

    def refresh(self, contents: bytes | None = None) -> T:
        """Read the value anew and return it."""
        # The time is taken before the read: the value may be older than it, never younger.
        read_at = clock.monotonic()
        forgotten = self._forgotten
        try:
            # Django refuses to use the database on a thread that runs an event loop.
            value = (
                _reader.submit(_read_and_close, self._read).result()
                if _in_event_loop()
                else self._read()
            )
        except DatabaseError:
            if self._last is None:
                raise
            logger.warning("configuration: cannot be read; the last one stays in force")
            value, contents = self._last, None
        with self._lock:
            if forgotten == self._forgotten:
                self._held = _Held(value, read_at, contents)
            if forgotten == self._forgotten or self._last is None:
                self._last = value
        return value

    def freshen(self) -> None:
        """Read the value anew, unless its rows are as they were: what they say takes longer.

        Every so often even then, because of the time of day. Raises DatabaseError.
        """
        looked_at = clock.monotonic()
        contents = _contents(self.tables) if self.tables else None
        with self._lock:
            held = self._held
            if (
                held
                and contents
                and held.contents == contents
                and looked_at - held.read_at < MAX_CONFIRMED_SECONDS
            ):
                held.as_of = looked_at
                return
        self.refresh(contents)

    def forget(self) -> None:
        """Read anew at the next call, and once more after the transaction under way ends."""
        # Asked first, because `on_commit` opens a connection where there is none.
        if transaction.get_connection().in_atomic_block:
            self._drop()
            transaction.on_commit(self._renew)
        else:
            self._renew()

    def _renew(self) -> None:
        """Forget, and where event loops take what is there, let it be the new value."""
        self._drop()
        if _is_kept_fresh:
            with contextlib.suppress(Exception):  # the thread that keeps it fresh says why
                self.refresh()

    def _drop(self) -> None:
        with self._lock:
            self._forgotten += 1
            self._held = None
        _asked.set()


_snapshots: list[Snapshot[Any]] = []
_is_kept_fresh = False
# Set when a value was forgotten: the thread that keeps them fresh reads at once.
_asked = threading.Event()
_reader = ThreadPoolExecutor(max_workers=1, thread_name_prefix="configuration")


def _in_event_loop() -> bool:
    try:
        asyncio.get_running_loop()
    except RuntimeError:
        return False
    return True


def _read_and_close(read: Callable[[], T]) -> T:
    try:
        return read()
    finally:
        connections.close_all()


@contextlib.contextmanager
def keep_fresh() -> Iterator[None]:
    """Keep every snapshot of this process fresh, on a thread of its own, while this lasts.

    They are read once before this begins. Raises DatabaseError.
    """
    global _is_kept_fresh
    for snapshot in _snapshots:
        snapshot()
    stopped = threading.Event()

    def serve() -> None:
        while not stopped.is_set():
            if _asked.wait(MAX_AGE_SECONDS / 2):
                _asked.clear()
            try:
                on_kept_connection(_freshen)
            except Exception:
                # This thread never ends: without it, old values would stay in force for ever.
                logger.exception("configuration: it cannot be read; the last one stays in force")
        connections.close_all()

    thread = threading.Thread(target=serve, name="configuration", daemon=True)
    thread.start()
    _is_kept_fresh = True
    try:
        yield
    finally:
        _is_kept_fresh = False
        stopped.set()
        _asked.set()
        thread.join(JOIN_SECONDS)


def _freshen() -> None:
    for snapshot in _snapshots:
        try:
            snapshot.freshen()
        except DatabaseError:
            logger.warning("configuration: cannot be read; the last one stays in force")


def _contents(tables: Sequence[type[Model]]) -> bytes:
    """Return what stands for all rows of these tables: as long as none changes, it is the same."""
    return blake2b("\0".join(columns.all_of(tables)).encode(), digest_size=16).digest()


@dataclass(frozen=True, slots=True)
class AgentConfiguration:
    """One agent; the fields are those of `wake.models.Agent`."""

    id: str
    name: str = ""
    enabled: bool = True
    paused: bool = False
    heartbeat_every: timedelta = timedelta(minutes=30)
    active_from: time | None = None
    active_until: time | None = None
    time_zone: str = "UTC"
    idle_runs: IdleRuns = IdleRuns.ALWAYS
    heartbeat_prompt: str = ""
    runner: RunnerKind = RunnerKind.NONE
    command: tuple[str, ...] = ()
    url: str = ""
    model: str = ""
    key_variable: str = ""
    transcript_bytes: int = 64 * 1024
    signing_secret: str = field(default="", repr=False)
    timeout: timedelta = timedelta(minutes=10)
    max_attempts: int = 8
    max_parallel_runs: int | None = None
    max_runs_per_minute: int | None = None
    max_self_wakes: int | None = None
    reply_url: str = ""

    @property
    def only_with_events(self) -> bool:
        """Whether heartbeats without events do not run. Another gateway has its own schedule."""
        return self.idle_runs == IdleRuns.WITH_EVENTS or self.runner == RunnerKind.OPENCLAW

    @property
    def runs(self) -> bool:
        """Whether due heartbeats of this agent may run; otherwise its events wait."""
        return self.enabled and not self.paused and self.runner != RunnerKind.NONE

    @property
    def schedule(self) -> Schedule:
        """When its main session has a heartbeat by itself."""
        return Schedule(self.heartbeat_every, self.active_from, self.active_until, self.time_zone)


@dataclass(frozen=True, slots=True)
class Reach:
    """How an agent is reached, where that depends on connections that processes hold.

    `clients` and `capacity` are those of the agent's programs that are connected (runner `inbox`);
    `problem` is why it is reached by none, for a person, or empty.
    """

    clients: int = 0
    capacity: int = 0
    problem: str = ""


@dataclass(frozen=True, slots=True)
class GatewayConfiguration:
    """The gateway's settings and all agents, by id and in the order of their ids."""

    agents: Mapping[str, AgentConfiguration]
    default_agent: str = "main"
    main_key: str = "main"
    scope: Scope = "per-agent"
    heartbeats_enabled: bool = True
    max_parallel_heartbeats: int = 16
    max_queued_events: int = 10_000
    # By agent id: how the heartbeat processes reach those that not every one of them can.
    reach: Mapping[str, Reach] = field(default_factory=lambda: MappingProxyType({}))

    def agent(self, agent_id: str | None) -> AgentConfiguration:
        """Return the enabled agent that a request selects, or the default one for None or blank.

        Raises AgentError, naming the agent, when it does not exist or is disabled.
        """
        wanted = (agent_id or "").strip().lower() or self.default_agent
        agent = self.agents.get(wanted)
        if agent is None:
            raise AgentError(f'unknown agent "{_shown(wanted)}"')
        if not agent.enabled:
            raise AgentError(f'agent "{wanted}" is disabled')
        return agent

    def main_session(self, agent_id: str) -> SessionKey:
        """Return the main session of the agent."""
        return main_session_key(agent_id, main_key=self.main_key, scope=self.scope)


def _shown(agent_id: str) -> str:
    return ascii(agent_id[:80])[1:-1]


@contextlib.contextmanager
def at_one_moment() -> Iterator[None]:
    """Let all that is read meanwhile be as it was at one moment. It is for reading alone.

    In a transaction it is that one which says what is seen.
    """
    if connection.in_atomic_block:
        yield
        return
    # Django's own transactions are for writing: on SQLite they keep out others who write.
    begin = "BEGIN" if columns.is_sqlite() else "BEGIN ISOLATION LEVEL REPEATABLE READ READ ONLY"
    with connection.cursor() as cursor:
        cursor.execute(begin)
        try:
            yield
        finally:
            cursor.execute("ROLLBACK")  # nothing was written


def read() -> GatewayConfiguration:
    """Read the configuration from the database."""
    with at_one_moment():
        if stored := GatewaySettings.objects.first():
            return _configured(stored)
    return _configured(GatewaySettings.ensure())


def _configured(stored: GatewaySettings) -> GatewayConfiguration:
    return GatewayConfiguration(
        agents=MappingProxyType(
            {agent.pk: _frozen(agent) for agent in Agent.objects.order_by("pk")}
        ),
        default_agent=stored.default_agent_id,
        main_key=stored.main_key,
        scope=cast("Scope", stored.scope),
        heartbeats_enabled=stored.heartbeats_enabled,
        max_parallel_heartbeats=stored.max_parallel_heartbeats,
        max_queued_events=stored.max_queued_events,
        reach=MappingProxyType(_reach(timezone.now())),
    )


def _reach(now: datetime) -> dict[str, Reach]:
    """Return how all processes together reach their agents, from what each of them last said."""
    together: dict[str, Reach] = {}
    for said in AgentReach.objects.filter(seen_at__gt=now - REACH_COUNTS_FOR).order_by("pk"):
        known = together.get(said.agent_id)
        together[said.agent_id] = Reach(
            clients=said.clients + (known.clients if known else 0),
            capacity=said.capacity + (known.capacity if known else 0),
            # One that reaches it is enough.
            problem=said.problem if known is None or known.problem else "",
        )
    return together


def _frozen(agent: Agent) -> AgentConfiguration:
    return AgentConfiguration(
        id=agent.pk,
        name=agent.name,
        enabled=agent.enabled,
        paused=agent.paused,
        heartbeat_every=agent.heartbeat_every,
        active_from=agent.active_from,
        active_until=agent.active_until,
        time_zone=agent.time_zone,
        idle_runs=IdleRuns(agent.idle_runs),
        heartbeat_prompt=agent.heartbeat_prompt,
        # A kind that does not exist here (yet, or any more) reaches nobody: events wait.
        runner=RunnerKind(agent.runner) if agent.runner in RunnerKind else RunnerKind.NONE,
        command=tuple(agent.command),
        url=agent.url,
        model=agent.model,
        key_variable=agent.key_variable,
        transcript_bytes=agent.transcript_bytes,
        signing_secret=agent.signing_secret,
        timeout=timedelta(seconds=agent.timeout_seconds),
        max_attempts=agent.max_attempts,
        max_parallel_runs=agent.max_parallel_runs,
        max_runs_per_minute=agent.max_runs_per_minute,
        max_self_wakes=agent.max_self_wakes,
        reply_url=agent.reply_url,
    )


gateway: Snapshot[GatewayConfiguration] = Snapshot(read, [GatewaySettings, Agent, AgentReach])
