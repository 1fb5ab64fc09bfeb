"""What a session is doing, as an operator asks it: one word for lists, sentences for its page.

The word is decided in the database (`with_state`), so that a list shows and filters by one rule.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.db.models import Case, CharField, F, Q, QuerySet, Value, When
from django.db.models.enums import TextChoices

from wake.configuration import GatewayConfiguration
from wake.models import DueReason, HoldReason, RunnerKind, Session
from wake.presentation import counted, exact, relative


class SessionState(TextChoices):
    """The state of a session; the first that fits, in this order."""

    RUNNING = "running", "running"
    WAITING = "waiting", "waiting: its agent does not run"
    HELD = "held", "held back by a limit of its agent"
    BACKING_OFF = "backing-off", "backing off after a failure"
    DUE = "due", "due"
    SCHEDULED = "scheduled", "scheduled: events wait for their time"
    IDLE = "idle", "idle"


def hold_reason(agent_id: str, snapshot: GatewayConfiguration) -> str | None:
    """Return why no heartbeat of this agent runs, or None when they do."""
    agent = snapshot.agents.get(agent_id)
    if not snapshot.heartbeats_enabled:
        return "heartbeats are switched off in the gateway settings"
    if agent is None or not agent.enabled:
        return f"agent {agent_id} is disabled"
    if agent.paused:
        return f"agent {agent_id} is paused"
    if agent.runner == RunnerKind.NONE:
        return f"agent {agent_id} has no runner"
    return unreached_reason(agent_id, snapshot)


def unreached_reason(agent_id: str, snapshot: GatewayConfiguration) -> str | None:
    """Return why nobody reaches this agent now, where that depends on connections; or None."""
    agent, reach = snapshot.agents.get(agent_id), snapshot.reach.get(agent_id)
    if agent and agent.runner == RunnerKind.INBOX and (reach is None or not reach.clients):
        return f"no program of agent {agent_id} is connected"
    return reach.problem or None if reach else None


def limit_reason(session: Session, snapshot: GatewayConfiguration) -> str:
    """Return until when and by which limit a session in the state `held` is held back."""
    agent = snapshot.agents.get(session.agent_id)
    limit = "a limit of its agent"
    if agent and session.held_by == HoldReason.RATE:
        limit = f"the limit of {agent.max_runs_per_minute} runs a minute"
    elif agent and session.held_by == HoldReason.SELF_WAKES:
        limit = f"the limit of {agent.max_self_wakes} wakes in a row by its own runs"
    until = f"{session.held_until:%H:%M:%S} UTC" if session.held_until else "later"
    return f"until {until} by {limit}"


def with_state(
    sessions: QuerySet[Session], snapshot: GatewayConfiguration, now: datetime
) -> QuerySet[Any]:
    """Return the sessions, each with its `state` (a value of SessionState) as an attribute."""
    held = [agent_id for agent_id in snapshot.agents if hold_reason(agent_id, snapshot)]
    is_due = Q(due_at__lte=now)
    has_work = Q(queued__gt=0) | is_due
    states = [
        (Q(lease_token__isnull=False), SessionState.RUNNING),
        (Q(agent_id__in=held) & has_work, SessionState.WAITING),
        (Q(due_at__gt=now, due_at=F("held_until"), queued__gt=0), SessionState.HELD),
        (Q(due_reason=DueReason.RETRY, due_at__gt=now), SessionState.BACKING_OFF),
        (is_due, SessionState.DUE),
        (Q(queued__gt=0), SessionState.SCHEDULED),
    ]
    return sessions.annotate(
        state=Case(
            *(When(condition, then=Value(state.value)) for condition, state in states),
            default=Value(SessionState.IDLE.value),
            output_field=CharField(),
        )
    )


def sentences(
    session: Session,
    state: SessionState,
    *,
    dead: int,
    snapshot: GatewayConfiguration,
    now: datetime,
) -> list[str]:
    """Return what there is to know about a session, the most urgent first.

    `dead` is its number of dead letters.
    """
    said = [_next_heartbeat(session, state, snapshot, now)]
    if session.queued:
        said.append(f"{counted(session.queued, 'event')} queued.")
    else:
        said.append("No events are queued.")
    if dead:
        said.append(
            f"{counted(dead, 'dead letter')}: every attempt failed. Requeue or discard "
            f"{'it' if dead == 1 else 'them'} among the events."
        )
    return said


def _next_heartbeat(
    session: Session, state: SessionState, snapshot: GatewayConfiguration, now: datetime
) -> str:
    held = hold_reason(session.agent_id, snapshot)
    agent = snapshot.agents.get(session.agent_id)
    limit = f" of {agent.max_attempts}" if agent else ""
    if state == SessionState.RUNNING:
        return f"A heartbeat is running (attempt {session.attempts}{limit})."
    if held and session.queued:
        return f"Held: {held}; its events wait."
    if held:
        return f"Held: {held}; no heartbeat runs."
    if session.due_at is None:
        return "No heartbeat is due."
    if state == SessionState.HELD:
        return f"Held back {limit_reason(session, snapshot)}; its events come together then."
    reason = DueReason(session.due_reason).label if session.due_reason else "no reason recorded"
    if state == SessionState.BACKING_OFF:
        return (
            f"Backing off: attempt {session.attempts}{limit} failed; the next one comes "
            f"{relative(session.due_at, now)}, at {exact(session.due_at)}."
        )
    if state == SessionState.DUE:
        most = agent.max_parallel_runs if agent else None
        place = f"one of the {most} places of agent {session.agent_id}" if most else "a place"
        return f"Due since {exact(session.due_at)} ({reason}): it runs as soon as there is {place}."
    unless = ""
    if agent and agent.only_with_events and not session.queued:
        unless = ", if there are events by then"
    return f"Next heartbeat {relative(session.due_at, now)} ({reason}){unless}."
