"""Removing what is old, a batch at a time, beside a gateway that runs.

Here is what goes of events, heartbeats and sessions; `hooks.pruning` adds its own rows. Every
batch is a short transaction that locks its rows first, so that nothing waits for long, and several
prunings at a time take different rows.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Any, Final, TypeVar

from django.db import transaction
from django.db.models import Exists, Model, OuterRef, Q, QuerySet

from wake.models import (
    AgentTurn,
    EventState,
    GatewaySettings,
    Heartbeat,
    ReplyPost,
    ReplyState,
    Session,
    SystemEvent,
)

# Measured on SQLite, pruning 100,000 events beside wakes: of five times as many rows at once a wake
# waits up to a quarter of a second, of so many a twentieth, and the whole takes no longer.
BATCH_ROWS: Final = 200

Row = TypeVar("Row", bound=Model)


@dataclass(frozen=True, slots=True)
class Kind:
    """What is to go of one table; `name` is for people, in the plural."""

    name: str
    rows: QuerySet[Any]


def kinds(now: datetime, days: int | None = None) -> Iterator[Kind]:
    """Yield what is to go, in the order in which it must: each kind makes more of the next go.

    What is younger than `days` stays; without that number, than the gateway settings say.

    1. Events that are settled, once the note about a turn is written. Queued events and dead
       letters stay, however old.
    2. Heartbeats that have ended, with what is kept of the posting of their replies, except those
       that an event still points to (a dead letter keeps its error) or whose reply is on its way.
    3. Sessions that are left without any event or heartbeat, and have nothing due.
    """
    before = now - timedelta(days=days or GatewaySettings.ensure().keep_settled_days)
    yield Kind("events", _settled_events(before, now))
    yield Kind("heartbeats", _ended_heartbeats(before, now))
    yield Kind("sessions", _idle_sessions(before, now))


def _settled_events(before: datetime, now: datetime) -> QuerySet[SystemEvent]:
    to_note = AgentTurn.objects.filter(pk=OuterRef("pk"), deliver=True, noted_at__isnull=True)
    settled = SystemEvent.objects.filter(
        ~Exists(to_note),
        state__in=(EventState.DELIVERED, EventState.DISCARDED),
        settled_at__lt=before,
    )
    return made_before(settled, "created_at", before, now)


def _ended_heartbeats(before: datetime, now: datetime) -> QuerySet[Heartbeat]:
    ended = Heartbeat.objects.filter(
        ~Exists(SystemEvent.objects.filter(heartbeat=OuterRef("pk"))),
        ~Exists(ReplyPost.objects.filter(pk=OuterRef("pk"), state=ReplyState.PENDING)),
        finished_at__lt=before,
    )
    return made_before(ended, "started_at", before, now)


def _idle_sessions(before: datetime, now: datetime) -> QuerySet[Session]:
    idle = Session.objects.filter(
        Q(last_event_at__isnull=True) | Q(last_event_at__lt=before),
        Q(last_heartbeat_at__isnull=True) | Q(last_heartbeat_at__lt=before),
        ~Exists(SystemEvent.objects.filter(session=OuterRef("pk"))),
        ~Exists(Heartbeat.objects.filter(session=OuterRef("pk"))),
        queued=0,
        due_at__isnull=True,
        lease_token__isnull=True,
    )
    return made_before(idle, "created_at", before, now)


def made_before(
    rows: QuerySet[Row], made_at: str, before: datetime, now: datetime
) -> QuerySet[Row]:
    """Return those of `rows` whose ids are below that of the first row made since `before`.

    Ids follow time, so the many younger rows are not even looked at. A row of the future counts
    for nothing: it comes from a clock that was wrong.
    """
    made_since = {f"{made_at}__gte": before, f"{made_at}__lte": now}
    younger = rows.model._default_manager.filter(**made_since).order_by("pk")
    first = younger.values_list("pk", flat=True).first()
    return rows if first is None else rows.filter(pk__lt=first)


def delete_in_batches(
    kind: Kind,
    *,
    batch: int = BATCH_ROWS,
    pause: Callable[[float], object] = time.sleep,
) -> Iterator[int]:
    """Delete what is to go of a kind; yield, after each batch, how many rows that were.

    What was yielded is committed, and the caller may stop there. Between two batches the database
    is left to others for as long as a batch took (`pause`, in seconds). Raises DatabaseError.
    """
    rows = kind.rows.order_by("pk")
    # Looked for outside the transaction, which on SQLite keeps all others from writing.
    found = list(rows.values_list("pk", flat=True)[:batch])
    while found:
        began = time.monotonic()
        deleted = _delete(rows, found)
        took = time.monotonic() - began
        yield deleted
        pause(took)
        found = list(rows.filter(pk__gt=found[-1]).values_list("pk", flat=True)[:batch])


@transaction.atomic
def _delete(rows: QuerySet[Row], found: list[Any]) -> int:
    """Delete those of the rows found that are still to go, and return how many."""
    # Another pruning may hold some of them, or a wake may hold a session: those are passed over.
    locked = rows.filter(pk__in=found).select_for_update(skip_locked=True)
    to_go = list(locked.values_list("pk", flat=True))
    deleted = rows.model._default_manager.filter(pk__in=to_go).only("pk").delete()[1]
    return deleted.get(rows.model._meta.label, 0)
