"""Several runs that are settled in one transaction, with what is claimed beside them."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from threading import Event

import pytest
from django.db import connection, connections, transaction

from tests.claims import terms
from wake import queue
from wake.errors import LeaseLost
from wake.models import DueReason, EventState, Heartbeat, HeartbeatStatus, Session, SystemEvent
from wake.queue import Claim, Due, Entry, Settlement
from wake.session_keys import SessionKey

pytestmark = pytest.mark.django_db(transaction=True)

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
LEASE = timedelta(seconds=15)
DELIVERED = HeartbeatStatus.DELIVERED

Step = Settlement | Callable[[], object]


def claimed(count: int, events: int = 2) -> list[Claim]:
    """Store events in so many sessions and claim them, in the order of the sessions."""
    for number in range(count):
        key = SessionKey("main", f"agent:main:hook:{number}")
        texts = [f"{number}/{place}" for place in range(events)]
        entries = [Entry(key, text, "cli", False, Due(NOW, DueReason.WAKE)) for text in texts]
        queue.enqueue(entries, now=NOW, max_queued=100)
    claims = claim()
    assert len(claims) == count
    return sorted(claims, key=lambda one: one.session_id)


def claim() -> list[Claim]:
    return queue.claim(terms("main"), limit=20, owner="test", now=NOW, lease=LEASE)


def failing(one: Claim) -> Callable[[], None]:
    return lambda: queue.fail(one, "no", now=NOW, max_attempts=1)


def test_each_run_is_settled_as_it_would_be_alone() -> None:
    first, second, third = claimed(3)
    steps: list[Step] = [
        Settlement(first, DELIVERED, "prompt 1", "reply 1"),
        failing(second),
        Settlement(third, HeartbeatStatus.QUIET, "prompt 3", "reply 3", NOW + timedelta(hours=1)),
    ]
    assert queue.together(steps, now=NOW) == [None, None, None]
    kept = Heartbeat.objects.order_by("session_id").values_list("status", "prompt", "reply")
    assert list(kept) == [
        ("delivered", "prompt 1", "reply 1"),
        ("failed", "", ""),
        ("quiet", "prompt 3", "reply 3"),
    ]
    states = SystemEvent.objects.order_by("pk").values_list("state", "heartbeat__run_id")
    assert list(states) == [
        *[("delivered", first.run_id)] * 2,
        *[("dead", second.run_id)] * 2,
        *[("delivered", third.run_id)] * 2,
    ]
    sessions = Session.objects.order_by("pk").values_list("queued", "lease_token", "due_at")
    assert list(sessions)[-3:] == [
        (0, None, None),
        (0, None, None),
        (0, None, NOW + timedelta(hours=1)),
    ]


def test_one_that_lost_its_lease_is_refused_and_undoes_no_other() -> None:
    first, second, third, fourth = claimed(4)
    for gone in (second, third):
        queue.release(gone, now=NOW)
    results = queue.together(
        [
            Settlement(first, DELIVERED),
            Settlement(second, DELIVERED),
            failing(third),
            Settlement(fourth, DELIVERED),
        ],
        sessions=[one.session_id for one in (first, second, third, fourth)],
        now=NOW,
    )
    assert [type(result) for result in results] == [type(None), LeaseLost, LeaseLost, type(None)]
    assert str(second.run_id) in str(results[1])
    queued = SystemEvent.objects.filter(state=EventState.QUEUED).values_list("session", flat=True)
    assert sorted(queued) == sorted([second.session_id, third.session_id] * 2)


def test_what_one_raises_undoes_all() -> None:
    first, second = claimed(2)

    def breaks() -> None:
        raise RuntimeError("broken")

    alone: list[Step] = [Settlement(first, DELIVERED), breaks]
    after: list[Step] = [
        Settlement(first, DELIVERED, then=breaks),
        Settlement(second, DELIVERED),
    ]
    for steps in (alone, after):
        with pytest.raises(RuntimeError):
            queue.together(steps, now=NOW)
    assert Heartbeat.objects.filter(status=HeartbeatStatus.RUNNING).count() == 2
    assert SystemEvent.objects.filter(state=EventState.QUEUED).count() == 4


def test_a_claim_beside_a_settlement_takes_what_came_meanwhile() -> None:
    (first,) = claimed(1)
    late = Entry(first.session, "late", "cli", False, Due(NOW, DueReason.WAKE))
    queue.enqueue([late], now=NOW, max_queued=100)
    steps: list[Step] = [Settlement(first, DELIVERED), claim]
    _, claims = queue.together(steps, now=NOW)
    assert [event.text for one in claims for event in one.events] == ["late"]


def test_who_settles_several_sessions_and_who_wakes_them_wait_in_no_circle() -> None:
    """The settlement of the second session comes first, but not before the first one is locked."""
    if connection.vendor != "postgresql":
        pytest.skip("SQLite has one lock for all sessions: set DATABASE_URL to PostgreSQL")
    first, second = claimed(2)
    is_locked, goes_on = Event(), Event()

    def lock_one_after_the_other() -> None:
        try:
            with transaction.atomic():
                list(Session.objects.select_for_update().filter(pk=first.session_id))
                is_locked.set()
                assert goes_on.wait(10)
                with connection.cursor() as cursor:
                    cursor.execute("SET LOCAL lock_timeout = '2s'")
                list(Session.objects.select_for_update().filter(pk=second.session_id))
        finally:
            connections.close_all()

    def settle() -> list[object]:
        try:
            return queue.together(
                [failing(first), Settlement(second, DELIVERED)],
                sessions=[first.session_id, second.session_id],
                now=NOW,
            )
        finally:
            connections.close_all()

    with ThreadPoolExecutor(2) as threads:
        locking = threads.submit(lock_one_after_the_other)
        assert is_locked.wait(10)
        settling = threads.submit(settle)
        waiting = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        with connection.cursor() as cursor:
            cursor.execute(waiting)
            while cursor.fetchone()[0] == 0:
                cursor.execute(waiting)
        goes_on.set()
        locking.result(20)
        assert settling.result(20) == [None, None]
