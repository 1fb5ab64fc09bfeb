"""The admin's first page: how things stand, and what wants a hand."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

from django.db.models import Count
from django.http import HttpRequest
from django.utils import timezone

from wake import configuration
from wake.admin.screens import Table, code, link, list_url, moment
from wake.admin.tables import heartbeats_table
from wake.configuration import GatewayConfiguration
from wake.models import Heartbeat, RunnerKind, Session, SystemEvent
from wake.presentation import counted
from wake.session_states import SessionState, hold_reason, with_state
from wake.status import queue_counts

MOST_WAITING: Final = 8
LAST_HEARTBEATS: Final = 10


@dataclass(frozen=True, slots=True)
class Number:
    """One number of the first row, where it leads, and what is to be added to it."""

    title: str
    value: int
    url: str
    note: str = ""
    alarms: bool = False


def dashboard(request: HttpRequest, context: dict[str, Any]) -> dict[str, Any]:
    """Add what the first page shows of what this user may see. Named in the setting UNFOLD."""
    snapshot = configuration.gateway()
    context["title"] = "How things stand"
    if request.user.has_perms(["wake.view_session", "wake.view_systemevent"]):
        context["hints"] = hints(snapshot)
        context["numbers"] = _numbers(snapshot)
        context["tables"] = [_most_waiting(), *_last_heartbeats(request)]
    return context


def hints(snapshot: GatewayConfiguration) -> list[tuple[str, str]]:
    """Return what stops the gateway's main job, each with the command that mends it. Pure."""
    agent_id = snapshot.default_agent
    agent = snapshot.agents.get(agent_id)
    if not snapshot.heartbeats_enabled:
        return [("Events wait: heartbeats are switched off in the gateway settings.", "")]
    if agent and agent.runner == RunnerKind.NONE:
        return [
            (
                f"Events wait: agent {agent_id} has no runner. Set one:",
                f"manage.py agents set {agent_id} --runner command -- PROGRAM ARGS…",
            )
        ]
    held = hold_reason(agent_id, snapshot)
    return [(f"Events wait: {held}.", "")] if held else []


def _numbers(snapshot: GatewayConfiguration) -> list[Number]:
    counts = queue_counts()
    sessions = with_state(Session.objects.all(), snapshot, timezone.now())
    states = dict(sessions.order_by().values_list("state").annotate(count=Count("pk")))
    waiting = states.get(SessionState.WAITING, 0)
    backing_off = states.get(SessionState.BACKING_OFF, 0)
    return [
        Number("Events queued", counts.queued, list_url(SystemEvent, "state__exact=queued")),
        Number(
            "Sessions due",
            states.get(SessionState.DUE, 0),
            list_url(Session, f"state={SessionState.DUE.value}"),
            f"{counted(waiting, 'more waits', 'more wait')}: held" if waiting else "",
        ),
        Number(
            "Heartbeats running",
            counts.running,
            list_url(Session, f"state={SessionState.RUNNING.value}"),
            f"{counted(backing_off, 'session backs', 'sessions back')} off" if backing_off else "",
        ),
        Number(
            "Dead letters",
            counts.dead,
            list_url(SystemEvent, "state__exact=dead"),
            "requeue or discard them" if counts.dead else "",
            alarms=bool(counts.dead),
        ),
    ]


def _most_waiting() -> Table:
    sessions = Session.objects.filter(queued__gt=0).order_by("-queued", "pk")[:MOST_WAITING]
    return Table(
        "Sessions with most waiting",
        ("session", "queued", "due", "last event"),
        [
            (
                link(session, code(session.key)),
                f"{session.queued:,}",
                moment(session.due_at),
                moment(session.last_event_at),
            )
            for session in sessions
        ],
    )


def _last_heartbeats(request: HttpRequest) -> list[Table]:
    if not request.user.has_perm("wake.view_heartbeat"):
        return []
    heartbeats = Heartbeat.objects.select_related("session")
    return [
        heartbeats_table("Last heartbeats", heartbeats, limit=LAST_HEARTBEATS, with_session=True)
    ]
