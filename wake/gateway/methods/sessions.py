"""Sessions: listed, resolved, and what happened in them."""

from __future__ import annotations

import heapq
import re
from collections import Counter
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal, Self

from django.db.models import F, Q, QuerySet
from django.utils import timezone
from msgspec import Meta

from wake import configuration, rows
from wake.dispatch import resolve_session, session_to_read
from wake.errors import Refused
from wake.gateway import records
from wake.gateway.frames import Frame, NonEmpty
from wake.gateway.methods.registry import Caller, method
from wake.gateway.scopes import READ
from wake.models import EventState, Heartbeat, Session, SystemEvent
from wake.session_keys import MAX_LENGTH, SessionKey
from wake.session_states import with_state
from wake.status import milliseconds

# The states of `session_states.SessionState`, and one that any of them can have beside it.
_ListedState = Literal[
    "running", "waiting", "held", "backing-off", "due", "scheduled", "idle", "dead"
]


class ListParams(Frame):
    limit: Annotated[int, Meta(ge=1, le=200)] = 50
    offset: Annotated[int, Meta(ge=0, le=1_000_000_000)] = 0
    # PostgreSQL takes no NUL.
    search: Annotated[str, Meta(max_length=MAX_LENGTH, pattern=r"\A[^\0]*\Z")] = ""
    agent_id: str = ""
    state: _ListedState | None = None


@method("sessions.list", scope=READ, params=ListParams)
def list_sessions(params: ListParams, caller: Caller) -> object:
    """The sessions with the newest events first, those with `search` in their key: `ts`, `count`,
    `totalCount`, `hasMore`, `nextOffset`, and `sessions`, each with `key`, `agentId`, `queued`,
    `dead`, `running`, `state`, `holdReason` (why its agent does not run, when something waits for
    it), `dueAt`, `dueReason`, `attempts`, `lastEventAt`, `lastHeartbeat` (`runId`, `ts`, `status`,
    `reason`, `preview`, `durationMs`). The `state` `dead` means: with dead letters."""
    now = timezone.now()
    snapshot = configuration.gateway()
    sessions = Session.objects.all()
    if agent_id := params.agent_id.strip().lower():
        if agent_id not in snapshot.agents:
            snapshot.agent(agent_id)  # refuses it by name
        sessions = sessions.filter(agent=agent_id)
    if search := params.search.strip():
        sessions = sessions.filter(_contains(search))
    if params.state == "dead":
        dead = SystemEvent.objects.filter(state=EventState.DEAD)
        sessions = sessions.filter(pk__in=dead.values("session"))
    elif params.state:
        sessions = with_state(sessions, snapshot, now).filter(state=params.state)
    total = sessions.count()
    newest = sessions.order_by(F("last_event_at").desc(nulls_last=True), "-pk")
    end = params.offset + params.limit
    page = list(newest.values_list("pk", flat=True)[params.offset : end])
    # What is costly to know of a session is asked for those of the page alone.
    rows = records.session_rows(page, now)
    listed = [rows[pk] for pk in page if pk in rows]
    has_more = end < total
    return {
        "ts": milliseconds(now),
        "count": len(listed),
        "totalCount": total,
        "hasMore": has_more,
        "nextOffset": end if has_more else None,
        "sessions": listed,
    }


def _contains(search: str) -> Q:
    # SQLite knows upper and lower case of ASCII alone. Keys are in lower case, but for the ids that
    # chat networks own.
    return Q(key__icontains=search) | Q(key__icontains=search.lower())


class ResolveParams(Frame):
    key: NonEmpty
    agent_id: str = ""


@method("sessions.resolve", scope=READ, params=ResolveParams)
def resolve(params: ResolveParams, caller: Caller) -> object:
    """The session that a wake with this key would go to, or why it would be refused; nothing is
    made. `ok`, `key`, `agentId`, `exists`, `isMain`."""
    snapshot = configuration.gateway()
    agent_id, named = resolve_session(params.key, params.agent_id, snapshot)
    main_session = snapshot.main_session(agent_id)
    session = named or main_session
    return {
        "ok": True,
        "key": session.key,
        "agentId": session.agent_id,
        "exists": _stored(session).exists(),
        "isMain": session == main_session,
    }


class HistoryParams(Frame):
    key: NonEmpty
    agent_id: str = ""
    before: str = ""
    limit: Annotated[int, Meta(ge=1, le=100)] = 50


@method("sessions.history", scope=READ, params=HistoryParams)
def history(params: HistoryParams, caller: Caller) -> object:
    """What happened in a session: `key`, `agentId`, `session` (as in `sessions.list`, or null),
    `hasMore`, `before` (to be sent for the next page), and `items`, the newest first. An event has
    `kind`, `id`, `ts`, `text`, `source`, `external`, `state`, `settledAt`, `runId`, `turn`; a
    heartbeat `kind`, `id`, `ts`, `status`, `reason`, `attempt`, `eventCount`, `finishedAt`,
    `durationMs`, `reply` (its first 4,000 characters), `replyCut`, `error`, `eventIds`."""
    place = _Place.parse(params.before)
    session = session_to_read(params.key, params.agent_id, configuration.gateway())
    pk = _stored(session).values_list("pk", flat=True).first()
    row = None
    items: list[dict[str, Any]] = []
    before = None
    if pk is not None:
        row = records.session_rows([pk], timezone.now()).get(pk)
        items, before = _page(pk, place, params.limit)
    return {
        "key": session.key,
        "agentId": session.agent_id,
        "session": row,
        "items": items,
        "hasMore": before is not None,
        "before": before,
    }


def _stored(session: SessionKey) -> QuerySet[Session]:
    return Session.objects.filter(agent=session.agent_id, key=session.key)


_PLACE: Final = re.compile(r"e(?P<event>[0-9]{1,18})h(?P<heartbeat>[0-9]{1,18})")
_NEWEST: Final = 10**18 - 1


@dataclass(frozen=True, slots=True)
class _Place:
    """A place in a history: what follows are the events and heartbeats before these ids."""

    event: int = _NEWEST
    heartbeat: int = _NEWEST

    @classmethod
    def parse(cls, written: str) -> Self:
        if not written:
            return cls()
        match = _PLACE.fullmatch(written)
        if match is None:
            raise Refused(
                "invalid sessions.history params: before must be: that of the previous page"
            )
        return cls(int(match["event"]), int(match["heartbeat"]))

    def __str__(self) -> str:
        return f"e{self.event}h{self.heartbeat}"


def _page(session_pk: int, place: _Place, limit: int) -> tuple[list[dict[str, Any]], str | None]:
    """Return the items before a place, the newest first, and the place after them if more follow.

    Within a session the order of ids is the order of time, so both tables are read by id; a clock
    that was set back neither hides an item nor tells it twice.
    """
    heartbeats = Heartbeat.objects.filter(session=session_pk, pk__lt=place.heartbeat)
    events = rows.newest_events(session_pk, limit + 1, before=place.event)
    heartbeat_items = records.heartbeat_items(heartbeats.order_by("-pk")[: limit + 1])
    event_items = records.event_items(SystemEvent.objects.filter(pk__in=events).order_by("-pk"))
    items = list(
        # Heartbeats first, so that in one millisecond they come after the events they are for.
        heapq.merge(
            heartbeat_items.values(),
            event_items.values(),
            key=lambda item: int(item["ts"]),
            reverse=True,
        )
    )
    page = items[:limit]
    if len(items) <= limit:
        return page, None
    told = Counter(item["kind"] for item in page)
    after = _Place(
        event=_next(list(event_items), told["event"]),
        heartbeat=_next(list(heartbeat_items), told["heartbeat"]),
    )
    return page, str(after)


def _next(ids: list[int], told: int) -> int:
    """Return the id before which a table is read on: the first `told` of `ids` were.

    Of a table of which nothing was told that is the newest row, not what comes in the meantime.
    """
    if told:
        return ids[told - 1]
    return ids[0] + 1 if ids else 0
