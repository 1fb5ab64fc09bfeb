"""How things stand, in numbers: the counting queries of every screen, method and metric."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from datetime import datetime
from functools import cache
from importlib import metadata
from typing import Any, Final

from django.db import connection
from django.db.models import Case, Count, F, OuterRef, Q, QuerySet, Subquery, Sum, When
from django.db.models.functions import Coalesce, Left
from django.utils import timezone

from wake import configuration
from wake.models import Agent, EventState, Heartbeat, Session, SystemEvent
from wake.session_states import unreached_reason

PREVIEW_CHARACTERS: Final = 200

_started = time.monotonic()


@dataclass(frozen=True, slots=True)
class QueueCounts:
    """Events that are queued and that are dead letters; sessions that are due, run, are held."""

    queued: int
    due: int
    running: int
    held: int
    dead: int


def queue_counts(now: datetime | None = None) -> QueueCounts:
    """Count the queue. `due` are the sessions whose heartbeat could start at `now`.

    `held` are those with events that a limit of their agent holds back.
    """
    now = now or timezone.now()
    is_held = Q(due_at__gt=now, due_at=F("held_until"), queued__gt=0, lease_token=None)
    counted = Session.objects.aggregate(
        due=Count("pk", filter=Q(due_at__lte=now, lease_token=None)),
        running=Count("pk", filter=Q(lease_token__isnull=False)),
        held=Count("pk", filter=is_held),
        queued=Sum("queued", default=0),  # last: from here on the name is this sum's
    )
    return QueueCounts(**counted, dead=SystemEvent.objects.filter(state=EventState.DEAD).count())


def with_counts(agents: QuerySet[Agent], now: datetime) -> QuerySet[Any]:
    """Return agents, each with its `queued` events, `due` sessions and `dead` letters."""
    # Subqueries, because two joins would multiply each other's rows.
    sessions = Session.objects.filter(agent=OuterRef("pk")).order_by().values("agent")
    due = Q(due_at__lte=now, lease_token__isnull=True)
    dead = (
        SystemEvent.objects.filter(session__agent=OuterRef("pk"), state=EventState.DEAD)
        .order_by()
        .values("session__agent")
    )
    counted: QuerySet[Any] = agents.annotate(
        queued=Coalesce(Subquery(sessions.annotate(count=Sum("queued")).values("count")), 0),
        due=Coalesce(Subquery(sessions.annotate(count=Count("pk", filter=due)).values("count")), 0),
        dead=Coalesce(Subquery(dead.annotate(count=Count("pk")).values("count")), 0),
    )
    return counted


def with_dead(sessions: QuerySet[Session]) -> QuerySet[Any]:
    """Return sessions, each with its number of dead letters as `dead_count`."""
    dead = (
        SystemEvent.objects.filter(session=OuterRef("pk"), state=EventState.DEAD)
        .order_by()
        .values("session")
        .annotate(count=Count("pk"))
        .values("count")
    )
    counted: QuerySet[Any] = sessions.annotate(dead_count=Coalesce(Subquery(dead), 0))
    return counted


def uptime_ms() -> int:
    """Return for how many milliseconds this process has been up."""
    return int((time.monotonic() - _started) * 1000)


_was_migrated = False


def is_migrated() -> bool:
    """Whether the database answers and has every migration of this code. Raises DatabaseError."""
    global _was_migrated
    if _was_migrated:  # what is applied stays applied
        with connection.cursor() as cursor:
            cursor.execute("SELECT 1")
        return True
    from django.db.migrations.executor import MigrationExecutor

    executor = MigrationExecutor(connection)
    _was_migrated = not executor.migration_plan(executor.loader.graph.leaf_nodes())
    return _was_migrated


@cache
def version() -> str:
    """Return the version of the installed package; 0.0.0 where it runs without being installed."""
    try:
        return metadata.version("openclaw-wake-gateway")
    except metadata.PackageNotFoundError:
        return "0.0.0"


def milliseconds(moment: datetime) -> int:
    """Return a moment as Unix time in milliseconds, as the gateway protocol writes it."""
    return int(moment.timestamp() * 1000)


def wire_scope(scope: str) -> str:
    """Return a session scope under the gateway protocol's name for it."""
    return "per-sender" if scope == "per-agent" else scope


def health() -> dict[str, Any]:
    """Return the gateway's health as the protocol writes it; that it could be read says `ok`.

    Raises DatabaseError.
    """
    started, now = time.monotonic(), timezone.now()
    snapshot = configuration.gateway()
    counts = queue_counts()
    return {
        "ok": True,
        # Before anything was read: what is younger than this may be missing.
        "ts": milliseconds(now),
        "durationMs": int((time.monotonic() - started) * 1000),
        "defaultAgentId": snapshot.default_agent,
        "agents": [
            {
                "id": agent.id,
                "name": agent.name,
                "enabled": agent.enabled,
                "paused": agent.paused,
                "runner": agent.runner.value,
                "unreached": unreached_reason(agent.id, snapshot),
                "isDefault": agent.id == snapshot.default_agent,
            }
            for agent in snapshot.agents.values()
        ],
        "queue": asdict(counts),
        "heartbeats": {"enabled": snapshot.heartbeats_enabled},
    }


def summary() -> Mapping[str, Any]:
    """Return the `status` method's payload. Raises DatabaseError."""
    return {
        "version": version(),
        "uptimeMs": uptime_ms(),
        "sessions": {"count": Session.objects.count()},
        "queue": asdict(queue_counts()),
        "heartbeats": {"enabled": configuration.gateway().heartbeats_enabled},
        "lastHeartbeat": last_heartbeat(),
    }


def last_heartbeat() -> dict[str, Any] | None:
    """Return the newest heartbeat that has ended as the protocol writes it, or None."""
    run = (
        with_preview(Heartbeat.objects.filter(finished_at__isnull=False))
        .select_related("session")
        .order_by("-started_at")
        .first()
    )
    return {**outcome(run), "sessionKey": run.session.key} if run else None


def with_preview(heartbeats: QuerySet[Heartbeat]) -> QuerySet[Any]:
    """Return the heartbeats without their long texts, each with its `preview` as an attribute."""
    said = Case(When(reply="", then=F("error")), default=F("reply"))
    shortened: QuerySet[Any] = heartbeats.defer("prompt", "reply", "error").annotate(
        preview=Left(said, PREVIEW_CHARACTERS)
    )
    return shortened


def outcome(run: Any) -> dict[str, Any]:
    """Return what came of one of the heartbeats of `with_preview`, as the protocol writes it.

    `ts` is its end or, while it runs, its start; then `durationMs` is None.
    """
    return {
        "ts": milliseconds(run.finished_at or run.started_at),
        "status": run.status,
        "reason": run.reason,
        "preview": run.preview,
        "durationMs": duration_ms(run),
    }


def duration_ms(run: Heartbeat) -> int | None:
    """Return how many milliseconds a heartbeat took, or None while it runs."""
    return None if run.duration is None else int(run.duration.total_seconds() * 1000)
