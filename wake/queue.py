"""The durable queue: the only place that moves events.

The session row is locked (PostgreSQL) or the database is (SQLite) while its events move, so a
session's events are stored, claimed and settled one transaction after the other: the order of
their ids is the order in which they were acknowledged. Every change of a lease is a guarded
UPDATE whose row count is checked; the comment beside it names who else could have won.

Times are aware datetimes and are always passed in. No function here decides *where* a wake goes
or *when* it is due: that is `wake.dispatch`.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timedelta
from typing import Final, Literal
from uuid import UUID

from django.db import transaction
from django.db.models import F, Min, OuterRef, Q, Subquery
from uuid_utils.compat import uuid7

from wake import doorbell
from wake.errors import LeaseLost, QueueFull
from wake.models import (
    Agent,
    AgentTurn,
    DueReason,
    EventState,
    Heartbeat,
    HeartbeatStatus,
    Session,
    SystemEvent,
)
from wake.session_keys import SessionKey

BATCH_EVENTS: Final = 200
BATCH_BYTES: Final = 256 * 1024
BACKOFF_BASE: Final = timedelta(seconds=2)
BACKOFF_LIMIT: Final = timedelta(minutes=10)
RETRY_AFTER_LIMIT: Final = timedelta(hours=1)

# A heartbeat that is due for one of these is due now: a time in the future can only be a clock
# that was set back, or another machine's that runs ahead.
_IMMEDIATE_REASONS: Final = (
    DueReason.WAKE,
    DueReason.RECOVERY,
    DueReason.REQUEUE,
    DueReason.OPERATOR,
)


@dataclass(frozen=True, slots=True)
class Due:
    """When a session is to have its next heartbeat, and why."""

    at: datetime
    reason: DueReason


@dataclass(frozen=True, slots=True)
class Turn:
    """A turn of its own: the event that it belongs to is handed over alone.

    `name` is for people: one line of at most 100 characters. `deliver` asks for a note about the
    outcome in the agent's main session. `timeout_seconds` is the turn's own time limit, at least
    1; without one it is the agent's.
    """

    name: str
    deliver: bool = True
    timeout_seconds: int | None = None


@dataclass(frozen=True, slots=True)
class Entry:
    """One event to store, when its session is due with it, and who else is nudged with it.

    `note_mode` is the mode of the note about the outcome of its `turn`, if it has one.
    """

    session: SessionKey
    text: str
    source: str
    external: bool
    due: Due
    nudged: tuple[SessionKey, ...] = ()
    turn: Turn | None = None
    note_mode: str = ""


@dataclass(frozen=True, slots=True)
class Stored:
    """What became of an entry: the event that stands for it."""

    outcome: Literal["queued", "coalesced"]
    event_id: UUID


@dataclass(frozen=True, slots=True)
class ClaimedEvent:
    """One event in a claim, in the order of the session."""

    pk: int
    event_id: UUID
    text: str
    source: str
    external: bool
    at: datetime


@dataclass(frozen=True, slots=True, eq=False)
class Claim:
    """A lease on a session: the events that one heartbeat is to hand over.

    Each is its own: two claims are never equal. `run_id` is the fencing token: it must still be
    the session's when the heartbeat settles. With a `turn` there is exactly one event, and the
    first run's id is that event's.
    """

    run_id: UUID
    session_id: int
    session: SessionKey
    reason: DueReason
    attempt: int
    events: tuple[ClaimedEvent, ...]
    more: bool  # further queued events follow those of this claim
    turn: Turn | None


# --- In -----------------------------------------------------------------------------------------


def enqueue(
    entries: Sequence[Entry], *, now: datetime, max_queued: int
) -> list[Stored | QueueFull]:
    """Store a batch in one transaction and return what became of each entry, in their order.

    An entry whose session is full fails alone; nothing of it is stored and nobody is nudged. An
    entry whose text, source and externality equal the newest event still queued in its session is
    coalesced with that one, unless a running heartbeat has taken it already. What has a turn of
    its own is never coalesced.
    Either all other entries are stored or, when this raises (DatabaseError), none.
    """
    if not entries:
        return []
    with transaction.atomic():
        wanted = {key for entry in entries for key in (entry.session, *entry.nudged)}
        sessions = _locked_sessions(wanted)
        newest = _newest_queued_events(session.pk for session in sessions.values())
        results: list[Stored | QueueFull] = []
        fresh: list[SystemEvent] = []
        turns: list[AgentTurn] = []
        for entry in entries:
            session = sessions[entry.session]
            twin = newest.get(session.pk)
            if twin and _is_same(twin, entry):
                results.append(Stored("coalesced", twin.uid))
            elif session.queued >= max_queued:
                results.append(
                    QueueFull(
                        f'session "{entry.session.key}" holds {session.queued} queued events, '
                        f"which is its limit; nothing was stored, try again later"
                    )
                )
                continue
            else:
                event = SystemEvent(
                    uid=uuid7(),
                    session=session,
                    text=entry.text,
                    source=entry.source,
                    external=entry.external,
                    alone=entry.turn is not None,
                    created_at=now,
                )
                fresh.append(event)
                if entry.turn:
                    turns.append(
                        AgentTurn(
                            event=event,
                            name=entry.turn.name,
                            timeout_seconds=entry.turn.timeout_seconds,
                            deliver=entry.turn.deliver,
                            note_mode=entry.note_mode,
                        )
                    )
                newest[session.pk] = event
                if session.batch_through is None and session.lease_token is None:
                    # What failed was a heartbeat without events: this one has all its attempts.
                    session.attempts = 0
                session.queued += 1
                session.last_event_at = now
                results.append(Stored("queued", event.uid))
            _bring_forward(session, entry.due)
            for nudged in entry.nudged:
                _bring_forward(sessions[nudged], Due(now, DueReason.WAKE))
        SystemEvent.objects.bulk_create(fresh)
        AgentTurn.objects.bulk_create(turns)
        Session.objects.bulk_update(
            sessions.values(), ["queued", "attempts", "due_at", "due_reason", "last_event_at"]
        )
        doorbell.ring([session.pk for session in sessions.values()])
    return results


def _locked_sessions(keys: Collection[SessionKey]) -> dict[SessionKey, Session]:
    """Return the sessions, made where they are missing, locked until the transaction ends."""
    wanted = set(keys)
    # In the order of their ids, so that two batches never wait for each other in a circle.
    locked = (
        Session.objects.select_for_update()
        .filter(agent_id__in={key.agent_id for key in wanted}, key__in={key.key for key in wanted})
        .order_by("pk")
    )
    found = {SessionKey(session.agent_id, session.key): session for session in locked}
    missing = sorted(wanted - found.keys())
    if missing:
        # Another process may make the same session at this moment; then its row is used.
        Session.objects.bulk_create(
            [Session(agent_id=agent_id, key=key) for agent_id, key in missing],
            ignore_conflicts=True,
        )
        found = {SessionKey(session.agent_id, session.key): session for session in locked.all()}
    return found


def _newest_queued_events(session_ids: Iterable[int]) -> dict[int, SystemEvent]:
    """Return, by session, the newest queued event that no running heartbeat has taken.

    A statement of its own after the sessions are locked: on PostgreSQL a statement that waited
    for a lock still sees the events as they were before it waited.
    """
    newest = (
        SystemEvent.objects.filter(session=OuterRef("pk"), state=EventState.QUEUED)
        .order_by("-pk")
        .values("pk")[:1]
    )
    not_taken = (
        Q(session__lease_token__isnull=True)
        | Q(session__batch_through__isnull=True)
        | Q(session__batch_through__lt=F("pk"))
    )
    events = SystemEvent.objects.filter(
        not_taken,
        pk__in=Session.objects.filter(pk__in=list(session_ids), queued__gt=0).values(
            newest=Subquery(newest)
        ),
    )
    return {event.session_id: event for event in events}


def _is_same(event: SystemEvent, entry: Entry) -> bool:
    if event.alone or entry.turn:
        return False
    return (event.text, event.source, event.external) == (entry.text, entry.source, entry.external)


def _bring_forward(session: Session, due: Due) -> None:
    """Make the session due at `due`, unless it is due earlier or backs off from a failure."""
    backs_off = session.attempts > 0 and session.lease_token is None
    if session.due_at is None or (due.at < session.due_at and not backs_off):
        session.due_at, session.due_reason = due.at, due.reason


# --- Out ----------------------------------------------------------------------------------------


def next_due(agents: Collection[str]) -> datetime | None:
    """Return when the next heartbeat of these agents is due, or None when none is."""
    waiting = Session.objects.filter(
        agent_id__in=agents, due_at__isnull=False, lease_token__isnull=True
    )
    due_at: datetime | None = waiting.aggregate(next=Min("due_at"))["next"]
    return due_at


def claim(
    running: Mapping[str, int],
    *,
    limit: int,
    most_each: int,
    owner: str,
    now: datetime,
    lease: timedelta,
) -> list[Claim]:
    """Lease up to `limit` due sessions, each agent's in the order in which they were due.

    `running` names the agents to claim for, with how many runs of theirs the caller has under way;
    none gets more than `most_each`. Agents take turns, so that one with much to do does not hold
    up the others. Fewer claims than `limit` do not mean that nothing more is due.

    Each claim's heartbeat is recorded as running, and counts as an attempt from now on: a process
    that dies with it has used it up.
    """
    due = Session.objects.filter(due_at__lte=now, lease_token__isnull=True)
    first = due.filter(agent_id=OuterRef("pk")).order_by("due_at").values("due_at")[:1]
    with transaction.atomic():
        firsts = Agent.objects.filter(pk__in=running).annotate(first=Subquery(first))
        places = allot(
            dict(firsts.filter(first__isnull=False).values_list("pk", "first")),
            running,
            limit=limit,
            most_each=most_each,
        )
        claims = [
            _take(session, owner=owner, now=now, lease=lease)
            for agent_id, count in places.items()
            # Another process may hold a row's lock: it is claiming it, so it is skipped.
            for session in due.filter(agent_id=agent_id)
            .order_by("due_at", "pk")
            .select_for_update(skip_locked=True)[:count]
        ]
        if claims:
            Heartbeat.objects.bulk_create(
                [
                    Heartbeat(
                        run_id=taken.run_id,
                        session_id=taken.session_id,
                        reason=taken.reason,
                        attempt=taken.attempt,
                        event_count=len(taken.events),
                        started_at=now,
                    )
                    for taken in claims
                ]
            )
            doorbell.ring([taken.session_id for taken in claims])
    return claims


def allot(
    first_due: Mapping[str, datetime], running: Mapping[str, int], *, limit: int, most_each: int
) -> dict[str, int]:
    """Share `limit` places among the agents that have something due. Pure.

    Each place goes to the agent with the fewest runs under way, and among equals to the one that
    has waited longest. Returns the places by agent; an agent may have less due than it is given.
    """
    waiting = [
        (running.get(agent_id, 0), due_at, agent_id) for agent_id, due_at in first_due.items()
    ]
    heapq.heapify(waiting)
    places: dict[str, int] = defaultdict(int)
    for _ in range(limit):
        if not waiting or waiting[0][0] >= most_each:
            break
        count, due_at, agent_id = heapq.heappop(waiting)
        places[agent_id] += 1
        heapq.heappush(waiting, (count + 1, due_at, agent_id))
    return dict(places)


def _take(session: Session, *, owner: str, now: datetime, lease: timedelta) -> Claim:
    events, more, turn = _next_batch(session)
    # Attempts count for a batch of events; those of a heartbeat that had none are not theirs, nor
    # those of a batch that has to wait for dead letters that were requeued before it.
    is_new_batch = bool(events) and events[-1].pk != session.batch_through
    attempt = 1 if is_new_batch else session.attempts + 1
    run_id = _run_id_of_turn(events[0]) if turn else uuid7()
    # Nobody else can have won: the row was read under its lock in this transaction.
    Session.objects.filter(pk=session.pk).update(
        lease_token=run_id,
        lease_owner=owner,
        lease_until=now + lease,
        due_at=None,
        due_reason="",
        attempts=attempt,
        batch_through=events[-1].pk if events else None,
    )
    return Claim(
        run_id=run_id,
        session_id=session.pk,
        session=SessionKey(session.agent_id, session.key),
        reason=DueReason(session.due_reason),
        attempt=attempt,
        events=events,
        more=more,
        turn=turn,
    )


def _run_id_of_turn(event: ClaimedEvent) -> UUID:
    """Return the event's own id, which its sender knows, or a new one if it was used already."""
    # Only this session's heartbeats can have used it, and the session is locked.
    is_used = Heartbeat.objects.filter(run_id=event.event_id).exists()
    return uuid7() if is_used else event.event_id


def _next_batch(session: Session) -> tuple[tuple[ClaimedEvent, ...], bool, Turn | None]:
    """Return the events of the session's next heartbeat, whether more are queued, and its turn.

    The last is there when the oldest event has a turn of its own; then that event comes alone.
    """
    queued = SystemEvent.objects.filter(session=session, state=EventState.QUEUED).order_by("pk")
    if session.attempts and session.batch_through is not None:
        # A further attempt takes the batch that failed, whatever came since.
        queued = queued.filter(pk__lte=session.batch_through)
    of_turn = ("alone", "turn__name", "turn__deliver", "turn__timeout_seconds")
    rows = queued.values_list("pk", "uid", "text", "source", "external", "created_at", *of_turn)
    taken: list[ClaimedEvent] = []
    size = 0
    for row in rows[:BATCH_EVENTS].iterator(chunk_size=50):
        event, alone = ClaimedEvent(*row[:6]), row[6]
        size += len(event.text.encode())
        if taken and (alone or size > BATCH_BYTES):
            break
        taken.append(event)
        if alone:
            return (event,), session.queued > 1, Turn(*row[7:])
    return tuple(taken), session.queued > len(taken), None


def renew(claims: Collection[Claim], *, now: datetime, lease: timedelta) -> set[UUID]:
    """Extend the leases of these claims and return the run ids of those that still hold one.

    A claim that is missing lost its lease, to another process that saw it run out.
    """
    if not claims:
        return set()
    with transaction.atomic():
        held = Session.objects.filter(
            pk__in={claim.session_id for claim in claims},
            lease_token__in={claim.run_id for claim in claims},
        )
        # Locked in the order of their ids, as every batch is, so that none waits in a circle.
        tokens = held.select_for_update().order_by("pk").values_list("lease_token", flat=True)
        renewed = {token for token in tokens if token}
        held.update(lease_until=now + lease)
        return renewed


# --- Settling -----------------------------------------------------------------------------------


def settle(
    claim: Claim,
    status: HeartbeatStatus,
    *,
    now: datetime,
    prompt: str = "",
    reply: str = "",
    next_scheduled: datetime | None = None,
) -> None:
    """Record that the claim's events were delivered, give the lease back, set the next due time.

    `next_scheduled` is the session's next scheduled heartbeat, if it has a schedule.
    Raises LeaseLost, and changes nothing, when the lease has gone to another run.
    """
    with transaction.atomic():
        session = _leased_session(claim)
        session.queued -= _settle_events(claim, EventState.DELIVERED, now)
        session.attempts = 0
        session.batch_through = None
        _give_back(session, claim, now, next_scheduled)
        _finish(claim.run_id, status, now, prompt=prompt, reply=reply)
        doorbell.ring([session.pk])


def fail(
    claim: Claim,
    error: str,
    *,
    now: datetime,
    max_attempts: int,
    permanent: bool = False,
    retry_after: timedelta | None = None,
    prompt: str = "",
    next_scheduled: datetime | None = None,
) -> None:
    """Record a failed attempt: try again after a backoff, or make its events dead letters.

    Dead letters are made at the last attempt, or at once when the failure is `permanent`.
    `retry_after` is the agent's own wish and lengthens the backoff, to an hour at most.
    Raises LeaseLost, and changes nothing, when the lease has gone to another run.
    """
    with transaction.atomic():
        session = _leased_session(claim)
        # A heartbeat without events is not tried again when there are events by now.
        overtaken = not claim.events and session.queued > 0
        if permanent or overtaken or claim.attempt >= max_attempts:
            session.queued -= _settle_events(claim, EventState.DEAD, now)
            session.attempts = 0
            session.batch_through = None
            _give_back(session, claim, now, next_scheduled)
        else:
            wait = max(backoff(claim.attempt), min(retry_after or timedelta(0), RETRY_AFTER_LIMIT))
            _drop_lease(session)
            session.due_at, session.due_reason = now + wait, DueReason.RETRY
            session.last_heartbeat_at = now
            session.save()
        _finish(claim.run_id, HeartbeatStatus.FAILED, now, prompt=prompt, error=error)
        doorbell.ring([session.pk])


def release(claim: Claim, *, now: datetime) -> None:
    """Give a claim back undone, as if it had not been taken: its process is asked to stop.

    Raises LeaseLost, and changes nothing, when the lease has gone to another run.
    """
    with transaction.atomic():
        session = _leased_session(claim)
        _drop_lease(session)
        session.attempts = claim.attempt - 1
        session.due_at, session.due_reason = now, claim.reason
        session.save()
        _finish(claim.run_id, HeartbeatStatus.RELEASED, now)
        doorbell.ring([session.pk])


def backoff(attempt: int) -> timedelta:
    """Return how long to wait after the failed attempt number `attempt` (1, 2, …).

    Exponential from 2 s up to 10 minutes, each drawn from the upper half of its range, so that
    sessions that failed together do not come back together.
    """
    full: timedelta = min(BACKOFF_BASE * 2 ** min(attempt - 1, 20), BACKOFF_LIMIT)
    return full * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret


def _leased_session(claim: Claim) -> Session:
    session = (
        Session.objects.select_for_update()
        .filter(pk=claim.session_id, lease_token=claim.run_id)
        .first()
    )
    if session is None:  # the lease ran out, and `reap` or another claim won
        raise LeaseLost(f"run {claim.run_id} lost its lease on {claim.session.key}")
    return session


def _settle_events(claim: Claim, state: EventState, now: datetime) -> int:
    """Settle exactly the claim's events and return how many there were."""
    run = Heartbeat.objects.filter(run_id=claim.run_id).values("pk")
    # An event may be missing: an operator can have discarded it while the heartbeat ran.
    return SystemEvent.objects.filter(
        pk__in=[event.pk for event in claim.events], state=EventState.QUEUED
    ).update(state=state, settled_at=now, heartbeat_id=Subquery(run))


def _give_back(
    session: Session, claim: Claim, now: datetime, next_scheduled: datetime | None
) -> None:
    _drop_lease(session)
    session.last_heartbeat_at = now
    if claim.more and session.queued:
        _bring_forward(session, Due(now, DueReason.WAKE))
    if next_scheduled:
        _bring_forward(session, Due(next_scheduled, DueReason.SCHEDULE))
    if session.queued and session.due_at is None:
        session.due_at, session.due_reason = now, DueReason.WAKE
    session.save()


def _drop_lease(session: Session) -> None:
    session.lease_token = None
    session.lease_owner = ""
    session.lease_until = None


def _finish(
    run_id: UUID,
    status: HeartbeatStatus,
    now: datetime,
    *,
    prompt: str = "",
    reply: str = "",
    error: str = "",
) -> None:
    Heartbeat.objects.filter(run_id=run_id).update(
        status=status, finished_at=now, prompt=prompt, reply=reply, error=error
    )


# --- Upkeep -------------------------------------------------------------------------------------


def reap(*, now: datetime, lease: timedelta, max_attempts: Mapping[str, int]) -> int:
    """Take leases back that ran out, and return how many: their processes died.

    The same events are due again at once, unless the lost attempt was the last one that the agent
    has (`max_attempts`, by agent id): what kills the process eight times becomes dead letters.
    """
    # The second half is a clock that was set back: no lease reaches further than its length.
    expired = Session.objects.filter(
        Q(lease_until__lt=now) | Q(lease_until__gt=now + lease), lease_token__isnull=False
    )
    if not expired.exists():
        return 0
    taken_back: list[int] = []
    with transaction.atomic():
        for session in expired.select_for_update(skip_locked=True).order_by("pk"):
            token = session.lease_token
            assert token is not None  # noqa: S101 - the filter says so
            if session.lease_until and session.lease_until > now + lease:
                Session.objects.filter(pk=session.pk).update(lease_until=now + lease)
                continue
            _drop_lease(session)
            if session.attempts >= max_attempts.get(session.agent_id, 1):
                session.queued -= _dead_letters(session, token, now)
                session.attempts = 0
                session.batch_through = None
            session.due_at, session.due_reason = now, DueReason.RECOVERY
            if not session.queued and not session.attempts:
                session.due_at, session.due_reason = None, ""
            session.save()
            _finish(
                token, HeartbeatStatus.LOST, now, error="its process stopped renewing the lease"
            )
            taken_back.append(session.pk)
        if taken_back:
            doorbell.ring(taken_back)
    return len(taken_back)


def _dead_letters(session: Session, run_id: UUID, now: datetime) -> int:
    if session.batch_through is None:
        return 0
    run = Heartbeat.objects.filter(run_id=run_id).values("pk")
    return SystemEvent.objects.filter(
        session=session, state=EventState.QUEUED, pk__lte=session.batch_through
    ).update(state=EventState.DEAD, settled_at=now, heartbeat_id=Subquery(run))


def correct_due_times(*, now: datetime) -> int:
    """Bring due times back that lie further ahead than their reason allows; return how many.

    They come from a clock that was set back, or from a machine whose clock runs ahead; left alone
    they would stall their sessions for as long as the clock jumped.
    """
    ahead = Q(due_at__gt=now, due_reason__in=_IMMEDIATE_REASONS)
    backoff_ahead = Q(due_at__gt=now + RETRY_AFTER_LIMIT, due_reason=DueReason.RETRY)
    stalled = Session.objects.filter(ahead | backoff_ahead)
    if not stalled.exists():
        return 0
    return stalled.update(due_at=now)


def turn_back_retries(by: timedelta, *, now: datetime) -> int:
    """Bring retries forward by as much as the clock was set back; return how many."""
    return Session.objects.filter(due_at__gt=now, due_reason=DueReason.RETRY).update(
        due_at=F("due_at") - by
    )


def keep_schedules(schedules: Mapping[SessionKey, datetime | None], *, now: datetime) -> None:
    """Make each agent's main session due at its next scheduled time; without a schedule, at none.

    `schedules` holds every main session. Events that wait for a schedule that is no more, or in a
    session that no longer is a main session, are due at once.
    """
    main_sessions = Session.objects.filter(
        agent_id__in={key.agent_id for key in schedules}, key__in={key.key for key in schedules}
    )
    scheduled = Session.objects.filter(due_at__gt=now, due_reason=DueReason.SCHEDULE)
    known = {
        SessionKey(session.agent_id, session.key): session
        for session in (*main_sessions, *scheduled)
    }
    changed = [
        key
        for key in schedules.keys() | known.keys()
        if _is_off_schedule(known.get(key), schedules.get(key))
    ]
    if not changed:
        return
    with transaction.atomic():
        sessions = _locked_sessions(changed)
        for key, session in sessions.items():
            _put_on_schedule(session, schedules.get(key), now)
        Session.objects.bulk_update(sessions.values(), ["due_at", "due_reason"])
        doorbell.ring([session.pk for session in sessions.values()])


def _is_off_schedule(session: Session | None, next_scheduled: datetime | None) -> bool:
    if next_scheduled is None:
        return session is not None and session.due_reason == DueReason.SCHEDULE
    if session is None:
        return True
    if session.due_at is None:
        return session.lease_token is None
    return session.due_reason == DueReason.SCHEDULE and session.due_at > next_scheduled


def _put_on_schedule(session: Session, next_scheduled: datetime | None, now: datetime) -> None:
    if session.due_reason == DueReason.SCHEDULE:
        session.due_at, session.due_reason = None, ""
    if next_scheduled is not None:
        _bring_forward(session, Due(next_scheduled, DueReason.SCHEDULE))
    elif session.queued and session.due_at is None:
        session.due_at, session.due_reason = now, DueReason.WAKE


# --- By hand ------------------------------------------------------------------------------------


def wake_sessions(session_ids: Collection[int], *, now: datetime) -> int:
    """Make sessions due now, even those that back off; return how many. For operators."""
    with transaction.atomic():
        waiting = Session.objects.filter(pk__in=session_ids).exclude(
            due_at__isnull=False, due_at__lte=now
        )
        locked = list(waiting.select_for_update().order_by("pk").values_list("pk", flat=True))
        woken = Session.objects.filter(pk__in=locked).update(
            due_at=now, due_reason=DueReason.OPERATOR
        )
        doorbell.ring(locked)
    return woken


def requeue(event_ids: Collection[int], *, now: datetime) -> int:
    """Queue dead letters again, in their old order, due now; return how many. For operators."""
    with transaction.atomic():
        moved = 0
        changed: list[int] = []
        for session, pks in _dead_by_session(event_ids):
            # Somebody else can have requeued or discarded some in between.
            count = SystemEvent.objects.filter(pk__in=pks, state=EventState.DEAD).update(
                state=EventState.QUEUED, settled_at=None, heartbeat=None
            )
            # What comes of a turn now is news again.
            AgentTurn.objects.filter(pk__in=pks, event__state=EventState.QUEUED).update(
                noted_at=None
            )
            session.queued += count
            _bring_forward(session, Due(now, DueReason.REQUEUE))
            session.save(update_fields=["queued", "due_at", "due_reason"])
            moved += count
            changed.append(session.pk)
        doorbell.ring(changed)
    return moved


def discard(event_ids: Collection[int], *, now: datetime) -> int:
    """Give up dead letters for good; they stay on record. Return how many. For operators."""
    dead = SystemEvent.objects.filter(pk__in=event_ids, state=EventState.DEAD)
    with transaction.atomic():
        changed = list(dead.order_by().values_list("session_id", flat=True).distinct())
        discarded = dead.update(state=EventState.DISCARDED, settled_at=now)
        doorbell.ring(changed)
    return discarded


def _dead_by_session(event_ids: Collection[int]) -> list[tuple[Session, list[int]]]:
    dead = SystemEvent.objects.filter(pk__in=event_ids, state=EventState.DEAD)
    by_session: dict[int, list[int]] = defaultdict(list)
    for pk, session_id in dead.values_list("pk", "session_id"):
        by_session[session_id].append(pk)
    sessions = Session.objects.select_for_update().filter(pk__in=by_session).order_by("pk")
    return [(session, by_session[session.pk]) for session in sessions]
