"""How events and heartbeats look wherever they are listed."""

from __future__ import annotations

from django.db.models import QuerySet
from django.db.models.functions import Left
from django.utils import timezone

from wake.admin.screens import (
    NEWEST,
    PREVIEW_CHARACTERS,
    Colour,
    Table,
    badge,
    code,
    link,
    moment,
    preview,
)
from wake.models import (
    EventState,
    Heartbeat,
    HeartbeatStatus,
    ReplyPost,
    ReplyState,
    SystemEvent,
)
from wake.presentation import first_line, run_time
from wake.session_states import SessionState

SESSION_COLOURS: dict[SessionState, Colour] = {
    SessionState.RUNNING: "primary",
    SessionState.WAITING: "warning",
    SessionState.HELD: "warning",
    SessionState.BACKING_OFF: "danger",
    SessionState.DUE: "info",
    SessionState.SCHEDULED: "info",
    SessionState.IDLE: "plain",
}
EVENT_COLOURS: dict[EventState, Colour] = {
    EventState.QUEUED: "info",
    EventState.DELIVERED: "success",
    EventState.DEAD: "danger",
    EventState.DISCARDED: "plain",
}
HEARTBEAT_COLOURS: dict[HeartbeatStatus, Colour] = {
    HeartbeatStatus.RUNNING: "primary",
    HeartbeatStatus.DELIVERED: "success",
    HeartbeatStatus.QUIET: "plain",
    HeartbeatStatus.FAILED: "danger",
    HeartbeatStatus.LOST: "danger",
    HeartbeatStatus.RELEASED: "warning",
}
REPLY_COLOURS: dict[ReplyState, Colour] = {
    ReplyState.PENDING: "info",
    ReplyState.SENT: "success",
    ReplyState.FAILED: "danger",
}


def event_badge(event: SystemEvent) -> str:
    """Return an event's state as a label."""
    state = EventState(event.state)
    return badge(state.label, EVENT_COLOURS[state])


def heartbeat_badge(heartbeat: Heartbeat) -> str:
    """Return a heartbeat's status as a label; what the word means is its title."""
    status = HeartbeatStatus(heartbeat.status)
    return badge(status.value, HEARTBEAT_COLOURS[status], status.label)


def reply_badge(post: ReplyPost) -> str:
    """Return the state of a reply's posting as a label."""
    state = ReplyState(post.state)
    return badge(state.label, REPLY_COLOURS[state])


def heartbeat_duration(heartbeat: Heartbeat) -> str:
    """Return how long a heartbeat took, or takes already."""
    if heartbeat.duration is None:
        return f"{run_time(timezone.now() - heartbeat.started_at)} so far"
    return run_time(heartbeat.duration)


def events_table(title: str, events: QuerySet[SystemEvent]) -> Table:
    """Return these events, in their order, as a table."""
    rows = events.defer("text").annotate(text_start=Left("text", PREVIEW_CHARACTERS))
    return Table(
        title,
        ("event", "state", "came", "source"),
        [
            (
                link(event, first_line(event.text_start)),
                event_badge(event),
                moment(event.created_at),
                event.source,
            )
            for event in rows
        ],
    )


def heartbeats_table(
    title: str,
    heartbeats: QuerySet[Heartbeat],
    *,
    limit: int = NEWEST,
    with_session: bool = False,
) -> Table:
    """Return the newest of these heartbeats as a table, with a column for the session or not."""
    newest = heartbeats.order_by("-started_at", "-pk").defer("prompt", "reply", "error")
    newest = newest.annotate(
        said=Left("reply", PREVIEW_CHARACTERS), failed=Left("error", PREVIEW_CHARACTERS)
    )
    return Table(
        title,
        (
            "started",
            *(["session"] if with_session else []),
            *("status", "reason", "attempt", "events", "took", "reply or error"),
        ),
        [
            (
                link(heartbeat, moment(heartbeat.started_at)),
                *([link(heartbeat.session, code(heartbeat.session.key))] if with_session else []),
                heartbeat_badge(heartbeat),
                heartbeat.reason,
                str(heartbeat.attempt),
                str(heartbeat.event_count),
                heartbeat_duration(heartbeat),
                preview(heartbeat.failed or heartbeat.said),
            )
            for heartbeat in newest[:limit]
        ],
    )
