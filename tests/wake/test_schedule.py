"""The grid of scheduled heartbeats."""

from __future__ import annotations

from collections import Counter
from datetime import UTC, datetime, timedelta

from hypothesis import given
from hypothesis import strategies as st

from wake.schedule import next_due

times = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
intervals = st.timedeltas(timedelta(seconds=1), timedelta(days=366))


def test_an_interval_of_zero_is_no_schedule() -> None:
    assert next_due("main", timedelta(0), datetime(2026, 11, 22, tzinfo=UTC)) is None


@given(st.text(max_size=8), intervals, times)
def test_the_next_point_lies_within_one_interval_and_on_one_grid(
    agent: str, every: timedelta, now: datetime
) -> None:
    due = next_due(agent, every, now)
    assert due
    assert now < due <= now + every
    assert next_due(agent, every, due - timedelta(microseconds=1)) == due
    assert next_due(agent, every, due) == due + every


def test_a_thousand_agents_spread_over_the_interval() -> None:
    now, every = datetime(2026, 11, 22, tzinfo=UTC), timedelta(minutes=30)
    dues = [next_due(f"agent-{n}", every, now) for n in range(1000)]
    minutes = Counter((due - now) // timedelta(minutes=3) for due in dues if due)
    assert len(minutes) == 10
    assert max(minutes.values()) < 150
