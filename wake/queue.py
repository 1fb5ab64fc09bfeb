"""The durable queue: the only place that moves events.

The session row is locked (PostgreSQL) or the database is (SQLite) while its events move, so a
session's events are stored, claimed and settled one transaction after the other: the order of
their ids is the order in which they were acknowledged. Whoever changes a lease has the session
locked, and looks first whether the lease is still its own; a comment names who else could have won.

Times are aware datetimes and are always passed in. No function here decides *where* a wake goes
or *when* it is due: that is `wake.dispatch`.
"""

from __future__ import annotations

import heapq
import random
from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from hashlib import blake2b
from typing import Any, Final, Literal, TypeVar
from uuid import UUID

import msgspec
from django.db import transaction
from django.db.models import Count, F, Q, Subquery
from uuid_utils.compat import uuid7

from wake import columns, doorbell, guards, metrics, rows
from wake.errors import LeaseLost, QueueFull
from wake.models import (
    PRIORITIES,
    Agent,
    AgentTurn,
    DueReason,
    EventState,
    Heartbeat,
    HeartbeatStatus,
    HoldReason,
    RunnerKind,
    Session,
    SystemEvent,
    priority_of,
)
from wake.rows import EventRow, HeartbeatRow, SessionRow
from wake.session_keys import SessionKey

T = TypeVar("T")

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
# A heartbeat without events that is due for one of these is nobody's wish.
_IDLE_REASONS: Final = (
    DueReason.WAKE,
    DueReason.SCHEDULE,
    DueReason.RETRY,
    DueReason.RECOVERY,
)


class Due(msgspec.Struct, frozen=True):
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


class Entry(msgspec.Struct, frozen=True):
    """One event to store, when its session is due with it, and who else is nudged with it.

    `note_mode` is the mode of the note about the outcome of its `turn`, if it has one. `run_id` is
    the run that sends it, if one does; where that is a run of the same session,
    `self_wake_limit` is how often in a row it may.
    """

    session: SessionKey
    text: str
    source: str
    external: bool
    due: Due
    nudged: tuple[SessionKey, ...] = ()
    turn: Turn | None = None
    note_mode: str = ""
    run_id: UUID | None = None
    self_wake_limit: int | None = None


class Stored(msgspec.Struct, frozen=True):
    """What became of an entry: the event that stands for it."""

    outcome: Literal["queued", "coalesced"]
    event_id: UUID


@dataclass(frozen=True, slots=True)
class Terms:
    """On what terms an agent's sessions are claimed.

    `running` is how many runs of it the caller has under way, and `most` how many it may have.
    `max_parallel_runs` counts those of all processes. With `only_with_events` a heartbeat that
    would have none does not run. `runner` is recorded with each run.
    """

    running: int
    most: int
    max_parallel_runs: int | None = None
    max_runs_per_minute: int | None = None
    only_with_events: bool = False
    runner: RunnerKind = RunnerKind.NONE


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
    runner: RunnerKind = RunnerKind.NONE


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
    with transaction.atomic(savepoint=False):
        sessions = _locked_sessions(
            {key for entry in entries for key in (entry.session, *entry.nudged)}
        )
        senders = _sessions_of_runs(entries)
        arrivals: list[tuple[Entry, SessionRow, bool, str]] = []
        for entry in entries:
            session = sessions[entry.session]
            is_own = entry.run_id is not None and senders.get(entry.run_id) == session.pk
            arrivals.append((entry, session, is_own, _digest(entry, is_own)))
        newest = _newest_queued_events(
            session for _, session, _, digest in arrivals if session.newest_digest in ("", digest)
        )
        results: list[Stored | QueueFull] = []
        fresh: list[EventRow] = []
        turns: list[tuple[UUID, Entry]] = []
        counts = metrics.Counts()
        for entry, session, is_own, digest in arrivals:
            twin = newest.get(session.pk)
            if twin and _is_same(twin, entry, is_own):
                counts.wake(entry.source, "coalesced")
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
                event = EventRow(
                    uid=uuid7(),
                    session_id=session.pk,
                    text=entry.text,
                    source=entry.source,
                    external=entry.external,
                    alone=entry.turn is not None,
                    own=is_own,
                )
                fresh.append(event)
                if entry.turn:
                    turns.append((event.uid, entry))
                newest[session.pk] = event
                if session.batch_through is None and session.lease_token is None:
                    # What failed was a heartbeat without events: this one has all its attempts.
                    session.attempts = 0
                session.queued += 1
                session.last_event_at, session.newest_digest = now, digest
                counts.wake(entry.source, "queued")
                results.append(Stored("queued", event.uid))
            if is_own and guards.is_self_wake_held(session.own_runs, entry.self_wake_limit):
                _hold_self_wake(session, now)
            else:
                _bring_forward(session, entry.due)
            for nudged in entry.nudged:
                _bring_forward(sessions[nudged], Due(now, DueReason.WAKE))
        with columns.as_one():
            rows.insert_events(fresh, now)
            rows.save_arrivals(sessions.values())
            counts.write()
            doorbell.ring([session.pk for session in sessions.values()])
        _store_turns(turns)
    return results


def _store_turns(turns: Sequence[tuple[UUID, Entry]]) -> None:
    if not turns:
        return
    columns.send_gathered()
    stored = SystemEvent.objects.filter(uid__in=[uid for uid, _ in turns])
    pks = dict(stored.values_list("uid", "pk"))
    AgentTurn.objects.bulk_create(
        [
            AgentTurn(
                event_id=pks[uid],
                name=entry.turn.name,
                timeout_seconds=entry.turn.timeout_seconds,
                deliver=entry.turn.deliver,
                note_mode=entry.note_mode,
            )
            for uid, entry in turns
            if entry.turn
        ]
    )


def _locked_sessions(keys: Collection[SessionKey]) -> dict[SessionKey, SessionRow]:
    """Return the sessions, made where they are missing, locked until the transaction ends."""
    found = rows.lock_sessions(keys)
    missing = sorted(keys - found.keys())
    if missing:
        # Another process may make the same session at this moment; then its row is used.
        Session.objects.bulk_create(
            [Session(agent_id=agent_id, key=key) for agent_id, key in missing],
            ignore_conflicts=True,
        )
        found = rows.lock_sessions(keys)
    return found


def _digest(entry: Entry, is_own: bool) -> str:
    """Return what all entries have alike that could be coalesced, and (nearly) no others."""
    if entry.turn:
        return _LIKE_NO_OTHER
    said = f"{entry.source}\0{entry.external:d}{is_own:d}{entry.text}"
    return blake2b(said.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


_LIKE_NO_OTHER: Final = "turn"


def _newest_queued_events(sessions: Iterable[SessionRow]) -> dict[int, EventRow]:
    """Return, by session, the newest queued event that no running heartbeat has taken."""
    by_pk = {session.pk: session for session in sessions if session.queued > 0}
    return {
        event.session_id: event
        for event in rows.newest_queued_events(list(by_pk))
        if not _is_taken(event, by_pk[event.session_id])
    }


def _is_taken(event: EventRow, session: SessionRow) -> bool:
    taken_through = session.batch_through if session.lease_token is not None else None
    return taken_through is not None and event.pk is not None and event.pk <= taken_through


def _sessions_of_runs(entries: Sequence[Entry]) -> dict[UUID, int]:
    """Return, by run, the id of its session; for the runs that send one of the entries."""
    runs = {entry.run_id for entry in entries if entry.run_id}
    if not runs:
        return {}
    return dict(Heartbeat.objects.filter(run_id__in=runs).values_list("run_id", "session_id"))


def _is_same(event: EventRow, entry: Entry, is_own: bool) -> bool:
    if event.alone or entry.turn:
        return False
    stored = (event.text, event.source, event.external, event.own)
    return stored == (entry.text, entry.source, entry.external, is_own)


# What the functions below change of a session.
_DUE_FIELDS: Final = ("due_at", "due_reason", "held_until", "held_by")


def _bring_forward(session: Session | SessionRow, due: Due) -> None:
    """Make the session due at `due`, unless it is due earlier or backs off from a failure.

    Where its rate is limited now, it is due when that ends. What is due already takes the more
    urgent one of its reasons.
    """
    at = max(due.at, _rate_hold(session) or due.at)
    backs_off = session.attempts > 0 and session.lease_token is None
    if session.due_at is None or (at < session.due_at and not backs_off):
        session.due_at, session.due_reason = at, due.reason.value
    elif session.due_at <= due.at and priority_of(due.reason) < priority_of(session.due_reason):
        session.due_reason = due.reason.value
    if session.held_by == HoldReason.SELF_WAKES and session.due_at != session.held_until:
        _lift_hold(session)


def _rate_hold(session: Session | SessionRow) -> datetime | None:
    return session.held_until if session.held_by == HoldReason.RATE else None


def _hold_self_wake(session: SessionRow, now: datetime) -> None:
    """Let the session wait for somebody else to wake it, or for the end of a long pause."""
    if session.due_at is None:
        session.due_at, session.due_reason = now + guards.SELF_WAKE_HOLD, DueReason.WAKE.value
        session.held_until, session.held_by = session.due_at, HoldReason.SELF_WAKES.value


def _lift_hold(session: Session | SessionRow) -> None:
    session.held_until, session.held_by = None, ""


# --- Out ----------------------------------------------------------------------------------------


FirstDue = Mapping[int, Mapping[str, datetime]]


def first_due(agents: Collection[str]) -> FirstDue:
    """Return, by priority, when the first free session of each of these agents is due."""
    return rows.first_due(sorted(agents))


def next_due(first: FirstDue) -> datetime | None:
    """Return when the next of these heartbeats is due, or None when none is. Pure."""
    return min(
        (due_at for by_agent in first.values() for due_at in by_agent.values()), default=None
    )


def claim(
    terms: Mapping[str, Terms],
    *,
    limit: int,
    owner: str,
    now: datetime,
    lease: timedelta,
    first: FirstDue | None = None,
) -> list[Claim]:
    """Lease up to `limit` due sessions of the agents in `terms`.

    What a person asked for goes first, then what was woken, then what is only scheduled. Within
    one of these agents take turns, so that one with much to do does not hold up the others, and
    each agent's sessions come in the order in which they were due. Fewer claims than `limit` do
    not mean that nothing more is due. `first` is what `first_due` has just said, if it was asked.

    Each claim's heartbeat is recorded as running, and counts as an attempt from now on: a process
    that dies with it has used it up.
    """
    first = first_due(terms) if first is None else first
    with transaction.atomic(savepoint=False):
        running = {agent_id: agent_terms.running for agent_id, agent_terms in terms.items()}
        most = _most(terms)
        claims: list[Claim] = []
        leased: list[SessionRow] = []
        idle: list[SessionRow] = []
        for priority in PRIORITIES:
            due = {agent_id: at for agent_id, at in first.get(priority, {}).items() if at <= now}
            places = allot(due, running, limit=limit - len(claims), most=most)
            for agent_id, count in places.items():
                for session in rows.due_sessions(agent_id, priority, now, count):
                    if _is_idle(session, terms[agent_id]):
                        idle.append(session)
                        continue
                    claims.append(_take(session, terms[agent_id], now))
                    leased.append(session)
                    running[agent_id] += 1
        _pass_over(idle)
        if claims:
            rows.save_leases(leased, owner=owner, until=now + lease)
            rows.insert_heartbeats(
                [
                    HeartbeatRow(
                        taken.run_id,
                        taken.session_id,
                        taken.reason.value,
                        taken.attempt,
                        taken.runner.value,
                        len(taken.events),
                    )
                    for taken in claims
                ],
                now,
            )
            counts = metrics.Counts()
            for new in claims:
                if new.attempt == 1:
                    counts.started((event.at for event in new.events), now)
            counts.write()
            doorbell.ring([taken.session_id for taken in claims])
    if idle and len(claims) < limit:  # they took the places of others
        now_running = {
            agent_id: replace(its, running=running[agent_id]) for agent_id, its in terms.items()
        }
        left = limit - len(claims)
        claims += claim(now_running, limit=left, owner=owner, now=now, lease=lease)
    return claims


def _is_idle(session: SessionRow, terms: Terms) -> bool:
    """Whether it is a heartbeat without events, and its agent wants none such.

    A person's wish, or dead letters that were requeued, are no idle runs.
    """
    return terms.only_with_events and session.queued == 0 and session.due_reason in _IDLE_REASONS


def _pass_over(idle: Sequence[SessionRow]) -> None:
    """Let due heartbeats go by."""
    for session in idle:
        session.due_at, session.due_reason = None, ""
        session.attempts = 0
    rows.save_arrivals(idle)


def _most(terms: Mapping[str, Terms]) -> dict[str, int]:
    """Return how many runs each agent may have under way with the caller.

    Where all processes together have a limit, the agent's row is locked, so that two of them do
    not both take the last place.
    """
    limited = sorted(agent_id for agent_id, its in terms.items() if its.max_parallel_runs)
    if not limited:
        return {agent_id: its.most for agent_id, its in terms.items()}
    list(Agent.objects.select_for_update().filter(pk__in=limited).order_by("pk").values_list("pk"))
    leased = Session.objects.filter(agent_id__in=limited, lease_token__isnull=False)
    under_way = dict(leased.values_list("agent_id").annotate(Count("pk")).order_by())
    most = {}
    for agent_id, its in terms.items():
        most[agent_id] = its.most
        if its.max_parallel_runs:
            elsewhere = max(0, under_way.get(agent_id, 0) - its.running)
            most[agent_id] = min(its.most, its.max_parallel_runs - elsewhere)
    return most


def allot(
    first_due: Mapping[str, datetime],
    running: Mapping[str, int],
    *,
    limit: int,
    most: Mapping[str, int],
) -> dict[str, int]:
    """Share `limit` places among the agents that have something due. Pure.

    Each place goes to the agent with the fewest runs under way, and among equals to the one that
    has waited longest; none gets more than `most` of it in all. Returns the places by agent; an
    agent may have less due than it is given.
    """
    waiting = [
        (running.get(agent_id, 0), due_at, agent_id) for agent_id, due_at in first_due.items()
    ]
    heapq.heapify(waiting)
    places: dict[str, int] = defaultdict(int)
    left = limit
    while waiting and left > 0:
        count, due_at, agent_id = heapq.heappop(waiting)
        if count < most[agent_id]:
            left -= 1
            places[agent_id] += 1
            heapq.heappush(waiting, (count + 1, due_at, agent_id))
    return dict(places)


def _take(session: SessionRow, terms: Terms, now: datetime) -> Claim:
    """Return the claim on a due session, which is changed accordingly and stored by the caller."""
    events, more, turn, all_own = _next_batch(session)
    # Attempts count for a batch of events; those of a heartbeat that had none are not theirs, nor
    # those of a batch that has to wait for dead letters that were requeued before it.
    is_new_batch = bool(events) and events[-1].pk != session.batch_through
    attempt = 1 if is_new_batch else session.attempts + 1
    if events and attempt == 1:
        session.own_runs = session.own_runs + 1 if all_own else 0
    claim = Claim(
        run_id=_run_id_of_turn(events[0]) if turn else uuid7(),
        session_id=session.pk,
        session=SessionKey(session.agent_id, session.key),
        reason=DueReason(session.due_reason),
        attempt=attempt,
        events=events,
        more=more,
        turn=turn,
        runner=terms.runner,
    )
    session.lease_token = claim.run_id
    session.due_at, session.due_reason = None, ""
    session.attempts = attempt
    session.batch_through = events[-1].pk if events else None
    session.held_until = _next_rate_hold(session.pk, terms.max_runs_per_minute, now)
    session.held_by = HoldReason.RATE.value if session.held_until else ""
    return claim


def _next_rate_hold(session_id: int, limit: int | None, now: datetime) -> datetime | None:
    """Return until when no heartbeat of the session may follow the one that begins now."""
    if limit is None:
        return None
    return guards.rate_hold([now, *rows.newest_starts(session_id, limit - 1)], limit, now)


def _run_id_of_turn(event: ClaimedEvent) -> UUID:
    """Return the event's own id, which its sender knows, or a new one if it was used already."""
    # Only this session's heartbeats can have used it, and the session is locked.
    is_used = Heartbeat.objects.filter(run_id=event.event_id).exists()
    return uuid7() if is_used else event.event_id


def _next_batch(
    session: SessionRow,
) -> tuple[tuple[ClaimedEvent, ...], bool, Turn | None, bool]:
    """Return the events of the session's next heartbeat, whether more are queued, and its turn.

    The turn is there when the oldest event has one of its own; then that event comes alone. Last,
    whether all of the events were sent by runs of the session itself.
    """
    # A further attempt takes the batch that failed, whatever came since.
    through = session.batch_through if session.attempts else None
    taken: list[ClaimedEvent] = []
    all_own = True
    size = 0
    for row in rows.queued_events(session.pk, through, BATCH_EVENTS):
        size += len(row.text.encode())
        if taken and (row.alone or size > BATCH_BYTES):
            break
        taken.append(
            ClaimedEvent(row.pk, row.uid, row.text, row.source, row.external, row.created_at)
        )
        all_own = all_own and row.own
        if row.alone:
            turn = Turn(row.turn_name or "", row.turn_deliver is True, row.turn_timeout_seconds)
            return tuple(taken), session.queued > 1, turn, all_own
    return tuple(taken), session.queued > len(taken), None, all_own


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


class Settlement(msgspec.Struct, frozen=True):
    """A claim whose events were delivered; `status` and the rest is what is kept of the run.

    `next_scheduled` is the session's next scheduled heartbeat, if it has a schedule. `then` is
    called in the same transaction, once it is settled.
    """

    claim: Claim
    status: HeartbeatStatus
    prompt: str = ""
    reply: str = ""
    next_scheduled: datetime | None = None
    then: Callable[[], None] | None = None


def settle_all(settlements: Sequence[Settlement], *, now: datetime) -> list[LeaseLost | None]:
    """Record that claims were delivered, give their leases back, set the next due times.

    Returns for each why it was refused: its lease has gone to another run. Nothing of that one is
    changed; all others are settled or, when this raises, none.
    """
    if not settlements:
        return []
    with transaction.atomic(savepoint=False):
        leases = {one.claim.run_id: one.claim.session_id for one in settlements}
        sessions = rows.leased_sessions(leases)
        kept = [one for one in settlements if one.claim.run_id in sessions]
        runs = rows.heartbeats_of([one.claim.run_id for one in kept])
        # An event may be missing: an operator can have discarded it while the heartbeat ran.
        settled = rows.settle_events(
            {event.pk: runs[one.claim.run_id] for one in kept for event in one.claim.events},
            EventState.DELIVERED.value,
            now,
        )
        counts = metrics.Counts()
        for one in kept:
            session = sessions[one.claim.run_id]
            session.queued -= sum(event.pk in settled for event in one.claim.events)
            session.attempts = 0
            session.batch_through = None
            _give_back(session, now, one.next_scheduled, more=one.claim.more)
            counts.done((event.at for event in one.claim.events), EventState.DELIVERED, now)
            counts.run(one.claim.runner, one.status)
        rows.save_free(sessions.values(), last_heartbeat_at=now)
        rows.finish_heartbeats(
            {
                runs[one.claim.run_id]: rows.Ending(one.status.value, one.prompt, one.reply)
                for one in kept
            },
            now,
        )
        for one in kept:
            if one.then:
                one.then()
        counts.write()
        doorbell.ring([session.pk for session in sessions.values()])
    return [None if one.claim.run_id in sessions else _lost(one.claim) for one in settlements]


def settle(
    claim: Claim,
    status: HeartbeatStatus,
    *,
    now: datetime,
    prompt: str = "",
    reply: str = "",
    next_scheduled: datetime | None = None,
) -> None:
    """Settle one claim, as `settle_all` does.

    Raises LeaseLost, and changes nothing, when the lease has gone to another run.
    """
    settlement = Settlement(claim, status, prompt, reply, next_scheduled)
    (lost,) = settle_all([settlement], now=now)
    if lost:
        raise lost


def fail(
    claim: Claim,
    error: str,
    *,
    now: datetime,
    max_attempts: int,
    permanent: bool = False,
    retry_after: timedelta | None = None,
    handed_over: int = 0,
    is_about_one: bool = False,
    prompt: str = "",
    next_scheduled: datetime | None = None,
) -> None:
    """Record a failed attempt: the claim's events are due again later, or become dead letters.

    Dead letters are made at the last attempt, or at once when the failure is `permanent`.
    `retry_after` is the agent's own wish and lengthens the backoff, to an hour at most.
    The first `handed_over` of the events were delivered before it failed. What failed is the next
    one alone where it `is_about_one`, else all the rest.
    Raises LeaseLost, and changes nothing, when the lease has gone to another run.
    """
    with transaction.atomic():
        session = _leased_session(claim)
        counts = metrics.Counts()
        session.queued -= _settle_events(
            claim, claim.events[:handed_over], EventState.DELIVERED, now, counts
        )
        rest = claim.events[handed_over:]
        failed = rest[:1] if is_about_one else rest
        # What comes after events that were taken is at its first attempt.
        attempt = 1 if handed_over else claim.attempt
        # A heartbeat without events is not tried again when there are events by now.
        overtaken = not claim.events and session.queued > 0
        if permanent or overtaken or attempt >= max_attempts:
            session.queued -= _settle_events(claim, failed, EventState.DEAD, now, counts)
            session.attempts = 0
            session.batch_through = None
            more = claim.more or len(failed) < len(rest)
            _give_back(session, now, next_scheduled, more=more)
        else:
            wait = max(backoff(attempt), min(retry_after or timedelta(0), RETRY_AFTER_LIMIT))
            session.attempts = attempt
            session.due_at = max(now + wait, _rate_hold(session) or now)
            session.due_reason = DueReason.RETRY.value
        rows.save_free([session], last_heartbeat_at=now)
        _finish(claim.run_id, HeartbeatStatus.FAILED, now, prompt=prompt, error=error)
        counts.run(claim.runner, HeartbeatStatus.FAILED)
        counts.write()
        doorbell.ring([session.pk])


def lose(claim: Claim, error: str, *, now: datetime, max_attempts: int) -> None:
    """Take a claim back from who is gone with it: as `reap` does, without waiting for the lease.

    Raises LeaseLost, and changes nothing, when the lease has gone to another run.
    """
    with transaction.atomic():
        session = _leased_session(claim)
        counts = metrics.Counts()
        _take_back(session, now, max_attempts, error, counts)
        counts.write()
        doorbell.ring([session.pk])


def release(claim: Claim, *, now: datetime, handed_over: int = 0) -> None:
    """Give a claim back undone, as if it had not been taken: its process is asked to stop.

    The first `handed_over` of its events were delivered, and are not given back.
    Raises LeaseLost, and changes nothing, when the lease has gone to another run.
    """
    with transaction.atomic():
        session = _leased_session(claim)
        counts = metrics.Counts()
        session.queued -= _settle_events(
            claim, claim.events[:handed_over], EventState.DELIVERED, now, counts
        )
        session.attempts = claim.attempt - 1
        if handed_over:
            session.attempts, session.batch_through = 0, None
        if session.queued or not handed_over:
            session.due_at, session.due_reason = now, claim.reason.value
        rows.save_free([session])
        _finish(claim.run_id, HeartbeatStatus.RELEASED, now)
        counts.run(claim.runner, HeartbeatStatus.RELEASED)
        counts.write()
        doorbell.ring([session.pk])


def backoff(attempt: int) -> timedelta:
    """Return how long to wait after the failed attempt number `attempt` (1, 2, …).

    Exponential from 2 s up to 10 minutes, each drawn from the upper half of its range, so that
    sessions that failed together do not come back together.
    """
    full: timedelta = min(BACKOFF_BASE * 2 ** min(attempt - 1, 20), BACKOFF_LIMIT)
    return full * random.uniform(0.5, 1.0)  # noqa: S311 - jitter, not a secret


def _leased_session(claim: Claim) -> SessionRow:
    session = rows.leased_sessions({claim.run_id: claim.session_id}).get(claim.run_id)
    if session is None:
        raise _lost(claim)
    return session


def _lost(claim: Claim) -> LeaseLost:
    # The lease ran out, and `reap` or another claim won.
    return LeaseLost(f"run {claim.run_id} lost its lease on {claim.session.key}")


def _settle_events(
    claim: Claim,
    events: Sequence[ClaimedEvent],
    state: EventState,
    now: datetime,
    counts: metrics.Counts,
) -> int:
    """Settle exactly these events of the claim and return how many there were."""
    if not events:
        return 0
    counts.done((event.at for event in events), state, now)
    run = rows.heartbeats_of([claim.run_id])[claim.run_id]
    return len(rows.settle_events({event.pk: run for event in events}, state.value, now))


def _give_back(
    session: SessionRow, now: datetime, next_scheduled: datetime | None, *, more: bool
) -> None:
    """Free the session, which the caller stores.

    `more` says that events were left out of the claim; they are due now.
    """
    session.lease_token = None
    if more and session.queued:
        _bring_forward(session, Due(now, DueReason.WAKE))
    if next_scheduled:
        _bring_forward(session, Due(next_scheduled, DueReason.SCHEDULE))
    if session.queued and session.due_at is None:
        _bring_forward(session, Due(now, DueReason.WAKE))


def _finish(
    run_id: UUID, status: HeartbeatStatus, now: datetime, *, prompt: str = "", error: str = ""
) -> None:
    ending = rows.Ending(status.value, prompt, error=error)
    rows.finish_heartbeats(dict.fromkeys(rows.heartbeats_of([run_id]).values(), ending), now)


# --- Together -----------------------------------------------------------------------------------


def together(
    steps: Sequence[Settlement | Callable[[], Any]],
    *,
    sessions: Collection[int] = (),
    now: datetime,
) -> list[Any]:
    """Settle claims, and then take other steps that claim or settle, in one transaction.

    `sessions` are the ids of those that the steps settle: all are locked first, so that nobody who
    has some of them waits for the others in a circle.

    Returns the result of each, None for a settlement. One that raises LeaseLost, or is refused so,
    has changed nothing and undoes no other: that is its result. What else one raises undoes all of
    them, and is raised.
    """
    with transaction.atomic():
        rows.lock(sessions)
        settlements = [step for step in steps if isinstance(step, Settlement)]
        refusals = iter(settle_all(settlements, now=now))
        return [next(refusals) if isinstance(step, Settlement) else _result(step) for step in steps]


def _result(step: Callable[[], T]) -> T | LeaseLost:
    try:
        with transaction.atomic():
            return step()
    except LeaseLost as lost:
        return lost


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
    counts = metrics.Counts()
    with transaction.atomic():
        for found in expired.select_for_update(skip_locked=True).order_by("pk"):
            if found.lease_until and found.lease_until > now + lease:
                Session.objects.filter(pk=found.pk).update(lease_until=now + lease)
                continue
            token = found.lease_token
            session = rows.leased_sessions({token: found.pk}).get(token) if token else None
            if not session:  # the row is locked, and is as it was read
                continue
            most = max_attempts.get(session.agent_id, 1)
            _take_back(session, now, most, "its process stopped renewing the lease", counts)
            taken_back.append(session.pk)
        if taken_back:
            counts.write()
            doorbell.ring(taken_back)
    return len(taken_back)


def _take_back(
    session: SessionRow, now: datetime, max_attempts: int, error: str, counts: metrics.Counts
) -> None:
    """End the session's run as lost. The same events are due again, unless it was the last try."""
    token = session.lease_token
    assert token is not None  # noqa: S101 - a lost lease was one
    if session.attempts >= max_attempts:
        session.queued -= _dead_letters(session, token, now, counts)
        session.attempts = 0
        session.batch_through = None
    session.due_at = max(now, _rate_hold(session) or now)
    session.due_reason = DueReason.RECOVERY.value
    if not session.queued and not session.attempts:
        session.due_at, session.due_reason = None, ""
    rows.save_free([session])
    _finish(token, HeartbeatStatus.LOST, now, error=error)
    runner = Heartbeat.objects.filter(run_id=token).values_list("runner", flat=True).first()
    counts.run(runner or "", HeartbeatStatus.LOST)


def _dead_letters(session: SessionRow, run_id: UUID, now: datetime, counts: metrics.Counts) -> int:
    if session.batch_through is None:
        return 0
    run = Heartbeat.objects.filter(run_id=run_id).values("pk")
    events = SystemEvent.objects.filter(
        session=session.pk, state=EventState.QUEUED, pk__lte=session.batch_through
    )
    counts.done(events.values_list("created_at", flat=True), EventState.DEAD, now)
    return events.update(state=EventState.DEAD, settled_at=now, heartbeat_id=Subquery(run))


def correct_due_times(*, now: datetime) -> int:
    """Bring due times back that lie further ahead than their reason allows; return how many.

    They come from a clock that was set back, or from a machine whose clock runs ahead; left alone
    they would stall their sessions for as long as the clock jumped.
    """
    held = Q(held_until__gte=F("due_at")) & (
        Q(held_by=HoldReason.RATE, held_until__lte=now + guards.MINUTE)
        | Q(held_by=HoldReason.SELF_WAKES, held_until__lte=now + guards.SELF_WAKE_HOLD)
    )
    ahead = Q(due_at__gt=now, due_reason__in=_IMMEDIATE_REASONS) & ~held
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


def lift_holds(limits: Mapping[str, tuple[int | None, int | None]], *, now: datetime) -> int:
    """Free the sessions that a guard holds back which their agent has no more; return how many.

    `limits` are, by agent id, its runs a minute and its wakes by own runs. A limit that is only
    another number counts from the session's next run on.
    """
    free = Q(pk__in=[])
    for agent_id, (per_minute, self_wakes) in limits.items():
        if per_minute is None:
            free |= Q(agent_id=agent_id, held_by=HoldReason.RATE)
        if self_wakes is None:
            free |= Q(agent_id=agent_id, held_by=HoldReason.SELF_WAKES)
    held = Session.objects.filter(free, held_until__gt=now)
    if not held.exists():
        return 0
    with transaction.atomic():
        sessions = list(held.select_for_update().order_by("pk"))
        for session in sessions:
            if session.due_at == session.held_until:
                session.due_at = now
            _lift_hold(session)
            session.save(update_fields=_DUE_FIELDS)
        doorbell.ring([session.pk for session in sessions])
    return len(sessions)


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
        if _is_off_schedule(known.get(key), schedules.get(key), now)
    ]
    if not changed:
        return
    with transaction.atomic():
        sessions = _locked_sessions(changed)
        for key, session in sessions.items():
            _put_on_schedule(session, schedules.get(key), now)
        rows.save_arrivals(sessions.values())
        doorbell.ring([session.pk for session in sessions.values()])


def _is_off_schedule(
    session: Session | None, next_scheduled: datetime | None, now: datetime
) -> bool:
    if next_scheduled is None:
        return session is not None and session.due_reason == DueReason.SCHEDULE
    if session is None:
        return True
    if session.due_at is None:
        return session.lease_token is None
    # Later, or at a time that the schedule does not have any more; one that is past is due.
    is_late = session.due_at > next_scheduled
    is_gone = now < session.due_at < next_scheduled
    return session.due_reason == DueReason.SCHEDULE and (is_late or is_gone)


def _put_on_schedule(session: SessionRow, next_scheduled: datetime | None, now: datetime) -> None:
    if session.due_reason == DueReason.SCHEDULE:
        session.due_at, session.due_reason = None, ""
    if next_scheduled is not None:
        _bring_forward(session, Due(next_scheduled, DueReason.SCHEDULE))
    elif session.queued and session.due_at is None:
        _bring_forward(session, Due(now, DueReason.WAKE))


# --- By hand ------------------------------------------------------------------------------------


def wake_sessions(session_ids: Collection[int], *, now: datetime) -> int:
    """Make sessions due now, even those that back off or are held back; return how many.

    For people: what is due already is not counted, but goes before what nobody asked for.
    """
    with transaction.atomic():
        locked = list(
            Session.objects.filter(pk__in=session_ids)
            .select_for_update()
            .order_by("pk")
            .values_list("pk", flat=True)
        )
        sessions = Session.objects.filter(pk__in=locked)
        sessions.filter(due_at__lte=now).update(due_reason=DueReason.OPERATOR)
        woken = sessions.exclude(due_at__isnull=False, due_at__lte=now).update(
            due_at=now, due_reason=DueReason.OPERATOR, held_until=None, held_by=""
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
            session.save(update_fields=["queued", *_DUE_FIELDS])
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
