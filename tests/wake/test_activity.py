"""What the last hour was like: counted from rows that the queue itself has written."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from itertools import accumulate
from typing import Any
from uuid import uuid4
from zoneinfo import ZoneInfo

import pytest
from pytest_django import DjangoAssertNumQueries

from tests.claims import terms
from wake import activity, queue
from wake.activity import (
    COMMITTED_WITHIN,
    EVENTS_TIMED,
    MOST_MINUTES,
    RUNS_TIMED,
    Minute,
    last_minutes,
    percentile,
    walk_back,
)
from wake.models import (
    Agent,
    DueReason,
    EventState,
    Heartbeat,
    HeartbeatStatus,
    Session,
    SystemEvent,
)
from wake.session_keys import SessionKey

pytestmark = pytest.mark.django_db

NOON = datetime(2026, 11, 22, 12, 0, 30, tzinfo=UTC)
# Its window lies in two days.
MIDNIGHT = datetime(2026, 11, 22, 0, 2, 30, tzinfo=UTC)
SESSION = SessionKey("main", "agent:main:x")
LEASE = timedelta(seconds=15)


@pytest.fixture(autouse=True)
def _nothing_held() -> Iterator[None]:
    activity.forget()
    yield
    activity.forget()


def seconds(count: float) -> timedelta:
    return timedelta(seconds=count)


def store(count: int, at: datetime) -> None:
    queue.enqueue(
        [
            queue.Entry(SESSION, str(uuid4()), "cli", False, queue.Due(at, DueReason.WAKE))
            for _ in range(count)
        ],
        now=at,
        max_queued=100_000,
    )


def claim(at: datetime) -> queue.Claim:
    (taken,) = queue.claim(terms("main"), limit=1, owner="test", now=at, lease=timedelta(hours=2))
    return taken


def deliver(start: datetime, end: datetime, *, quiet: bool = False) -> None:
    status = HeartbeatStatus.QUIET if quiet else HeartbeatStatus.DELIVERED
    queue.settle(claim(start), status, now=end)


def fail(start: datetime, end: datetime, *, attempts: int) -> None:
    queue.fail(claim(start), "refused", now=end, max_attempts=attempts)


def numbers(minutes: list[Minute], name: str) -> list[Any]:
    return [getattr(minute, name) for minute in minutes]


# --- What is counted ------------------------------------------------------------------------------


def test_nothing_happened() -> None:
    minutes = last_minutes(5, NOON)
    start = datetime(2026, 11, 22, 12, tzinfo=UTC)
    assert minutes == [
        Minute(start - timedelta(minutes=back), 0, 0, 0, 0, None, None) for back in (4, 3, 2, 1, 0)
    ]


def test_what_happened_before_is_not_counted_but_may_still_be_queued() -> None:
    store(2, NOON - timedelta(hours=3))
    assert numbers(last_minutes(5, NOON), "queued") == [0, 0, 0, 0, 0]
    assert numbers(last_minutes(5, NOON), "depth") == [2, 2, 2, 2, 2]
    deliver(NOON - timedelta(hours=2), NOON - timedelta(hours=1))
    activity.forget()
    assert numbers(last_minutes(5, NOON), "depth") == [0, 0, 0, 0, 0]
    assert numbers(last_minutes(5, NOON), "delivered") == [0, 0, 0, 0, 0]


@pytest.mark.parametrize("now", [NOON, MIDNIGHT])
def test_each_thing_is_counted_in_its_minute(now: datetime) -> None:
    present = now.replace(second=0)
    store(3, present - seconds(200))
    deliver(present - seconds(190), present - seconds(170))
    store(2, present - seconds(60))
    store(1, present - seconds(0.000_001))
    deliver(present - seconds(1), present + seconds(20), quiet=True)
    store(4, present)
    minutes = last_minutes(5, now)
    assert [minute.start for minute in minutes] == [
        present - timedelta(minutes=back) for back in (4, 3, 2, 1, 0)
    ]
    assert numbers(minutes, "queued") == [3, 0, 0, 3, 4]
    assert numbers(minutes, "delivered") == [0, 3, 0, 0, 3]
    assert numbers(minutes, "depth") == [3, 0, 0, 3, 4]
    assert numbers(minutes, "dead") == [0, 0, 0, 0, 0]
    assert numbers(minutes, "median_ms") == [None, 30_000, None, None, 80_000]
    assert numbers(minutes, "p95_ms") == [None, 30_000, None, None, 80_000]


def test_a_time_zone_of_the_clock_does_not_matter() -> None:
    store(1, NOON)
    deliver(NOON, NOON)
    kathmandu = NOON.astimezone(ZoneInfo("Asia/Kathmandu"))
    minute = last_minutes(5, kathmandu)[-1]
    assert (minute.start, minute.delivered) == (NOON.replace(second=0), 1)


def test_a_long_turn_is_counted_where_it_ends() -> None:
    store(1, NOON - timedelta(minutes=12))
    deliver(NOON - timedelta(minutes=11), NOON - timedelta(minutes=2))
    minutes = last_minutes(5, NOON)
    assert numbers(minutes, "delivered") == [0, 0, 1, 0, 0]
    assert numbers(minutes, "depth") == [1, 1, 0, 0, 0]
    assert minutes[2].median_ms == 10 * 60_000


def test_dead_letters_leave_the_queue_when_the_last_attempt_failed() -> None:
    store(2, NOON - seconds(250))
    fail(NOON - seconds(240), NOON - seconds(230), attempts=2)
    fail(NOON - seconds(100), NOON - seconds(90), attempts=2)
    minutes = last_minutes(5, NOON)
    assert numbers(minutes, "dead") == [0, 0, 0, 2, 0]
    assert numbers(minutes, "delivered") == [0, 0, 0, 0, 0]
    assert numbers(minutes, "depth") == [2, 2, 2, 0, 0]
    assert numbers(minutes, "median_ms") == [None] * 5


def test_a_lost_heartbeat_makes_dead_letters_too() -> None:
    store(1, NOON - seconds(60))
    queue.claim(terms("main"), limit=1, owner="dead", now=NOON - seconds(50), lease=LEASE)
    queue.reap(now=NOON - seconds(31), lease=LEASE, max_attempts={"main": 1})
    assert numbers(last_minutes(5, NOON), "dead") == [0, 0, 0, 1, 0]


def test_a_discarded_dead_letter_has_died_and_a_requeued_one_has_not() -> None:
    store(2, NOON - seconds(100))
    fail(NOON - seconds(99), NOON - seconds(90), attempts=1)
    discarded, requeued = SystemEvent.objects.order_by("pk").values_list("pk", flat=True)
    queue.discard([discarded], now=NOON - seconds(10))
    queue.requeue([requeued], now=NOON)
    minutes = last_minutes(5, NOON)
    assert numbers(minutes, "queued") == [0, 0, 2, 0, 0]
    assert numbers(minutes, "dead") == [0, 0, 0, 1, 0]
    assert numbers(minutes, "depth") == [0, 0, 2, 1, 1]


def test_a_released_heartbeat_delivers_nothing() -> None:
    store(1, NOON - seconds(100))
    queue.release(claim(NOON - seconds(99)), now=NOON - seconds(90))
    minutes = last_minutes(5, NOON)
    assert numbers(minutes, "delivered") == [0, 0, 0, 0, 0]
    assert minutes[-1].depth == 1


def test_an_event_from_a_clock_that_runs_ahead_is_of_the_present() -> None:
    store(1, NOON + timedelta(minutes=2))
    assert numbers(last_minutes(5, NOON), "queued") == [0, 0, 0, 0, 1]


# --- Minutes that are over ------------------------------------------------------------------------


def test_minutes_that_are_over_are_counted_once(
    django_assert_max_num_queries: DjangoAssertNumQueries,
) -> None:
    store(2, NOON - timedelta(minutes=3))
    deliver(NOON - timedelta(minutes=3), NOON - timedelta(minutes=2))
    before = last_minutes(60, NOON)
    # Whatever becomes of their rows; those of the present minute are counted each time.
    SystemEvent.objects.all().delete()
    store(1, NOON)
    with django_assert_max_num_queries(20):
        after = last_minutes(60, NOON)
    assert after[:-1] == before[:-1]
    assert (after[-1].queued, after[-1].depth) == (1, 1)
    activity.forget()
    assert sum(numbers(last_minutes(60, NOON), "queued")) == 1


def test_a_longer_time_than_before_is_counted_to_its_beginning() -> None:
    store(2, NOON - timedelta(minutes=20))
    assert sum(numbers(last_minutes(5, NOON), "queued")) == 0
    assert numbers(last_minutes(21, NOON), "queued") == [2, *[0] * 20]


def test_the_next_minute_is_counted_when_it_comes() -> None:
    store(1, NOON)
    last_minutes(5, NOON)
    later = NOON + timedelta(minutes=1)
    store(2, later)
    minutes = last_minutes(5, later)
    assert numbers(minutes, "queued") == [0, 0, 0, 1, 2]
    assert numbers(minutes, "depth") == [0, 0, 0, 1, 3]


def test_a_minute_is_not_over_before_its_last_commit() -> None:
    end = NOON.replace(second=0)
    store(1, end - seconds(1))
    assert numbers(last_minutes(5, end), "queued") == [0, 0, 0, 1, 0]
    # Begun in that minute, committed in the next.
    store(1, end - seconds(1))
    almost = end + COMMITTED_WITHIN - seconds(1)
    assert numbers(last_minutes(5, almost), "queued") == [0, 0, 0, 2, 0]


def test_old_minutes_are_forgotten() -> None:
    last_minutes(MOST_MINUTES, NOON)
    last_minutes(MOST_MINUTES, NOON + timedelta(hours=1))
    assert len(activity._held) < MOST_MINUTES


def test_a_clock_that_was_set_back_finds_its_present_minute() -> None:
    last_minutes(5, NOON + timedelta(minutes=2))
    store(1, NOON)
    assert numbers(last_minutes(5, NOON), "queued") == [0, 0, 0, 0, 1]


# --- Many events ----------------------------------------------------------------------------------


def _history(rng: random.Random, *, events: int, burst: float, gaps: bool) -> None:
    """Store events of the last hours and the heartbeats that settled them, in the order of time."""
    Agent.objects.get_or_create(pk="main")
    session = Session.objects.create(agent_id="main", key="agent:main:many", queued=0)
    begin = NOON - timedelta(minutes=90)
    times = sorted(
        NOON - seconds(600 + rng.random())
        if rng.random() < burst
        else begin + seconds(rng.random() * 90 * 60)
        for _ in range(events)
    )
    # Two transactions may overlap, so that ids are not quite in the order of time.
    for place in range(0, events - 1, 50):
        if times[place].minute == times[place + 1].minute:
            times[place : place + 2] = reversed(times[place : place + 2])
    rows: list[SystemEvent] = []
    runs: list[Heartbeat] = []
    place = 0
    while place < len(times):
        batch = times[place : place + rng.choice([1, 1, 2, 5, 30])]
        place += len(batch)
        start = max(batch) + seconds(rng.random())
        end = start + seconds(rng.choice([0.01, 1, 40, 300]) * rng.random())
        kind, state = rng.choice(
            [(HeartbeatStatus.DELIVERED, EventState.DELIVERED)] * 5
            + [(HeartbeatStatus.QUIET, EventState.DELIVERED)]
            + [(HeartbeatStatus.FAILED, EventState.DEAD)]
            + [(HeartbeatStatus.RUNNING, EventState.QUEUED)]
        )
        is_over = kind != HeartbeatStatus.RUNNING and end <= NOON
        run = Heartbeat(
            run_id=uuid4(),
            session=session,
            reason=DueReason.WAKE,
            status=kind,
            event_count=len(batch),
            started_at=start,
            finished_at=end,
        )
        if is_over:
            runs.append(run)
        rows += [
            SystemEvent(
                uid=uuid4(),
                session=session,
                text="x",
                source="cli",
                created_at=at,
                state=state if is_over else EventState.QUEUED,
                settled_at=end if is_over else None,
                heartbeat=run if is_over else None,
            )
            for at in batch
        ]
    Heartbeat.objects.bulk_create(runs)
    if gaps:
        # Ids of transactions that were rolled back.
        ids = accumulate(rng.choice([1, 1, 1, 2, 40]) for _ in rows)
        for row, pk in zip(rows, ids, strict=True):
            row.pk = pk
    SystemEvent.objects.bulk_create(rows)
    session.queued = sum(row.state == EventState.QUEUED for row in rows)
    session.due_at = NOON
    session.save()


def _recount(now: datetime) -> list[tuple[int, int, int, int, int | None, int | None]]:
    """Count the last hour from every row."""
    end = now.replace(second=0) + timedelta(minutes=1)
    rows = list(SystemEvent.objects.select_related("heartbeat"))
    counted = []
    for back in range(60, 0, -1):
        start = end - timedelta(minutes=back)
        stop = start + timedelta(minutes=1)
        came = sum(start <= row.created_at < stop for row in rows)
        settled = [row for row in rows if row.settled_at and start <= row.settled_at < stop]
        states = Counter(row.state for row in settled)
        times = [
            round((row.settled_at - row.created_at) / timedelta(milliseconds=1))
            for row in settled
            if row.settled_at and row.state == EventState.DELIVERED
        ]
        waiting = [row for row in rows if row.created_at < stop]
        depth = sum(row.settled_at is None or row.settled_at >= stop for row in waiting)
        delivered, dead = states[EventState.DELIVERED], states[EventState.DEAD]
        times_of = (percentile(times, 0.5), percentile(times, 0.95))
        counted.append((came, delivered, dead, depth, *times_of))
    return counted


@pytest.mark.parametrize(
    ("events", "burst", "gaps"),
    [(40, 0, False), (800, 0, False), (800, 0.5, False), (800, 0, True), (600, 0.9, True)],
)
def test_it_is_what_every_row_says(events: int, burst: float, gaps: bool) -> None:
    _history(random.Random(events), events=events, burst=burst, gaps=gaps)
    minutes = last_minutes(60, NOON)
    exact = [(m.queued, m.delivered, m.dead, m.depth) for m in minutes]
    recounted = _recount(NOON)
    assert exact == [row[:4] for row in recounted]
    for minute, row in zip(minutes, recounted, strict=True):
        if minute.delivered <= min(RUNS_TIMED, EVENTS_TIMED):
            assert (minute.median_ms, minute.p95_ms) == pytest.approx(row[4:], abs=1)


def test_of_many_deliveries_the_newest_are_timed() -> None:
    Agent.objects.get_or_create(pk="main")
    session = Session.objects.create(agent_id="main", key="agent:main:many")
    count = RUNS_TIMED + 100
    came = NOON - timedelta(minutes=3)
    runs = Heartbeat.objects.bulk_create(
        Heartbeat(
            pk=300 + number,
            run_id=uuid4(),
            session=session,
            reason=DueReason.WAKE,
            status=HeartbeatStatus.DELIVERED,
            event_count=1,
            started_at=came,
            finished_at=came + seconds(0.5 if number < 100 else 9 if number % 4 == 0 else 1),
        )
        for number in range(count)
    )
    SystemEvent.objects.bulk_create(
        SystemEvent(
            uid=uuid4(),
            session=session,
            text="x",
            source="cli",
            # The oldest deliveries took the longest.
            created_at=came - seconds(50 if run.pk < 400 else 0),
            state=EventState.DELIVERED,
            settled_at=run.finished_at,
            heartbeat=run,
        )
        for run in runs
    )
    minute = last_minutes(5, NOON)[1]
    assert minute.delivered == count
    assert (minute.median_ms, minute.p95_ms) == (1000, 9000)


# --- Pure parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("values", "share", "expected"),
    [
        ([], 0.5, None),
        ([7], 0.95, 7),
        ([3, 1, 2], 0.5, 2),
        ([4, 1, 2, 3], 0.5, 2),
        (list(range(1, 101)), 0.95, 95),
        (list(range(1, 11)), 0.95, 10),
    ],
)
def test_percentiles(values: list[int], share: float, expected: int | None) -> None:
    assert percentile(values, share) == expected


def test_depths_are_walked_back_from_the_present_and_never_below_nothing() -> None:
    assert walk_back(5, [3, -3, 3]) == [5, 2, 5]
    assert walk_back(1, [0, 7, 0]) == [0, 1, 1]
    assert walk_back(0, [9, 1, 0]) == [0, 0, 0]
