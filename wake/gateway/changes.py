"""What has changed in the database since the last look: new events, and runs that began or ended.

Rows are followed by their ids. On PostgreSQL a transaction can commit a lower id after a higher one
was seen; so ids that are missing are looked for again until no transaction can still hold them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Iterable
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any, Final

from django.db.models import Max, Q, QuerySet

from wake import configuration
from wake.configuration import GatewayConfiguration
from wake.gateway import records
from wake.models import Heartbeat, HeartbeatStatus, Session, SystemEvent
from wake.session_keys import SessionKey
from wake.status import milliseconds, with_preview

# A transaction ends within this time: the database's own limits are shorter (see settings).
GAP_SECONDS: Final = 20.0
MAX_GAPS: Final = 5000
# So far back it is looked for ids that are missing at the start.
GAPS_AT_START: Final = 1000
ROWS_AT_ONCE: Final = 500
# So many changed sessions are told one by one; of more it is told that there are many.
MAX_SESSIONS_TOLD: Final = 50
MAX_KEYS_HELD: Final = 10_000


class Cursor:
    """How far a growing table was read, by its ids, and which ids before that were missing."""

    def __init__(self, newest: int) -> None:
        self._newest = newest
        self._missing: dict[int, float] = {}

    def unseen(self) -> Q:
        """Return the condition for rows that were not read yet."""
        return Q(pk__gt=self._newest) | Q(pk__in=list(self._missing))

    def saw(self, ids: Iterable[int], now: float) -> None:
        """Note what was read; `now` is a clock in seconds that is never set."""
        for pk in sorted(ids):
            self._missing.pop(pk, None)
            for missing in range(max(self._newest + 1, pk - MAX_GAPS), pk):
                self._missing[missing] = now + GAP_SECONDS
            self._newest = max(self._newest, pk)
        given_up = [pk for pk, until in self._missing.items() if until < now]
        for pk in given_up + list(self._missing)[: max(0, len(self._missing) - MAX_GAPS)]:
            self._missing.pop(pk, None)


@dataclass(slots=True)
class Changes:
    """What is told of by the events `heartbeat`, `session.message` and `sessions.changed`.

    Unless it `is_all`, there may be more to read already. Payloads are as the protocol writes them.
    """

    heartbeats: list[dict[str, Any]] = field(default_factory=list)
    messages: list[tuple[SessionKey, dict[str, Any]]] = field(default_factory=list)
    sessions: list[dict[str, Any]] = field(default_factory=list)
    is_all: bool = True


class Follower:
    """Reads what changed, look by look. Used by one thread at a time."""

    def __init__(self) -> None:
        self._events: Cursor | None = None
        self._heartbeats = Cursor(0)
        self._running: set[int] = set()
        self._keys: dict[int, SessionKey] = {}
        self._configuration: GatewayConfiguration | None = None

    def start(self) -> None:
        """Begin at the present; what changed before is not told. Raises DatabaseError."""
        if self._events is not None:
            return
        # The heartbeats' cursor before the running ones: what begins in between is seen as new.
        heartbeats = _cursor(Heartbeat.objects.all())
        running = Heartbeat.objects.filter(status=HeartbeatStatus.RUNNING)
        self._running = set(running.exclude(heartbeats.unseen()).values_list("pk", flat=True))
        self._heartbeats = heartbeats
        self._configuration = configuration.gateway()
        self._events = _cursor(SystemEvent.objects.all())

    def look(
        self,
        changed: Collection[int],
        followed: Callable[[], Collection[SessionKey]],
        tells_sessions: Callable[[], bool],
        *,
        now: datetime,
    ) -> Changes:
        """Return what is new. Raises DatabaseError; then the next look finds the same and more.

        `changed` are the ids of sessions that are known to have changed. `followed` says whose
        events and heartbeats are told, `tells_sessions` whether changes of sessions are; they are
        asked once it is known what is new.
        """
        assert self._events is not None, "start first"  # noqa: S101 - a rule for our own code
        events = dict(
            SystemEvent.objects.filter(self._events.unseen())
            .order_by("pk")
            .values_list("pk", "session_id")[:ROWS_AT_ONCE]
        )
        ended = Q(pk__in=self._running) & ~Q(status=HeartbeatStatus.RUNNING)
        runs = {
            run.pk: run
            for run in with_preview(
                Heartbeat.objects.filter(self._heartbeats.unseen() | ended)
            ).order_by("pk")[:ROWS_AT_ONCE]
        }
        of_runs = {run.session_id for run in runs.values()}
        touched = {*changed, *events.values(), *of_runs}
        self._learn_keys({*events.values(), *of_runs})
        found = Changes(is_all=len(events) < ROWS_AT_ONCE and len(runs) < ROWS_AT_ONCE)
        for run in runs.values():
            found.heartbeats += self._told(run)
        if sessions := set(followed()):
            found.messages = self._messages(events, runs, sessions)
        if tells_sessions():
            found.sessions = self._sessions(touched, set(events.values()), of_runs, now)
        # Only now: what failed above is looked for again.
        self._events.saw(events, time.monotonic())
        self._heartbeats.saw(runs, time.monotonic())
        for pk, run in runs.items():
            if run.status == HeartbeatStatus.RUNNING:
                self._running.add(pk)
            else:
                self._running.discard(pk)
        self._configuration = configuration.gateway()
        return found

    def _learn_keys(self, session_ids: Collection[int]) -> None:
        if len(self._keys) > MAX_KEYS_HELD:
            self._keys.clear()
        unknown = set(session_ids) - self._keys.keys()
        rows = Session.objects.filter(pk__in=unknown).values_list("pk", "agent_id", "key")
        for pk, agent_id, key in rows:
            self._keys[pk] = SessionKey(agent_id, key)

    def _told(self, run: Heartbeat) -> list[dict[str, Any]]:
        """Return the payloads of a run that began or ended; of one that did both, both."""
        session = self._keys[run.session_id]
        ended = {
            **records.brief(run),
            "sessionKey": session.key,
            "agentId": session.agent_id,
            "attempt": run.attempt,
            "eventCount": run.event_count,
        }
        began = {
            **ended,
            "ts": milliseconds(run.started_at),
            "status": HeartbeatStatus.RUNNING.value,
            "preview": "",
            "durationMs": None,
        }
        is_new = run.pk not in self._running
        has_ended = run.status != HeartbeatStatus.RUNNING
        return [*([began] if is_new else []), *([ended] if has_ended else [])]

    def _messages(
        self, events: dict[int, int], runs: dict[int, Heartbeat], followed: set[SessionKey]
    ) -> list[tuple[SessionKey, dict[str, Any]]]:
        new = {pk: self._keys[session] for pk, session in events.items()}
        new = {pk: session for pk, session in new.items() if session in followed}
        ran = {pk: self._keys[run.session_id] for pk, run in runs.items()}
        ran = {pk: session for pk, session in ran.items() if session in followed}
        told: list[tuple[SessionKey, dict[str, Any]]] = []
        if new:
            items = records.event_items(SystemEvent.objects.filter(pk__in=new))
            told += [(new[pk], item) for pk, item in sorted(items.items())]
        if ran:
            items = records.heartbeat_items(Heartbeat.objects.filter(pk__in=ran))
            told += [(ran[pk], item) for pk, item in sorted(items.items())]
        return [
            (session, {"sessionKey": session.key, "agentId": session.agent_id, "item": item})
            for session, item in told
        ]

    def _sessions(
        self, touched: set[int], with_events: set[int], with_runs: set[int], now: datetime
    ) -> list[dict[str, Any]]:
        ts = milliseconds(now)
        # A change of an agent or of the settings can change what every session is doing.
        if len(touched) > MAX_SESSIONS_TOLD or configuration.gateway() != self._configuration:
            return [many_changed(now)]
        if not touched:
            return []
        rows = records.session_rows(touched, now)
        return [
            {
                "sessionKey": row["key"],
                "agentId": row["agentId"],
                "reason": _reason(pk in with_events, pk in with_runs),
                "ts": ts,
                "session": row,
            }
            for pk, row in rows.items()
        ]


def many_changed(now: datetime) -> dict[str, Any]:
    """Return the payload of `sessions.changed` that says: list again."""
    return {"reason": "many", "ts": milliseconds(now)}


def _cursor(rows: QuerySet[Any]) -> Cursor:
    """Return a cursor that has seen what there is, and not what is still to be committed."""
    newest: int = rows.aggregate(newest=Max("pk"))["newest"] or 0
    cursor = Cursor(max(0, newest - GAPS_AT_START))
    there = rows.filter(cursor.unseen(), pk__lte=newest)
    cursor.saw(there.values_list("pk", flat=True), time.monotonic())
    return cursor


def _reason(has_event: bool, has_run: bool) -> str:
    if has_event:
        return "event"
    return "heartbeat" if has_run else "changed"
