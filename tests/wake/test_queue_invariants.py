"""The queue under any order of what can happen to it, on the database that the tests run on.

A machine enqueues events and turns, claims, settles, fails, crashes, reaps, pauses, requeues and
discards, with a clock of its own. After every step the stored data must keep the queue's promises;
at the end everything is drained, and every acknowledged event must have been delivered or be on
record.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID

import pytest
from django.db.models import Count, F, Q
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule, run_state_machine_as_test

from tests.claims import terms
from wake import queue
from wake.errors import LeaseLost, QueueFull
from wake.models import (
    Agent,
    AgentTurn,
    DueReason,
    EventState,
    GatewaySettings,
    Heartbeat,
    HeartbeatStatus,
    Session,
    SystemEvent,
)
from wake.queue import Claim, Due, Entry, Stored, Turn
from wake.session_keys import SessionKey

LEASE = timedelta(seconds=15)
MAX_ATTEMPTS = 3
MAX_QUEUED = 6
SESSIONS = [
    SessionKey("main", "agent:main:main"),
    SessionKey("main", "agent:main:a"),
    SessionKey("ops", "agent:ops:main"),
    SessionKey("ops", "agent:ops:b"),
]
AGENTS = {"main", "ops"}
# One agent has every limit, the other none.
MOST_A_MINUTE = 3
MOST_SELF_WAKES = 2
TERMS = {
    "main": queue.Terms(0, 99),
    "ops": queue.Terms(0, 99, max_parallel_runs=1, max_runs_per_minute=MOST_A_MINUTE),
}


class QueueMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        for model in (SystemEvent, Heartbeat, Session, GatewaySettings, Agent):
            model.objects.all().delete()
        Agent.objects.bulk_create([Agent(id=agent) for agent in AGENTS])
        self.now = datetime(2026, 11, 22, 12, tzinfo=UTC)
        self.paused: set[str] = set()
        self.open: list[Claim] = []
        self.lost: list[Claim] = []
        self.acknowledged: dict[SessionKey, list[UUID]] = defaultdict(list)
        self.delivered: dict[SessionKey, list[UUID]] = defaultdict(list)
        self.touched_by_hand: set[UUID] = set()
        self.run_ids: set[UUID] = set()

    # --- What can happen ------------------------------------------------------------------------

    @rule(
        batch=st.lists(
            st.tuples(
                st.sampled_from(SESSIONS),
                st.sampled_from(["x", "y", "z"]),
                st.booleans(),
                st.sampled_from([0, 0, 0, 1800]),
                st.booleans(),
            ),
            min_size=1,
            max_size=5,
        )
    )
    def enqueue(self, batch: list[tuple[SessionKey, str, bool, int, bool]]) -> None:
        entries = [
            Entry(
                session,
                text,
                "cli",
                external,
                Due(
                    self.now + timedelta(seconds=wait),
                    DueReason.SCHEDULE if wait else DueReason.WAKE,
                ),
                tuple(SESSIONS) if nudge else (),
            )
            for session, text, external, wait, nudge in batch
        ]
        in_flight = {event.event_id for claim in self.open for event in claim.events}
        results = queue.enqueue(entries, now=self.now, max_queued=MAX_QUEUED)
        assert len(results) == len(entries)
        for entry, result in zip(entries, results, strict=True):
            if isinstance(result, QueueFull):
                assert Session.objects.get(key=entry.session.key).queued >= MAX_QUEUED
            elif result.outcome == "queued":
                self.acknowledged[entry.session].append(result.event_id)
            else:
                self.check_coalesced(entry, result, in_flight)

    @rule(session=st.sampled_from(SESSIONS), text=st.sampled_from(["x", "y"]), nudge=st.booleans())
    def enqueue_a_turn(self, session: SessionKey, text: str, nudge: bool) -> None:
        """A turn of its own; its text may be that of an event that waits, or of another turn."""
        entry = Entry(
            session,
            text,
            "cli",
            False,
            Due(self.now, DueReason.WAKE),
            tuple(SESSIONS) if nudge else (),
            Turn("a turn"),
            "now",
        )
        (result,) = queue.enqueue([entry], now=self.now, max_queued=MAX_QUEUED)
        if isinstance(result, QueueFull):
            assert Session.objects.get(key=session.key).queued >= MAX_QUEUED
        else:
            assert result.outcome == "queued"
            self.acknowledged[session].append(result.event_id)

    def check_coalesced(self, entry: Entry, result: Stored, in_flight: set[UUID]) -> None:
        twin = SystemEvent.objects.get(uid=result.event_id)
        assert (twin.text, twin.external, twin.state) == (entry.text, entry.external, "queued")
        assert twin.session.key == entry.session.key
        assert not twin.alone
        assert twin.uid not in in_flight, "the agent may have seen it already: this one is new"

    @rule(data=st.data(), text=st.sampled_from(["x", "own"]))
    def a_run_wakes_its_own_session(self, data: st.DataObject, text: str) -> None:
        if not self.open:
            return
        claim = data.draw(st.sampled_from(self.open))
        limit = MOST_SELF_WAKES if claim.session.agent_id == "ops" else None
        entry = Entry(
            claim.session,
            text,
            "cli",
            False,
            Due(self.now, DueReason.WAKE),
            run_id=claim.run_id,
            self_wake_limit=limit,
        )
        in_flight = {event.event_id for claim in self.open for event in claim.events}
        (result,) = queue.enqueue([entry], now=self.now, max_queued=MAX_QUEUED)
        if isinstance(result, QueueFull):
            return
        if result.outcome == "queued":
            self.acknowledged[claim.session].append(result.event_id)
            assert SystemEvent.objects.get(uid=result.event_id).own
        else:
            self.check_coalesced(entry, result, in_flight)

    def check_limits(self, claims: list[Claim]) -> None:
        """What a guard of `ops` promises; a person's wake goes past it."""
        leased = Session.objects.filter(agent_id="ops", lease_token__isnull=False).count()
        if any(claim.session.agent_id == "ops" for claim in claims):
            assert leased <= 1
        for claim in claims:
            if claim.session.agent_id != "ops":
                continue
            started = Heartbeat.objects.filter(
                session=claim.session_id,
                started_at__gt=self.now - timedelta(minutes=1),
                started_at__lte=self.now,
            ).exclude(reason=DueReason.OPERATOR)
            if claim.reason != DueReason.OPERATOR:
                assert started.count() <= MOST_A_MINUTE

    @rule(limit=st.integers(1, 4))
    def claim(self, limit: int) -> None:
        claims = queue.claim(
            {agent: TERMS[agent] for agent in AGENTS - self.paused},
            limit=limit,
            owner="test",
            now=self.now,
            lease=LEASE,
        )
        assert len(claims) <= limit
        self.check_limits(claims)
        for claim in claims:
            assert claim.session.agent_id not in self.paused
            assert claim.session not in {other.session for other in self.open}
            self.check_alone(claim)
        self.open += claims

    def check_alone(self, claim: Claim) -> None:
        """A turn comes alone, and its first run has its id; no other heartbeat has a turn in it."""
        uids = [event.event_id for event in claim.events]
        turns = set(
            SystemEvent.objects.filter(uid__in=uids, alone=True).values_list("uid", flat=True)
        )
        if claim.turn is None:
            assert not turns
            return
        assert turns == set(uids)
        assert len(uids) == 1
        assert claim.run_id == uids[0] or uids[0] in self.run_ids
        self.run_ids.add(claim.run_id)

    @rule(data=st.data(), quiet=st.booleans())
    def settle(self, data: st.DataObject, quiet: bool) -> None:
        if claim := self.take_open(data):
            status = HeartbeatStatus.QUIET if quiet else HeartbeatStatus.DELIVERED
            queue.settle(claim, status, now=self.now, next_scheduled=self.next_scheduled(claim))
            self.delivered[claim.session] += [event.event_id for event in claim.events]

    @rule(
        data=st.data(),
        permanent=st.booleans(),
        wait=st.none() | st.integers(0, 7200),
        handed_over=st.integers(0, 3),
        is_about_one=st.booleans(),
    )
    def fail(
        self,
        data: st.DataObject,
        permanent: bool,
        wait: int | None,
        handed_over: int,
        is_about_one: bool,
    ) -> None:
        if claim := self.take_open(data):
            handed_over = min(handed_over, max(0, len(claim.events) - 1))
            self.delivered[claim.session] += [
                event.event_id for event in claim.events[:handed_over]
            ]
            queue.fail(
                claim,
                "no",
                now=self.now,
                max_attempts=MAX_ATTEMPTS,
                permanent=permanent,
                handed_over=handed_over,
                is_about_one=is_about_one,
                retry_after=None if wait is None else timedelta(seconds=wait),
                next_scheduled=self.next_scheduled(claim),
            )

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        if claim := self.take_open(data):
            taken = data.draw(st.integers(0, len(claim.events)))
            queue.release(claim, now=self.now, handed_over=taken)
            self.delivered[claim.session] += [event.event_id for event in claim.events[:taken]]

    @rule(data=st.data())
    def lose(self, data: st.DataObject) -> None:
        """Who had the run says that it is gone: nothing waits for the lease."""
        if claim := self.take_open(data):
            queue.lose(claim, "gone", now=self.now, max_attempts=MAX_ATTEMPTS)
            session = Session.objects.get(pk=claim.session_id)
            assert session.lease_token is None

    @rule(lifted=st.booleans())
    def limits_are_lifted(self, lifted: bool) -> None:
        if lifted:
            queue.lift_holds({"ops": (None, None)}, now=self.now)
            held = Session.objects.filter(held_until__gt=self.now, agent_id="ops")
            assert not held.exists()

    @rule(data=st.data())
    def crash(self, data: st.DataObject) -> None:
        """The process dies: nobody renews the lease any more."""
        if claim := self.take_open(data):
            self.lost.append(claim)

    @rule(data=st.data())
    def late_answer(self, data: st.DataObject) -> None:
        """The process was only frozen, and answers after its lease was taken."""
        if not self.lost:
            return
        claim = data.draw(st.sampled_from(self.lost))
        still_held = Session.objects.filter(lease_token=claim.run_id).exists()
        if still_held:
            return
        before = list(SystemEvent.objects.order_by("pk").values())
        answers: list[Callable[[], None]] = [
            lambda: queue.settle(claim, HeartbeatStatus.DELIVERED, now=self.now),
            lambda: queue.fail(claim, "late", now=self.now, max_attempts=1),
            lambda: queue.release(claim, now=self.now),
            lambda: queue.lose(claim, "late", now=self.now, max_attempts=1),
        ]
        for answer in answers:
            with pytest.raises(LeaseLost):
                answer()
        assert list(SystemEvent.objects.order_by("pk").values()) == before

    @rule(seconds=st.integers(0, 40))
    def time_passes(self, seconds: int) -> None:
        self.now += timedelta(seconds=seconds)
        self.renew()

    @rule(seconds=st.integers(1, 5000))
    def clock_is_set_back(self, seconds: int) -> None:
        self.now -= timedelta(seconds=seconds)
        self.renew()
        queue.turn_back_retries(timedelta(seconds=seconds), now=self.now)
        queue.correct_due_times(now=self.now)

    @rule()
    def reap(self) -> None:
        queue.reap(now=self.now, lease=LEASE, max_attempts=dict.fromkeys(AGENTS, MAX_ATTEMPTS))

    @rule(agent=st.sampled_from(sorted(AGENTS)))
    def pause_or_resume(self, agent: str) -> None:
        self.paused ^= {agent}

    @rule(session=st.sampled_from(SESSIONS), scheduled=st.booleans())
    def schedule_changes(self, session: SessionKey, scheduled: bool) -> None:
        at = self.now + timedelta(minutes=20) if scheduled else None
        queue.keep_schedules({session: at}, now=self.now)

    @rule(data=st.data(), requeue=st.booleans())
    def operator_acts_on_dead_letters(self, data: st.DataObject, requeue: bool) -> None:
        dead = list(SystemEvent.objects.filter(state=EventState.DEAD).order_by("pk"))
        if not dead:
            return
        chosen = data.draw(st.lists(st.sampled_from(dead), unique_by=lambda event: event.pk))
        act = queue.requeue if requeue else queue.discard
        assert act([event.pk for event in chosen], now=self.now) == len(chosen)
        self.touched_by_hand |= {event.uid for event in chosen}

    @rule(session=st.sampled_from(SESSIONS))
    def operator_wakes(self, session: SessionKey) -> None:
        pks = list(Session.objects.filter(key=session.key).values_list("pk", flat=True))
        queue.wake_sessions(pks, now=self.now)
        assert not Session.objects.filter(
            Q(due_at__isnull=True) | Q(due_at__gt=self.now), pk__in=pks
        ).exists()

    # --- What must hold -------------------------------------------------------------------------

    @invariant()
    def no_queued_event_without_a_due_heartbeat(self) -> None:
        stalled = SystemEvent.objects.filter(
            state=EventState.QUEUED, session__due_at=None, session__lease_token=None
        )
        assert not stalled.exists()

    @invariant()
    def the_count_of_queued_events_is_right(self) -> None:
        counted = Session.objects.annotate(
            counted=Count("events", filter=Q(events__state=EventState.QUEUED))
        )
        assert not counted.exclude(counted=F("queued")).exists()

    @invariant()
    def a_known_digest_is_that_of_the_newest_event_and_it_is_queued(self) -> None:
        for session in Session.objects.exclude(newest_digest=""):
            newest = session.events.order_by("-pk")[0]
            again = Entry(
                SessionKey(session.agent_id, session.key),
                newest.text,
                newest.source,
                newest.external,
                Due(self.now, DueReason.WAKE),
                turn=Turn("") if newest.alone else None,
            )
            assert newest.state == EventState.QUEUED
            assert session.newest_digest == queue._digest(again, newest.own)

    @invariant()
    def every_acknowledged_event_is_on_record(self) -> None:
        stored = set(SystemEvent.objects.values_list("uid", flat=True))
        assert stored == {uid for uids in self.acknowledged.values() for uid in uids}

    @invariant()
    def every_event_that_is_alone_is_a_turn_and_no_other(self) -> None:
        alone = SystemEvent.objects.filter(alone=True).values_list("pk", flat=True)
        assert set(alone) == set(AgentTurn.objects.values_list("pk", flat=True))

    @invariant()
    def a_running_heartbeat_holds_its_sessions_lease(self) -> None:
        running = set(
            Heartbeat.objects.filter(status=HeartbeatStatus.RUNNING).values_list(
                "run_id", flat=True
            )
        )
        leased = set(
            Session.objects.filter(lease_token__isnull=False).values_list("lease_token", flat=True)
        )
        assert running == leased
        assert {claim.run_id for claim in self.open} <= leased

    @invariant()
    def events_are_delivered_in_their_order(self) -> None:
        for session, uids in self.delivered.items():
            ours = [uid for uid in uids if uid not in self.touched_by_hand]
            order = self.acknowledged[session]
            assert ours == sorted(ours, key=order.index)
            assert len(set(ours)) == len(ours), "settled twice"

    def teardown(self) -> None:
        """Everything that is queued is delivered once agents run and processes live."""
        self.lost += self.open
        self.open = []
        for _ in range(60):
            self.now += timedelta(minutes=61)
            self.reap()
            for claim in queue.claim(
                terms(*AGENTS),
                limit=10,
                owner="end",
                now=self.now,
                lease=LEASE,
            ):
                queue.settle(claim, HeartbeatStatus.DELIVERED, now=self.now)
                self.delivered[claim.session] += [event.event_id for event in claim.events]
            if not SystemEvent.objects.filter(state=EventState.QUEUED).exists():
                break
        else:
            raise AssertionError("some events are never delivered")
        self.events_are_delivered_in_their_order()
        delivered = {uid for uids in self.delivered.values() for uid in uids}
        others = SystemEvent.objects.exclude(uid__in=delivered)
        assert {event.state for event in others} <= {EventState.DEAD, EventState.DISCARDED}

    # --- Helpers --------------------------------------------------------------------------------

    def take_open(self, data: st.DataObject) -> Claim | None:
        if not self.open:
            return None
        return self.open.pop(data.draw(st.integers(0, len(self.open) - 1)))

    def renew(self) -> None:
        """Living processes renew their leases; they do so far more often than leases run out."""
        run_ids = {claim.run_id for claim in self.open}
        assert queue.renew(self.open, now=self.now, lease=LEASE) == run_ids

    def next_scheduled(self, claim: Claim) -> datetime | None:
        if claim.session.key.endswith(":main"):
            return self.now + timedelta(minutes=30)
        return None


@pytest.mark.django_db
def test_the_queue_keeps_its_promises() -> None:
    options: dict[str, Any] = {"deadline": None, "suppress_health_check": list(HealthCheck)}
    run_state_machine_as_test(
        QueueMachine, settings=settings(max_examples=40, stateful_step_count=30, **options)
    )
