"""The queue's own interface: batches in, claims out."""

from __future__ import annotations

from collections.abc import Callable
from datetime import UTC, datetime, timedelta

import pytest
from django.db import DatabaseError, IntegrityError, transaction
from hypothesis import given
from hypothesis import strategies as st
from pytest_django import DjangoAssertNumQueries

from tests.claims import terms
from wake import queue
from wake.errors import LeaseLost, QueueFull
from wake.models import (
    Agent,
    DueReason,
    EventState,
    Heartbeat,
    HeartbeatStatus,
    Session,
    SystemEvent,
)
from wake.queue import BACKOFF_LIMIT, Claim, Due, Entry, Stored, Terms
from wake.session_keys import SessionKey

pytestmark = pytest.mark.django_db

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
LEASE = timedelta(seconds=15)
SESSION = SessionKey("main", "agent:main:x")
MAIN = SessionKey("main", "agent:main:main")


def entry(text: str = "text", session: SessionKey = SESSION, *, at: datetime = NOW,
          source: str = "cli", external: bool = False) -> Entry:  # fmt: skip
    return Entry(session, text, source, external, Due(at, DueReason.WAKE))


def enqueue(*entries: Entry, max_queued: int = 10_000) -> list[Stored | QueueFull]:
    return queue.enqueue(entries, now=NOW, max_queued=max_queued)


def claim(
    now: datetime = NOW, *, limit: int = 10, agents: tuple[str, ...] = ("main",)
) -> list[Claim]:
    return queue.claim(terms(*agents), limit=limit, owner="test", now=now, lease=LEASE)


def outcomes(results: list[Stored | QueueFull]) -> list[str]:
    return [result.outcome if isinstance(result, Stored) else "full" for result in results]


def test_a_batch_is_stored_in_one_transaction_with_receipts_in_order(
    django_assert_max_num_queries: DjangoAssertNumQueries,
) -> None:
    entries = [entry(f"text {n}", SessionKey("main", f"agent:main:{n % 7}")) for n in range(100)]
    with django_assert_max_num_queries(12):
        results = enqueue(*entries)
    stored = {event.uid: event for event in SystemEvent.objects.select_related("session")}
    assert len(stored) == 100
    for asked, result in zip(entries, results, strict=True):
        assert isinstance(result, Stored)
        assert stored[result.event_id].text == asked.text
        assert stored[result.event_id].session.key == asked.session.key


def test_an_empty_batch_is_nothing() -> None:
    assert enqueue() == []


def test_the_same_event_again_is_coalesced_with_the_newest_queued_one() -> None:
    first, twin, other, again = enqueue(entry("a"), entry("a"), entry("b"), entry("a"))
    assert outcomes([first, twin, other, again]) == ["queued", "coalesced", "queued", "queued"]
    assert isinstance(first, Stored)
    assert twin == Stored("coalesced", first.event_id)
    assert outcomes(enqueue(entry("a"))) == ["coalesced"]


def test_another_source_or_origin_is_another_event() -> None:
    results = enqueue(entry("a"), entry("a", source="ws"), entry("a", source="ws", external=True))
    assert outcomes(results) == ["queued"] * 3


def test_an_event_that_a_running_heartbeat_has_taken_is_not_coalesced_with() -> None:
    enqueue(entry("a"))
    (running,) = claim()
    assert outcomes(enqueue(entry("a"))) == ["queued"]
    queue.settle(running, HeartbeatStatus.DELIVERED, now=NOW)
    (following,) = claim()
    assert [event.text for event in following.events] == ["a"]


def test_a_coalesced_wake_still_asks_for_the_heartbeat() -> None:
    enqueue(entry("a", at=NOW + timedelta(minutes=20)))
    assert claim() == []
    assert outcomes(enqueue(entry("a"))) == ["coalesced"]
    assert len(claim()) == 1


def test_a_full_session_refuses_the_next_event_and_keeps_the_older_ones() -> None:
    other = SessionKey("main", "agent:main:y")
    results = enqueue(*(entry(str(n)) for n in range(3)), entry("o", other), max_queued=2)
    assert outcomes(results) == ["queued", "queued", "full", "queued"]
    full = results[2]
    assert isinstance(full, QueueFull)
    assert str(full).startswith('session "agent:main:x" holds 2 queued events')
    assert outcomes(enqueue(entry("1"), entry("2"), max_queued=2)) == ["coalesced", "full"]
    assert [event.text for event in claim()[0].events] == ["0", "1"]


@pytest.mark.django_db(transaction=True)
def test_a_failing_batch_stores_nothing() -> None:
    with pytest.raises(IntegrityError):
        enqueue(entry("a"), entry("b", SessionKey("nobody", "agent:nobody:x")))
    assert not Session.objects.exists()
    assert not SystemEvent.objects.exists()


def test_one_heartbeat_at_a_time_for_a_session() -> None:
    enqueue(entry("a"))
    (running,) = claim()
    enqueue(entry("b"))
    assert claim(NOW + timedelta(seconds=5)) == []
    queue.settle(running, HeartbeatStatus.DELIVERED, now=NOW)
    assert [event.text for event in claim()[0].events] == ["b"]


def test_the_database_itself_refuses_a_second_running_heartbeat_and_a_stalled_event() -> None:
    enqueue(entry("a"))
    (running,) = claim()
    with pytest.raises(DatabaseError), transaction.atomic():
        Heartbeat.objects.create(
            run_id=running.events[0].event_id,
            session_id=running.session_id,
            reason=DueReason.WAKE,
            started_at=NOW,
        )
    with pytest.raises(DatabaseError), transaction.atomic():
        Session.objects.update(due_at=None, lease_token=None, lease_until=None)


@pytest.mark.parametrize("main_session", [True, False])
def test_a_heartbeat_takes_at_most_200_events_and_the_rest_follows_at_once(
    main_session: bool,
) -> None:
    session = MAIN if main_session else SESSION
    enqueue(*(entry(f"{n}", session) for n in range(450)))
    sizes = []
    while claims := claim():
        sizes.append(len(claims[0].events))
        scheduled = NOW + timedelta(minutes=30) if main_session else None
        queue.settle(claims[0], HeartbeatStatus.DELIVERED, now=NOW, next_scheduled=scheduled)
    assert sizes == [200, 200, 50]


def test_a_heartbeat_takes_at_most_256_kib_of_text() -> None:
    enqueue(*(entry(f"{n}" + "é" * 30_000) for n in range(6)))
    (first,) = claim()
    assert len(first.events) == 4
    assert first.more


def test_a_retry_takes_the_same_events_and_newer_ones_follow_it() -> None:
    enqueue(entry("a"))
    (first,) = claim()
    queue.fail(first, "no", now=NOW, max_attempts=8)
    enqueue(entry("b"))
    later = NOW + timedelta(seconds=10)
    (second,) = claim(later)
    assert (second.attempt, second.reason) == (2, DueReason.RETRY)
    assert [event.text for event in second.events] == ["a"]
    queue.settle(second, HeartbeatStatus.DELIVERED, now=later)
    (third,) = claim(later)
    assert (third.attempt, [event.text for event in third.events]) == (1, ["b"])


def test_a_new_wake_does_not_shorten_a_backoff_but_an_operator_does() -> None:
    enqueue(entry("a"))
    queue.fail(claim()[0], "no", now=NOW, max_attempts=8)
    enqueue(entry("b"))
    assert claim(NOW + timedelta(milliseconds=900)) == []
    queue.wake_sessions([Session.objects.get().pk], now=NOW)
    assert claim()[0].reason == DueReason.OPERATOR


def test_backoff_grows_and_is_bounded() -> None:
    for attempt in range(1, 40):
        full = min(timedelta(seconds=2) * 2 ** (attempt - 1), BACKOFF_LIMIT)
        assert full / 2 <= queue.backoff(attempt) <= full
    assert len({queue.backoff(3) for _ in range(10)}) > 1, "without jitter"


def test_the_agents_own_wish_lengthens_the_backoff_to_an_hour_at_most() -> None:
    enqueue(entry("a"))
    queue.fail(claim()[0], "no", now=NOW, max_attempts=8, retry_after=timedelta(days=2))
    assert Session.objects.get().due_at == NOW + timedelta(hours=1)


def test_after_the_last_attempt_events_are_dead_letters_and_others_go_on() -> None:
    enqueue(entry("poison"))
    for attempt in range(1, 9):
        now = NOW + attempt * BACKOFF_LIMIT
        (taken,) = claim(now)
        enqueue(entry("newer"))
        queue.fail(taken, f"failure {attempt}", now=now, max_attempts=8)
    dead = SystemEvent.objects.get(state=EventState.DEAD)
    assert dead.text == "poison"
    assert dead.heartbeat
    assert dead.heartbeat.error == "failure 8"
    (following,) = claim(now)
    assert (following.attempt, [event.text for event in following.events]) == (1, ["newer"])


def test_a_permanent_failure_makes_dead_letters_at_once() -> None:
    enqueue(entry("a"))
    queue.fail(claim()[0], "410", now=NOW, max_attempts=8, permanent=True)
    assert SystemEvent.objects.get().state == EventState.DEAD
    assert Session.objects.get().queued == 0


def test_dead_letters_come_back_in_their_old_order_or_are_given_up() -> None:
    enqueue(*(entry(text) for text in "abc"))
    queue.fail(claim()[0], "no", now=NOW, max_attempts=1)
    enqueue(entry("d"))
    pks = list(SystemEvent.objects.filter(text__in="ac").values_list("pk", flat=True))
    assert queue.requeue(pks, now=NOW) == 2
    assert queue.requeue(pks, now=NOW) == 0, "they are no dead letters any more"
    assert [event.text for event in claim()[0].events] == ["a", "c", "d"]
    gone = SystemEvent.objects.get(text="b")
    assert queue.discard([gone.pk], now=NOW) == 1
    gone.refresh_from_db()
    assert gone.state == EventState.DISCARDED


def test_events_requeued_while_a_heartbeat_runs_are_not_settled_by_it() -> None:
    enqueue(entry("old"))
    queue.fail(claim()[0], "no", now=NOW, max_attempts=1)
    enqueue(entry("new"))
    (running,) = claim()
    queue.requeue([SystemEvent.objects.get(text="old").pk], now=NOW)
    queue.settle(running, HeartbeatStatus.DELIVERED, now=NOW)
    assert [event.text for event in claim()[0].events] == ["old"]


def test_a_lost_lease_is_taken_over_with_the_same_events_and_the_late_answer_refused() -> None:
    enqueue(entry("a"))
    (frozen,) = claim()
    later = NOW + LEASE + timedelta(seconds=1)
    assert queue.reap(now=NOW + LEASE, lease=LEASE, max_attempts={"main": 8}) == 0
    assert queue.reap(now=later, lease=LEASE, max_attempts={"main": 8}) == 1
    (second,) = claim(later)
    assert second.events == frozen.events
    assert (second.attempt, second.reason) == (2, DueReason.RECOVERY)
    with pytest.raises(LeaseLost):
        queue.settle(frozen, HeartbeatStatus.DELIVERED, now=later)
    assert SystemEvent.objects.get().state == EventState.QUEUED
    assert Heartbeat.objects.get(run_id=frozen.run_id).status == HeartbeatStatus.LOST


@pytest.mark.parametrize(
    "answer",
    [
        lambda late: queue.settle(late, HeartbeatStatus.DELIVERED, now=NOW),
        lambda late: queue.fail(late, "late", now=NOW, max_attempts=1),
        lambda late: queue.release(late, now=NOW),
        lambda late: queue.lose(late, "late", now=NOW, max_attempts=1),
    ],
    ids=["settle", "fail", "release", "lose"],
)
def test_a_late_answer_leaves_the_transaction_around_it_whole(
    answer: Callable[[Claim], None],
) -> None:
    enqueue(entry("a"))
    (late,) = claim()
    queue.reap(now=NOW + LEASE + timedelta(seconds=1), lease=LEASE, max_attempts={"main": 8})
    with transaction.atomic():
        with pytest.raises(LeaseLost):
            answer(late)
        enqueue(entry("b"))
    texts = SystemEvent.objects.order_by("pk").values_list("text", "state")
    assert list(texts) == [("a", EventState.QUEUED), ("b", EventState.QUEUED)]


def test_what_kills_its_process_every_time_becomes_a_dead_letter() -> None:
    enqueue(entry("poison"))
    now = NOW
    for _ in range(3):
        assert len(claim(now)) == 1
        now += timedelta(minutes=1)
        queue.reap(now=now, lease=LEASE, max_attempts={"main": 3})
    assert SystemEvent.objects.get().state == EventState.DEAD


def test_a_clock_that_was_set_back_stalls_nothing() -> None:
    enqueue(entry("due now"))
    earlier = NOW - timedelta(hours=1)
    assert claim(earlier) == []
    assert queue.correct_due_times(now=earlier) == 1
    (taken,) = claim(earlier)
    # Its process dies, and the clock is set back once more: the lease must not last for hours.
    long_ago = earlier - timedelta(hours=1)
    queue.reap(now=long_ago, lease=LEASE, max_attempts={"main": 8})
    assert queue.reap(now=long_ago + 2 * LEASE, lease=LEASE, max_attempts={"main": 8}) == 1
    assert taken.run_id


@pytest.mark.parametrize("limit", [1, 2])
def test_agents_take_turns(limit: int) -> None:
    Agent.objects.create(id="ops")
    enqueue(
        *(entry("a", SessionKey("main", f"agent:main:{n}"), at=NOW - LEASE) for n in range(9)),
        entry("b", SessionKey("ops", "agent:ops:x")),
    )
    running = {"main": 0, "ops": 0}
    order: list[str] = []
    while len(order) < 4:
        now_running = {agent: Terms(count, 99) for agent, count in running.items()}
        for taken in queue.claim(now_running, limit=limit, owner="test", now=NOW, lease=LEASE):
            order.append(taken.session.agent_id)
            running[taken.session.agent_id] += 1
    assert order.index("ops") == 1, "the longer backlog must not come first again and again"


def test_no_agent_takes_more_places_than_it_may() -> None:
    enqueue(*(entry("a", SessionKey("main", f"agent:main:{n}")) for n in range(9)))
    taken = queue.claim(terms("main", running=2, most=5), limit=9, owner="t", now=NOW, lease=LEASE)
    assert len(taken) == 3


@given(
    st.dictionaries(st.sampled_from("abcde"), st.integers(0, 50)),
    st.dictionaries(st.sampled_from("abcde"), st.integers(0, 6)),
    st.integers(0, 20),
    st.integers(1, 6),
)
def test_places_go_to_those_with_the_fewest_runs(
    waits: dict[str, int], running: dict[str, int], limit: int, most_each: int
) -> None:
    first_due = {agent: NOW - timedelta(seconds=wait) for agent, wait in waits.items()}
    most = dict.fromkeys("abcde", most_each)
    places = queue.allot(first_due, running, limit=limit, most=most)
    assert sum(places.values()) <= limit
    after = {agent: running.get(agent, 0) + places.get(agent, 0) for agent in waits}
    for agent in places:
        assert after[agent] <= most_each
        # Nobody else waits with so few runs that this agent's last place was theirs.
        assert all(after[other] >= min(after[agent] - 1, most_each) for other in waits)
    if sum(places.values()) < limit:
        assert all(count >= most_each for count in after.values())


def test_a_fan_out_reaches_more_agents_than_a_statement_has_room_for() -> None:
    Agent.objects.bulk_create([Agent(id=f"a{n}") for n in range(1200)])
    nudged = tuple(SessionKey(f"a{n}", f"agent:a{n}:main") for n in range(1200))
    fan_out = Entry(MAIN, "all", "cli", False, Due(NOW, DueReason.WAKE), nudged)
    assert outcomes(enqueue(fan_out)) == ["queued"]
    assert Session.objects.filter(due_at=NOW).count() == 1201


def test_what_a_heartbeat_without_events_failed_at_is_not_held_against_events() -> None:
    queue.keep_schedules({MAIN: NOW}, now=NOW - timedelta(hours=1))
    now = NOW
    for _ in range(7):
        (idle,) = claim(now)
        queue.fail(idle, "no", now=now, max_attempts=8)
        now += timedelta(minutes=11)
    # One more is running when the event comes, and fails: the event is not to wait for it.
    queue.enqueue([entry("news", MAIN, at=now)], now=now, max_queued=9)
    (first,) = claim(now)
    assert (first.attempt, [event.text for event in first.events]) == (1, ["news"])
    queue.fail(first, "no", now=now, max_attempts=8)
    assert SystemEvent.objects.get().state == EventState.QUEUED


def test_an_event_does_not_wait_for_the_backoff_of_a_heartbeat_without_events() -> None:
    queue.keep_schedules({MAIN: NOW}, now=NOW - timedelta(hours=1))
    queue.fail(claim()[0], "no", now=NOW, max_attempts=8)
    assert claim() == []
    enqueue(entry("news", MAIN))
    assert [event.text for event in claim()[0].events] == ["news"]


def test_an_event_that_came_during_a_lost_heartbeat_without_events_has_all_its_attempts() -> None:
    queue.keep_schedules({MAIN: NOW}, now=NOW - timedelta(hours=1))
    assert claim()[0].events == ()
    enqueue(entry("news", MAIN))
    later = NOW + 2 * LEASE
    queue.reap(now=later, lease=LEASE, max_attempts={"main": 8})
    (following,) = claim(later)
    assert (following.attempt, [event.text for event in following.events]) == (1, ["news"])


def test_an_event_that_came_during_a_failing_heartbeat_without_events_follows_at_once() -> None:
    queue.keep_schedules({MAIN: NOW}, now=NOW - timedelta(hours=1))
    (idle,) = claim()
    enqueue(entry("news", MAIN))
    queue.fail(idle, "no", now=NOW, max_attempts=8)
    (following,) = claim()
    assert (following.attempt, [event.text for event in following.events]) == (1, ["news"])


def test_events_of_a_session_that_is_no_main_session_any_more_are_due() -> None:
    later = NOW + timedelta(days=90)
    waiting = Entry(MAIN, "waits", "cli", False, Due(later, DueReason.SCHEDULE))
    queue.enqueue([waiting], now=NOW, max_queued=9)
    idle = SessionKey("main", "agent:main:older")
    queue.keep_schedules({MAIN: later, idle: later}, now=NOW)
    home = SessionKey("main", "agent:main:home")
    queue.keep_schedules({home: later}, now=NOW)
    dues = dict(Session.objects.values_list("key", "due_at"))
    assert dues == {MAIN.key: NOW, idle.key: None, home.key: later}


def test_retries_are_turned_back_with_the_clock() -> None:
    enqueue(entry("a"))
    queue.fail(claim()[0], "no", now=NOW, max_attempts=8)
    due_at = Session.objects.get().due_at
    assert due_at
    earlier = NOW - timedelta(minutes=55)
    assert queue.turn_back_retries(timedelta(minutes=55), now=earlier) == 1
    assert Session.objects.get().due_at == due_at - timedelta(minutes=55)


def test_only_the_asked_agents_are_claimed() -> None:
    Agent.objects.create(id="ops")
    enqueue(entry("a"), entry("b", SessionKey("ops", "agent:ops:x")))
    assert [taken.session.agent_id for taken in claim(agents=("ops",))] == ["ops"]


def test_turning_the_schedule_off_makes_waiting_events_due() -> None:
    queue.keep_schedules({MAIN: NOW + timedelta(minutes=30)}, now=NOW)
    assert claim() == []
    queue.enqueue(
        [Entry(MAIN, "waits", "cli", False, Due(NOW + timedelta(minutes=30), DueReason.SCHEDULE))],
        now=NOW,
        max_queued=10,
    )
    assert claim() == []
    queue.keep_schedules({MAIN: None}, now=NOW)
    assert [event.text for event in claim()[0].events] == ["waits"]


def test_the_next_heartbeat_follows_a_changed_schedule() -> None:
    for minutes in (30, 5, 10):
        queue.keep_schedules({MAIN: NOW + timedelta(minutes=minutes)}, now=NOW)
        assert Session.objects.get().due_at == NOW + timedelta(minutes=minutes)
    queue.keep_schedules({MAIN: None}, now=NOW)
    assert Session.objects.get().due_at is None


def test_a_due_time_that_the_schedule_has_no_more_is_given_up() -> None:
    """The agent's active hours were changed: what was due at 22:10 is due in the morning."""
    queue.keep_schedules({MAIN: NOW + timedelta(minutes=10)}, now=NOW)
    queue.keep_schedules({MAIN: NOW + timedelta(hours=10)}, now=NOW)
    assert Session.objects.get().due_at == NOW + timedelta(hours=10)
    # One that has come, and waits for a place, stays due.
    queue.keep_schedules({MAIN: NOW + timedelta(hours=20)}, now=NOW + timedelta(hours=11))
    assert Session.objects.get().due_at == NOW + timedelta(hours=10)
