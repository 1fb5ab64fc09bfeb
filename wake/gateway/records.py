"""Sessions, events and heartbeats as the protocol writes them, read with few queries.

Times are Unix milliseconds. Long texts stay in the database: a list shows where they begin.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable
from datetime import datetime
from typing import Any, Final

from django.db.models import F, OuterRef, QuerySet, Subquery
from django.db.models.functions import Left

from wake import configuration
from wake.configuration import GatewayConfiguration
from wake.models import Heartbeat, Session, SystemEvent
from wake.session_states import SessionState, hold_reason, limit_reason, with_state
from wake.status import duration_ms, milliseconds, outcome, with_dead, with_preview

REPLY_CHARACTERS: Final = 4000


def session_rows(pks: Collection[int], now: datetime) -> dict[int, dict[str, Any]]:
    """Return the sessions of these pks by pk; those that do not exist are missing. Two queries."""
    snapshot = configuration.gateway()
    newest = Heartbeat.objects.filter(session=OuterRef("pk")).order_by("-pk").values("pk")[:1]
    sessions = list(
        with_dead(with_state(Session.objects.filter(pk__in=pks), snapshot, now)).annotate(
            last_run=Subquery(newest)
        )
    )
    runs = with_preview(Heartbeat.objects.filter(pk__in=[row.last_run for row in sessions]))
    last = {run.pk: brief(run) for run in runs}
    return {row.pk: _session_row(row, last.get(row.last_run), snapshot) for row in sessions}


def _session_row(
    row: Any, last_heartbeat: dict[str, Any] | None, snapshot: GatewayConfiguration
) -> dict[str, Any]:
    hold = None
    if row.state == SessionState.WAITING:
        hold = hold_reason(row.agent_id, snapshot)
    elif row.state == SessionState.HELD:
        hold = f"held back {limit_reason(row, snapshot)}"
    return {
        "key": row.key,
        "agentId": row.agent_id,
        "queued": row.queued,
        "dead": row.dead_count,
        "running": row.lease_token is not None,
        "state": row.state,
        "holdReason": hold,
        "dueAt": _time(row.due_at),
        "dueReason": row.due_reason,
        "attempts": row.attempts,
        "lastEventAt": _time(row.last_event_at),
        "lastHeartbeat": last_heartbeat,
    }


def brief(heartbeat: Any) -> dict[str, Any]:
    """Return one of the heartbeats of `status.with_preview` in its short form."""
    return {"runId": str(heartbeat.run_id), **outcome(heartbeat)}


def event_items(events: QuerySet[SystemEvent]) -> dict[int, dict[str, Any]]:
    """Return the events by pk, in their order. One query."""
    rows: QuerySet[Any] = events.annotate(
        settled_by=F("heartbeat__run_id"), turn_name=F("turn__name")
    )
    return {
        row.pk: {
            "kind": "event",
            "id": str(row.uid),
            "ts": milliseconds(row.created_at),
            "text": row.text,
            "source": row.source,
            "external": row.external,
            "state": row.state,
            "settledAt": _time(row.settled_at),
            "runId": str(row.settled_by) if row.settled_by else None,
            "turn": row.turn_name,
        }
        for row in rows
    }


def heartbeat_items(heartbeats: QuerySet[Heartbeat]) -> dict[int, dict[str, Any]]:
    """Return the heartbeats by pk, in their order. Two queries."""
    rows: list[Any] = list(
        heartbeats.defer("prompt", "reply").annotate(
            # One character more than is shown tells whether there are more.
            said=Left("reply", REPLY_CHARACTERS + 1)
        )
    )
    settled = _settled_events(row.pk for row in rows)
    return {row.pk: _heartbeat_item(row, row.said, settled[row.pk]) for row in rows}


def whole_heartbeat(heartbeat: Heartbeat) -> dict[str, Any]:
    """Return a heartbeat with its prompt and its whole reply, and whose it is. One query.

    Its session is loaded already.
    """
    return {
        **_heartbeat_item(heartbeat, "", _settled_events([heartbeat.pk])[heartbeat.pk]),
        "reply": heartbeat.reply,
        "prompt": heartbeat.prompt,
        "sessionKey": heartbeat.session.key,
        "agentId": heartbeat.session.agent_id,
    }


def _settled_events(heartbeat_pks: Iterable[int]) -> dict[int, list[str]]:
    """Return the ids of the events that each heartbeat settled, in the order of the session."""
    events = SystemEvent.objects.filter(heartbeat__in=list(heartbeat_pks)).order_by("pk")
    settled: dict[int, list[str]] = defaultdict(list)
    for heartbeat_pk, uid in events.values_list("heartbeat_id", "uid"):
        settled[heartbeat_pk].append(str(uid))
    return settled


def _heartbeat_item(row: Heartbeat, said: str, event_ids: list[str]) -> dict[str, Any]:
    return {
        "kind": "heartbeat",
        "id": str(row.run_id),
        "ts": milliseconds(row.started_at),
        "status": row.status,
        "reason": row.reason,
        "attempt": row.attempt,
        "eventCount": row.event_count,
        "finishedAt": _time(row.finished_at),
        "durationMs": duration_ms(row),
        "reply": said[:REPLY_CHARACTERS],
        "replyCut": len(said) > REPLY_CHARACTERS,
        "error": row.error,
        "eventIds": event_ids,
    }


def _time(moment: datetime | None) -> int | None:
    return milliseconds(moment) if moment else None
