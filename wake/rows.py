"""The rows that the queue moves for every wake, read and written without model objects.

`wake.queue` alone uses this. Building a query and an object for each row costs ten times what the
database takes for it; these statements are written once and work on SQLite and PostgreSQL.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from uuid import UUID

from django.db import connection

from wake import columns
from wake.models import EventState, Session, SystemEvent
from wake.session_keys import SessionKey

_SESSIONS: Final = Session._meta.db_table
_EVENTS: Final = SystemEvent._meta.db_table
# SQLite takes 32,766 parameters in a statement, PostgreSQL 65,535.
_MOST_PARAMETERS: Final = 10_000


@dataclass(slots=True)
class SessionRow:
    """A session as the queue decides about it; the fields are those of the model."""

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
    last_event_at: datetime | None
    lease_token: object | None


_SESSION_COLUMNS: Final = (
    "id, agent_id, key, queued, attempts, due_at, due_reason, held_until, held_by, own_runs, "
    "batch_through, last_event_at, lease_token"
)
_SAVE_SESSION: Final = (
    f"UPDATE {_SESSIONS} SET queued = %s, attempts = %s, due_at = %s, due_reason = %s, "  # noqa: S608
    "held_until = %s, held_by = %s, last_event_at = %s WHERE id = %s"
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


@dataclass(frozen=True, slots=True)
class EventRow:
    """An event that is stored or to be stored; `pk` is None until it is."""

    uid: UUID
    session_id: int
    text: str
    source: str
    external: bool
    alone: bool
    own: bool
    pk: int | None = None


def lock_sessions(keys: Collection[SessionKey]) -> list[SessionRow]:
    """Return the sessions that exist, locked until the transaction ends.

    In the order of their ids, so that two batches never wait for each other in a circle.
    """
    lock = " FOR UPDATE" if connection.features.has_select_for_update else ""
    rows: list[SessionRow] = []
    for part in _parts(sorted(keys)):
        agents = sorted({key.agent_id for key in part})
        rows += _fetch(
            f"SELECT {_SESSION_COLUMNS} FROM {_SESSIONS} "  # noqa: S608 - columns and marks only
            f"WHERE agent_id IN ({columns.marks(agents)}) AND key IN ({columns.marks(part)}) "
            f"ORDER BY id{lock}",
            [*agents, *(key.key for key in part)],
            _session,
        )
    return [row for row in rows if SessionKey(row.agent_id, row.key) in keys]


def save_sessions(sessions: Iterable[SessionRow]) -> None:
    """Store what an arriving event changes of its session."""
    moment = columns.moments()
    with connection.cursor() as cursor:
        cursor.executemany(
            _SAVE_SESSION,
            [
                (
                    row.queued,
                    row.attempts,
                    moment(row.due_at),
                    row.due_reason,
                    moment(row.held_until),
                    row.held_by,
                    moment(row.last_event_at),
                    row.pk,
                )
                for row in sessions
            ],
        )


def insert_events(events: Sequence[EventRow], now: datetime) -> None:
    """Store new events as queued, in their order."""
    if not events:
        return
    created_at = columns.moments()(now)
    columns.insert(
        _EVENTS,
        _EVENT_COLUMNS,
        (
            (
                columns.uuid(event.uid),
                event.session_id,
                event.text,
                event.source,
                event.external,
                event.alone,
                event.own,
                EventState.QUEUED.value,
                created_at,
            )
            for event in events
        ),
    )


def newest_queued_events(session_ids: Sequence[int]) -> list[EventRow]:
    """Return the newest queued event of each of the sessions that has one.

    A statement of its own after the sessions are locked: on PostgreSQL a statement that waited
    for a lock still sees the events as they were before it waited.
    """
    rows: list[EventRow] = []
    for part in _parts(session_ids):
        rows += _fetch(
            "SELECT uid, session_id, text, source, external, alone, own, id "  # noqa: S608
            f"FROM {_EVENTS} WHERE id IN (SELECT (SELECT e.id FROM {_EVENTS} e "
            f"WHERE e.session_id = s.id AND e.state = 'queued' ORDER BY e.id DESC LIMIT 1) "
            f"FROM {_SESSIONS} s WHERE s.id IN ({columns.marks(part)}))",
            part,
            _event,
        )
    return rows


def _session(row: Sequence[Any]) -> SessionRow:
    pk, agent_id, key, queued, attempts, due_at, due_reason, held_until, *rest = row
    held_by, own_runs, batch_through, last_event_at, lease_token = rest
    return SessionRow(
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
        columns.moment_of(last_event_at),
        lease_token,
    )


def _event(row: Sequence[Any]) -> EventRow:
    return EventRow(columns.uuid_of(row[0]), *row[1:])


def _fetch(statement: str, parameters: Sequence[Any], make: Any) -> list[Any]:
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        return [make(row) for row in cursor.fetchall()]


def _parts(values: Sequence[Any]) -> Iterable[Sequence[Any]]:
    return (
        values[start : start + _MOST_PARAMETERS]
        for start in range(0, len(values), _MOST_PARAMETERS)
    )
