"""The rows that the queue moves for every wake, read and written without model objects.

`wake.queue` alone moves events with this. Building a query and an object for each row costs ten
times what the database takes for it; these statements are written once and work on SQLite and
PostgreSQL.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from datetime import datetime
from typing import Any, Final
from uuid import UUID

import msgspec

from wake import columns
from wake.models import (
    PRIORITIES,
    Agent,
    AgentTurn,
    EventState,
    Heartbeat,
    HeartbeatStatus,
    Session,
    SystemEvent,
)
from wake.session_keys import SessionKey

_AGENTS: Final = Agent._meta.db_table
_HEARTBEATS: Final = Heartbeat._meta.db_table
_SESSIONS: Final = Session._meta.db_table
_TURNS: Final = AgentTurn._meta.db_table
_EVENTS: Final = SystemEvent._meta.db_table
# SQLite takes 32,766 parameters in a statement, PostgreSQL 65,535.
_MOST_PARAMETERS: Final = 10_000
_LAST_ID: Final = 2**63 - 1
_EVENTS_AT_ONCE: Final = 50


class SessionRow(msgspec.Struct):
    """A session as the queue decides about it; the fields are those of the model.

    `last_event_at` is not read: it is set where an event arrives, with `newest_digest`. `stored` is
    what `is_moved` compares with.
    """

    pk: int
    agent_id: str
    key: str
    queued: int
    attempts: int
    due_at: datetime | None
    due_reason: str
    held_until: datetime | None
    held_by: str
    own_runs: int
    batch_through: int | None
    lease_token: UUID | None
    newest_digest: str
    last_event_at: datetime | None = None
    stored: tuple[Any, ...] = ()

    def turns(self) -> tuple[Any, ...]:
        """Return what says when the session has its next heartbeat, and why."""
        return self.attempts, self.due_at, self.due_reason, self.held_until, self.held_by

    @property
    def is_moved(self) -> bool:
        """Whether its next heartbeat is another one than when it was read."""
        return self.turns() != self.stored


_SESSION_COLUMNS: Final = (
    "id, agent_id, key, queued, attempts, due_at, due_reason, held_until, held_by, own_runs, "
    "batch_through, lease_token, newest_digest"
)
_DUE_COLUMNS: Final = ("due_at", "due_reason", "held_until", "held_by")
_ARRIVAL_COLUMNS: Final = ("queued", "newest_digest", "last_event_at")
_TURN_COLUMNS: Final = ("attempts", *_DUE_COLUMNS)
_LEASE_COLUMNS: Final = (
    "lease_token",
    "lease_owner",
    "lease_until",
    "attempts",
    *_DUE_COLUMNS,
    "batch_through",
    "own_runs",
)
_FREE_COLUMNS: Final = (
    "lease_token",
    "lease_owner",
    "lease_until",
    "queued",
    "newest_digest",
    "attempts",
    *_DUE_COLUMNS,
    "batch_through",
)
_HEARTBEAT_COLUMNS: Final = (
    "run_id",
    "session_id",
    "reason",
    "attempt",
    "runner",
    "status",
    "event_count",
    "started_at",
    "prompt",
    "reply",
    "error",
)
_EVENT_COLUMNS: Final = (
    "uid",
    "session_id",
    "text",
    "source",
    "external",
    "alone",
    "own",
    "state",
    "created_at",
)


class EventRow(msgspec.Struct, frozen=True):
    """An event that is stored or to be stored; `pk` is None until it is."""

    uid: UUID
    session_id: int
    text: str
    source: str
    external: bool
    alone: bool
    own: bool
    pk: int | None = None


class QueuedEvent(msgspec.Struct, frozen=True):
    """A queued event as a heartbeat takes it, with the turn of its own that it may have."""

    pk: int
    uid: UUID
    text: str
    source: str
    external: bool
    created_at: datetime
    own: bool
    alone: bool
    turn_name: str | None
    turn_deliver: bool | None
    turn_timeout_seconds: int | None


# --- Sessions -----------------------------------------------------------------------------------


def lock_sessions(keys: Collection[SessionKey]) -> dict[SessionKey, SessionRow]:
    """Return the sessions that exist, by key, locked until the transaction ends.

    In the order of their ids where rows are locked, so that two batches never wait for each other
    in a circle. Elsewhere the order would have SQLite read every session of the agent.
    """
    order = " ORDER BY id" if not columns.is_sqlite() else ""
    found: dict[SessionKey, SessionRow] = {}
    for part in _parts(sorted(keys)):
        of_agents, agents = columns.any_of("agent_id", sorted({key.agent_id for key in part}))
        named, names = columns.any_of("key", [key.key for key in part])
        for row in _sessions(f"{of_agents} AND {named}{order}", [*agents, *names]):
            # Two agents may have sessions with the same key, of which only one is wanted.
            if (key := SessionKey(row.agent_id, row.key)) in keys:
                found[key] = row
    return found


def lock(session_ids: Collection[int]) -> None:
    """Lock sessions in the order of their ids, as `lock_sessions` does."""
    if not columns.is_sqlite() and session_ids:
        condition, parameters = columns.any_of("id", sorted(session_ids))
        columns.fetch(
            f"SELECT id FROM {_SESSIONS} WHERE {condition} ORDER BY id FOR UPDATE",  # noqa: S608
            parameters,
        )


def first_due(agents: Sequence[str]) -> dict[int, dict[str, datetime]]:
    """Return, by priority, when the first free session of each agent is due; past or not.

    One look into the index for each agent and priority.
    """
    if not agents:
        return {}
    looks = ", ".join(
        f"(SELECT s.due_at FROM {_SESSIONS} s WHERE s.agent_id = a.id "  # noqa: S608
        f"AND s.priority = {priority} AND s.due_at IS NOT NULL AND s.lease_token IS NULL "
        "ORDER BY s.due_at LIMIT 1)"
        for priority in PRIORITIES
    )
    found: dict[int, dict[str, datetime]] = {priority: {} for priority in PRIORITIES}
    for part in _parts(agents):
        condition, parameters = columns.any_of("a.id", part)
        statement = f"SELECT a.id, {looks} FROM {_AGENTS} a WHERE {condition}"  # noqa: S608
        for agent_id, *times in columns.fetch(statement, parameters):
            for priority, stored in zip(PRIORITIES, times, strict=True):
                if (due_at := columns.moment_of(stored)) is not None:
                    found[priority][agent_id] = due_at
    return found


def due_sessions(agent_id: str, priority: int, now: datetime, limit: int) -> list[SessionRow]:
    """Return free sessions of an agent that are due, the longest due first, locked.

    Another process may hold a row's lock: it is claiming it, so it is skipped.
    """
    return _sessions(
        "agent_id = %s AND priority = %s AND due_at <= %s AND due_at IS NOT NULL "
        "AND lease_token IS NULL ORDER BY due_at, id LIMIT %s",
        [agent_id, priority, columns.moments()(now), limit],
        skip_locked=True,
    )


def leased_sessions(leases: Mapping[UUID, int]) -> dict[UUID, SessionRow]:
    """Return, by run, the sessions whose leases are those of the runs given with them; locked."""
    found: dict[UUID, SessionRow] = {}
    order = "" if columns.is_sqlite() else " ORDER BY id"
    for part in _parts(sorted(leases.values())):
        condition, parameters = columns.any_of("id", part)
        for row in _sessions(f"{condition}{order}", parameters):
            if row.lease_token is not None and leases.get(row.lease_token) == row.pk:
                found[row.lease_token] = row
    return found


def save_arrivals(sessions: Iterable[SessionRow]) -> None:
    """Store what an arriving event, or a schedule, changes of its session.

    What has not changed is not written: three indexes are on the time that a session is due.
    """
    moment = columns.moments()
    changes: defaultdict[tuple[str, ...], list[tuple[Any, ...]]] = defaultdict(list)
    for row in sessions:
        came: tuple[Any, ...] = ()
        if row.last_event_at is not None:
            came = (row.queued, row.newest_digest, moment(row.last_event_at))
        moved = (row.attempts, *_due(row, moment)) if row.is_moved else ()
        if came or moved:
            changed = (_ARRIVAL_COLUMNS if came else ()) + (_TURN_COLUMNS if moved else ())
            changes[changed].append((row.pk, *came, *moved))
    for changed, values in changes.items():
        columns.update(_SESSIONS, changed, values)


def save_leases(sessions: Iterable[SessionRow], *, owner: str, until: datetime) -> None:
    """Store sessions that were leased."""
    moment, uuid = columns.moments(), columns.uuids()
    columns.update(
        _SESSIONS,
        _LEASE_COLUMNS,
        [
            (
                row.pk,
                uuid(row.lease_token) if row.lease_token else None,
                owner,
                moment(until),
                row.attempts,
                *_due(row, moment),
                row.batch_through,
                row.own_runs,
            )
            for row in sessions
        ],
    )


def save_free(sessions: Iterable[SessionRow], *, last_heartbeat_at: datetime | None = None) -> None:
    """Store sessions whose leases are given back; the time of their last heartbeat, if it ended.

    Events may have left the queue: which one is the newest now is to be looked up.
    """
    moment = columns.moments()
    ended = () if last_heartbeat_at is None else (moment(last_heartbeat_at),)
    columns.update(
        _SESSIONS,
        (*_FREE_COLUMNS, "last_heartbeat_at") if ended else _FREE_COLUMNS,
        [
            (
                row.pk,
                None,
                "",
                None,
                row.queued,
                "",
                row.attempts,
                *_due(row, moment),
                row.batch_through,
                *ended,
            )
            for row in sessions
        ],
    )


# --- Heartbeats ---------------------------------------------------------------------------------


class HeartbeatRow(msgspec.Struct, frozen=True):
    """A heartbeat that begins."""

    run_id: UUID
    session_id: int
    reason: str
    attempt: int
    runner: str
    event_count: int


def insert_heartbeats(heartbeats: Iterable[HeartbeatRow], now: datetime) -> None:
    """Store heartbeats as running."""
    started_at, uuid = columns.moments()(now), columns.uuids()
    columns.insert(
        _HEARTBEATS,
        _HEARTBEAT_COLUMNS,
        [
            (
                uuid(row.run_id),
                row.session_id,
                row.reason,
                row.attempt,
                row.runner,
                HeartbeatStatus.RUNNING.value,
                row.event_count,
                started_at,
                "",
                "",
                "",
            )
            for row in heartbeats
        ],
    )


def newest_starts(session_id: int, limit: int) -> list[datetime]:
    """Return when the newest heartbeats of a session began, the newest first."""
    statement = (
        f"SELECT started_at FROM {_HEARTBEATS} WHERE session_id = %s ORDER BY id DESC LIMIT %s"  # noqa: S608
    )
    found = (columns.moment_of(row[0]) for row in columns.fetch(statement, [session_id, limit]))
    return [started_at for started_at in found if started_at is not None]


class Ending(msgspec.Struct, frozen=True):
    """How a heartbeat ended."""

    status: str
    prompt: str = ""
    reply: str = ""
    error: str = ""


def heartbeats_of(run_ids: Sequence[UUID]) -> dict[UUID, int]:
    """Return the primary keys of heartbeats, by run."""
    uuid = columns.uuids()
    found: dict[UUID, int] = {}
    for part in _parts([uuid(run_id) for run_id in run_ids]):
        condition, parameters = columns.any_of("run_id", part)
        statement = f"SELECT run_id, id FROM {_HEARTBEATS} WHERE {condition}"  # noqa: S608
        for run_id, pk in columns.fetch(statement, parameters):
            found[columns.uuid_of(run_id)] = pk
    return found


def finish_heartbeats(endings: Mapping[int, Ending], now: datetime) -> None:
    """Store the ends of heartbeats, by primary key."""
    finished_at = columns.moments()(now)
    columns.update(
        _HEARTBEATS,
        ("status", "finished_at", "prompt", "reply", "error"),
        [
            (pk, ending.status, finished_at, ending.prompt, ending.reply, ending.error)
            for pk, ending in endings.items()
        ],
    )


# --- Events -------------------------------------------------------------------------------------


def insert_events(events: Sequence[EventRow], now: datetime) -> None:
    """Store new events as queued, in their order."""
    created_at, uuid, flag = columns.moments()(now), columns.uuids(), columns.flags()
    columns.insert(
        _EVENTS,
        _EVENT_COLUMNS,
        [
            (
                uuid(event.uid),
                event.session_id,
                event.text,
                event.source,
                flag(event.external),
                flag(event.alone),
                flag(event.own),
                EventState.QUEUED.value,
                created_at,
            )
            for event in events
        ],
    )


def queued_events(session_id: int, through: int | None, limit: int) -> Iterator[QueuedEvent]:
    """Yield queued events of a session in their order, up to the event `through` if given."""
    found = columns.stream(
        "SELECT e.id, e.uid, e.text, e.source, e.external, e.created_at, e.own, e.alone, "  # noqa: S608
        f"t.name, t.deliver, t.timeout_seconds FROM {_EVENTS} e "
        f"LEFT JOIN {_TURNS} t ON t.event_id = e.id WHERE {_queued('%s', '%s', table='e.')} "
        "ORDER BY e.session_id, e.state, e.id LIMIT %s",
        [session_id, session_id, _LAST_ID if through is None else through, limit],
        # Texts are long, and a heartbeat takes no more than some bytes.
        at_once=_EVENTS_AT_ONCE,
    )
    for pk, uid, text, source, external, created_at, *rest in found:
        at = columns.moment_of(created_at)
        assert at is not None  # noqa: S101 - the column is never null
        yield QueuedEvent(pk, columns.uuid_of(uid), text, source, external, at, *rest)


def settle_events(heartbeats: Mapping[int, int], state: str, now: datetime) -> set[int]:
    """Settle events, each by the heartbeat given with it, both by primary key; return which.

    Those that are not queued any more are left as they are.
    """
    queued: set[int] = set()
    for part in _parts(list(heartbeats)):
        condition, parameters = columns.any_of("id", part)
        statement = f"SELECT id FROM {_EVENTS} WHERE {condition} AND state = 'queued'"  # noqa: S608
        queued |= {row[0] for row in columns.fetch(statement, parameters)}
    settled_at = columns.moments()(now)
    columns.update(
        _EVENTS,
        ("state", "settled_at", "heartbeat_id"),
        [(pk, state, settled_at, heartbeats[pk]) for pk in sorted(queued)],
    )
    return queued


def newest_events(session_id: int, limit: int, *, before: int | None = None) -> list[int]:
    """Return the ids of a session's newest events, or of those before one; the newest first.

    A look into the index for each state.
    """
    bound = "" if before is None else "AND id < %s "
    look = (
        f"SELECT id FROM (SELECT id FROM {_EVENTS} WHERE session_id = %s AND state = %s {bound}"  # noqa: S608
        "ORDER BY id DESC LIMIT %s) AS newest"
    )
    parameters: list[Any] = []
    for state in EventState:
        until = () if before is None else (before,)
        parameters += [session_id, state.value, *until, limit]
    looks = " UNION ALL ".join([look] * len(EventState))
    found = columns.fetch(f"{looks} ORDER BY id DESC LIMIT %s", [*parameters, limit])
    return [row[0] for row in found]


def newest_queued_events(session_ids: Sequence[int]) -> list[EventRow]:
    """Return the newest queued event of each of the sessions that has one.

    A statement of its own after the sessions are locked: on PostgreSQL a statement that waited
    for a lock still sees the events as they were before it waited.
    """
    found: list[EventRow] = []
    made = columns.json_array("uid, session_id, text, source, external, alone, own, id")
    look = (
        f"SELECT {made} FROM {_EVENTS} WHERE {_queued('s.id', str(_LAST_ID))} "  # noqa: S608
        "ORDER BY session_id DESC, state DESC, id DESC LIMIT 1"
    )
    for part in _parts(session_ids):
        condition, parameters = columns.any_of("s.id", part)
        statement = f"SELECT ({look}) FROM {_SESSIONS} s WHERE {condition}"  # noqa: S608
        for uid, session_id, text, source, external, alone, own, pk in columns.fetch_json(
            statement, parameters
        ):
            found.append(
                EventRow(
                    columns.uuid_of(uid),
                    session_id,
                    text,
                    source,
                    bool(external),
                    bool(alone),
                    bool(own),
                    pk,
                )
            )
    return found


# --- Pieces -------------------------------------------------------------------------------------


def _queued(session: str, through: str, *, table: str = "") -> str:
    """Return the condition for a session's queued events up to an id: a part of `event_session`.

    Ordered by all columns of that index, they are read from it and from nowhere else. With three
    conditions and an order by id, PostgreSQL may read all events by their ids until it comes to
    enough of the session.
    """
    place = f"({table}session_id, {table}state, {table}id)"
    return f"{place} >= ({session}, 'queued', 0) AND {place} <= ({session}, 'queued', {through})"


def _sessions(
    where: str, parameters: Sequence[Any], *, skip_locked: bool = False
) -> list[SessionRow]:
    lock = ""
    if not columns.is_sqlite():
        lock = " FOR UPDATE SKIP LOCKED" if skip_locked else " FOR UPDATE"
    found = columns.select(_SESSION_COLUMNS, f"FROM {_SESSIONS} WHERE {where}{lock}", parameters)
    return [_session(row) for row in found]


def _session(columns_of_it: Sequence[Any]) -> SessionRow:
    pk, agent_id, key, queued, attempts, due_at, due_reason, held_until, *rest = columns_of_it
    held_by, own_runs, batch_through, lease_token, newest_digest = rest
    row = SessionRow(
        pk,
        agent_id,
        key,
        queued,
        attempts,
        columns.moment_of(due_at),
        due_reason,
        columns.moment_of(held_until),
        held_by,
        own_runs,
        batch_through,
        columns.uuid_of(lease_token) if lease_token is not None else None,
        newest_digest,
    )
    row.stored = row.turns()
    return row


def _due(row: SessionRow, moment: Callable[[datetime | None], Any]) -> tuple[Any, ...]:
    return moment(row.due_at), row.due_reason, moment(row.held_until), row.held_by


def _parts(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (
        values[start : start + _MOST_PARAMETERS]
        for start in range(0, len(values), _MOST_PARAMETERS)
    )
