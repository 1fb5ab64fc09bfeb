"""The one front door: a wake request in, a receipt out.

Every way in (command line, HTTP, WebSocket, admin) ends here. What a wake does, with a session
key or without, now or at the next heartbeat, is decided in `plan` and nowhere else; it is the
table in docs/contract.md, "What a wake does".
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from datetime import datetime
from enum import StrEnum
from typing import Final, Literal
from uuid import UUID

import msgspec
from django.db import DatabaseError
from django.utils import timezone

from wake import configuration, metrics, queue, schedule, session_keys
from wake.configuration import GatewayConfiguration
from wake.errors import StorageUnavailable, TextError, WakeError
from wake.models import DueReason

# Named here too, for the doors: the queue is none of their business.
from wake.queue import Turn as Turn
from wake.session_keys import SessionKey

logger = logging.getLogger(__name__)

MAX_TEXT_BYTES: Final = 64 * 1024


class Mode(StrEnum):
    """When an event is to be delivered."""

    NOW = "now"
    NEXT_HEARTBEAT = "next-heartbeat"


class WakeRequest(msgspec.Struct, frozen=True):
    """What a door asks for. A blank session key or agent id means none.

    With a `turn` the event has a turn of its own: it is due at once and handed over alone, and the
    mode is that of the note about the outcome. What a person wants goes before the rest. `run_id`
    is the run that sends it, if an agent does: its wakes of its own session are limited.
    """

    text: str
    source: str
    mode: Mode = Mode.NOW
    session_key: str | None = None
    agent_id: str | None = None
    external: bool = False
    turn: Turn | None = None
    by_person: bool = False
    run_id: UUID | None = None


class Receipt(msgspec.Struct, frozen=True, rename="camel"):
    """What happened: the answer of every door.

    `event_id` names the event that stands for the wake: its own or, where it was coalesced with
    one that still waits, that one's. It is also the run id of a turn of its own.
    """

    mode: Mode
    event_outcome: Literal["queued", "coalesced", "replayed"]
    session_key: str
    event_id: UUID

    def as_json(self) -> dict[str, str | bool]:
        """Return the receipt as the doors write it."""
        return {"ok": True, **msgspec.to_builtins(self)}


def dispatch(request: WakeRequest) -> Receipt:
    """Store one wake and return its receipt once it is committed.

    Raises Refused (nothing stored, the reason in its text), QueueFull or StorageUnavailable.
    """
    result = dispatch_batch([request])[0]
    if isinstance(result, WakeError):
        raise result
    return result


def dispatch_batch(
    requests: Sequence[WakeRequest], *, now: datetime | None = None
) -> list[Receipt | WakeError]:
    """Store wakes in one transaction; return, in their order, a receipt or the error of each.

    Raises StorageUnavailable when the database could not take the batch; then nothing is stored.
    """
    now = now or timezone.now()
    results: list[Receipt | WakeError | None] = [None] * len(requests)
    entries: list[tuple[int, queue.Entry]] = []
    try:
        snapshot = configuration.gateway()
        for place, request in enumerate(requests):
            try:
                entries.append((place, plan(request, snapshot, now)))
            except WakeError as error:
                metrics.note_wake(request.source, "refused")
                results[place] = error
        stored = queue.enqueue(
            [entry for _, entry in entries], now=now, max_queued=snapshot.max_queued_events
        )
    except DatabaseError as error:
        for _, entry in entries:
            metrics.note_wake(entry.source, "failed")
        raise StorageUnavailable("the event could not be stored now; try again") from error
    for (place, entry), outcome in zip(entries, stored, strict=True):
        if isinstance(outcome, queue.Stored):
            mode = requests[place].mode
            results[place] = Receipt(mode, outcome.outcome, entry.session.key, outcome.event_id)
            if logger.isEnabledFor(logging.DEBUG):
                _log(entry, outcome)
        else:
            metrics.note_wake(entry.source, "full")
            results[place] = outcome
    return [result for result in results if result is not None]


def _log(entry: queue.Entry, stored: queue.Stored) -> None:
    ids = {
        "event_id": stored.event_id,
        "session_key": entry.session.key,
        "agent_id": entry.session.agent_id,
    }
    said = "dispatch: event %s %s for %s by %s"
    logger.debug(said, stored.event_id, stored.outcome, entry.session.key, entry.source, extra=ids)


def plan(request: WakeRequest, snapshot: GatewayConfiguration, now: datetime) -> queue.Entry:
    """Decide where a wake goes, when that session is due, and who is nudged. Pure.

    Raises Refused: an agent that is unknown or disabled, a bad session key, a bad text.
    """
    text = clean_text(request.text)
    agent, session = resolve_session(request.session_key, request.agent_id, snapshot)
    at_once = queue.Due(now, DueReason.OPERATOR if request.by_person else DueReason.WAKE)
    self_wakes = snapshot.agents[agent].max_self_wakes
    if request.turn:
        return queue.Entry(
            session or snapshot.main_session(agent),
            text,
            request.source,
            request.external,
            at_once,
            turn=request.turn,
            note_mode=request.mode.value,
            run_id=request.run_id,
            self_wake_limit=self_wakes,
        )
    nudged: tuple[SessionKey, ...] = ()
    if session is None:
        session = snapshot.main_session(agent)
        if request.mode == Mode.NOW:
            nudged = _fan_out(request.agent_id, agent, snapshot)
    due = at_once
    if request.mode == Mode.NEXT_HEARTBEAT and session == snapshot.main_session(agent):
        # Any other session is due at once: no schedule ever visits it.
        scheduled = schedule.next_due(agent, snapshot.agents[agent].schedule, now)
        if scheduled:
            due = queue.Due(scheduled, DueReason.SCHEDULE)
    return queue.Entry(
        session,
        text,
        request.source,
        request.external,
        due,
        nudged,
        run_id=request.run_id,
        self_wake_limit=self_wakes,
    )


def resolve_session(
    raw_key: str | None, agent_id: str | None, snapshot: GatewayConfiguration
) -> tuple[str, SessionKey | None]:
    """Return the agent meant and the session that a key names; None for the latter without a key.

    Raises AgentError or SessionKeyError.
    """
    selected = (agent_id or "").strip().lower() or None
    agent = snapshot.agent(selected).id
    session = session_keys.canonicalize(
        raw_key,
        selected_agent=selected,
        default_agent=snapshot.default_agent,
        main_key=snapshot.main_key,
        scope=snapshot.scope,
    )
    return agent, session


def session_to_read(key: str, agent_id: str | None, snapshot: GatewayConfiguration) -> SessionKey:
    """Return the session that a key means to somebody who only looks, whether it exists or not.

    A full key selects its own agent, which may be disabled; a blank one means the main session.
    Raises AgentError or SessionKeyError.
    """
    agent = (agent_id or "").strip().lower()
    if not agent and snapshot.scope == "per-agent":  # else no part of a key means anything
        agent = session_keys.named_agent(key) or ""
    agent = agent or snapshot.default_agent
    if agent not in snapshot.agents:
        snapshot.agent(agent)  # refuses it by name
    session = session_keys.canonicalize(
        key, selected_agent=agent, main_key=snapshot.main_key, scope=snapshot.scope
    )
    return session or snapshot.main_session(agent)


def _fan_out(
    selected: str | None, agent: str, snapshot: GatewayConfiguration
) -> tuple[SessionKey, ...]:
    if (selected or "").strip():
        return (snapshot.main_session(agent),)
    return tuple(
        snapshot.main_session(other.id) for other in snapshot.agents.values() if other.enabled
    )


def clean_text(text: str) -> str:
    """Return an event's text, trimmed.

    Raises TextError when it is empty, over 64 KiB in UTF-8, or not storable as text.
    """
    trimmed = text.strip()
    if not trimmed:
        raise TextError("text required")
    try:
        size = len(trimmed.encode())
    except UnicodeEncodeError as error:
        raise TextError("text is not valid Unicode: it contains a lone surrogate") from error
    if size > MAX_TEXT_BYTES:
        raise TextError(f"text is {size} bytes long; at most {MAX_TEXT_BYTES} are allowed")
    if "\0" in trimmed:
        raise TextError("text contains a NUL character")
    return trimmed


def parse_run_id(written: str | None) -> UUID | None:
    """Return the run that says to be the sender; None where none does, or no run can be meant."""
    try:
        return UUID(written) if written else None
    except ValueError:
        return None


def for_system_event(text: str, session_key: str | None, *, source: str) -> WakeRequest:
    """Return the wake that a WebSocket `system-event` stands for; it has no mode of its own.

    With a key that session is woken. Without one, and for a presence line (`Node: …`, whose key is
    ignored), the event waits in the default agent's main session and nobody is nudged.
    """
    if is_presence_line(text) or not (session_key or "").strip():
        return WakeRequest(text, source, Mode.NEXT_HEARTBEAT)
    return WakeRequest(text, source, Mode.NOW, session_key)


def is_presence_line(text: str) -> bool:
    """Whether a system event's text is a node's word about itself."""
    return text.lstrip().startswith("Node:")
