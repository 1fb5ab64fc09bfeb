"""Turns of their own that have ended: the note about each goes to its agent's main session.

A turn waits for its note (`AgentTurn.noted_at`) until the note is stored, in the transaction that
says so. So it is written exactly once for each outcome, whichever process writes it.
"""

from __future__ import annotations

import logging
from datetime import datetime
from typing import Final

from django.db import transaction
from django.db.models import QuerySet

from wake import queue
from wake.configuration import GatewayConfiguration
from wake.dispatch import Mode, WakeRequest, plan
from wake.errors import QueueFull, Refused
from wake.models import AgentTurn, EventState, HeartbeatStatus, SystemEvent
from wake.presentation import counted
from wake.session_keys import SessionKey

logger = logging.getLogger(__name__)

MAX_REPLY_CHARACTERS: Final = 4000
# A process writes no more notes in a row, so that its leases are renewed in time.
NOTES_AT_ONCE: Final = 100


def note_ended_turns(snapshot: GatewayConfiguration, now: datetime) -> int:
    """Write the notes that wait, NOTES_AT_ONCE at most; return how many turns wait no more.

    Those for a main session that is full go on waiting. Raises DatabaseError.
    """
    waiting = _to_note().order_by("pk").values_list("pk", "event__session__agent_id")
    full: set[str] = set()
    noted = 0
    for event_id, agent_id in waiting:
        if noted == NOTES_AT_ONCE:
            break
        if agent_id in full:
            continue
        try:
            noted += note_turn(event_id, snapshot, now)
        except QueueFull as error:
            logger.warning(
                "heartbeats: notes about the turns of %s wait: %s",
                agent_id,
                error,
                extra={"agent_id": agent_id},
            )
            full.add(agent_id)
    return noted


def note_turn(event_id: int, snapshot: GatewayConfiguration, now: datetime) -> bool:
    """Write the note about one turn, if it has ended and waits for one; return whether it did.

    Raises QueueFull when the main session is full, and DatabaseError; then the turn waits on.
    """
    ended = _to_note().filter(pk=event_id).select_related("event__session", "event__heartbeat")
    turn = ended.defer("event__text", "event__heartbeat__prompt").first()
    if turn is None:
        return False
    note = _plan_note(turn, snapshot, now)
    with transaction.atomic():
        # First, because sessions are locked before events wherever events move.
        if note:
            (stored,) = queue.enqueue([note], now=now, max_queued=snapshot.max_queued_events)
            if isinstance(stored, QueueFull):
                raise stored
        if not _mark_noted(turn, now):
            transaction.set_rollback(True)
            return False
    return True


def _to_note() -> QuerySet[AgentTurn]:
    # A disabled agent is told when it is enabled again.
    return AgentTurn.objects.filter(
        deliver=True, noted_at__isnull=True, event__session__agent__enabled=True
    ).exclude(event__state=EventState.QUEUED)


def _plan_note(
    turn: AgentTurn, snapshot: GatewayConfiguration, now: datetime
) -> queue.Entry | None:
    """Return the note, or None where nobody is to be told or can be."""
    session = SessionKey(turn.event.session.agent_id, turn.event.session.key)
    if session == snapshot.main_session(session.agent_id):
        return None  # it has seen the turn itself
    request = WakeRequest(
        note_text(turn),
        source="turn",
        mode=Mode(turn.note_mode),
        agent_id=session.agent_id,
        external=True,
    )
    try:
        return plan(request, snapshot, now)
    except Refused as error:
        ids = {"event_id": turn.event.uid, "agent_id": session.agent_id}
        logger.warning("heartbeats: no note about turn %s: %s", turn.event.uid, error, extra=ids)
        return None


def _mark_noted(turn: AgentTurn, now: datetime) -> bool:
    """Mark the turn as noted; return whether its note is still right and this process's to write.

    The event is locked, so that the outcome stays as it was read: an operator could requeue it.
    """
    unchanged = SystemEvent.objects.filter(
        pk=turn.pk, state=turn.event.state, heartbeat=turn.event.heartbeat
    )
    if not unchanged.select_for_update().values_list("pk").first():
        return False
    # Another process can have noted it since it was read.
    waiting = AgentTurn.objects.filter(pk=turn.pk, noted_at__isnull=True)
    return waiting.update(noted_at=now) == 1


def note_text(turn: AgentTurn) -> str:
    """Return what the main session is told about a turn that has ended. Pure."""
    event, run = turn.event, turn.event.heartbeat
    ended = f'Turn "{turn.name}" (run {event.uid}) in {event.session.key} ended:'
    if event.state != EventState.DELIVERED:
        by_hand = " and discarded" if event.state == EventState.DISCARDED else ""
        if run is None:  # removed since, as all old heartbeats are
            return f"{ended} failed{by_hand}."
        error = run.error.strip()[:MAX_REPLY_CHARACTERS]
        return f"{ended} failed after {counted(run.attempt, 'attempt')}{by_hand}: {error}"
    if run and run.status == HeartbeatStatus.QUIET:
        return f"{ended} nothing needed attention."
    reply = run.reply.strip() if run else ""
    cut = "…" if len(reply) > MAX_REPLY_CHARACTERS else ""
    return f"{ended} delivered.\n\n{reply[:MAX_REPLY_CHARACTERS]}{cut}"
