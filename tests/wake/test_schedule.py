"""Scheduled heartbeats: the grid, active hours, and the days on which the clock is set."""

from __future__ import annotations

import itertools
from collections import Counter
from datetime import UTC, datetime, time, timedelta
from time import process_time
from zoneinfo import ZoneInfo

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wake.schedule import Schedule, next_due

SECOND, MINUTE, HOUR, DAY = (timedelta(seconds=n) for n in (1, 60, 3600, 86400))

BERLIN, NEW_YORK, LORD_HOWE = "Europe/Berlin", "America/New_York", "Australia/Lord_Howe"
# Beside the usual ones: by half an hour, at midnight, by a whole day that never was, not at all.
ZONES = [BERLIN, NEW_YORK, LORD_HOWE, "America/Havana", "Pacific/Apia", "Asia/Kolkata"]

times = st.datetimes(datetime(1990, 1, 1), datetime(2100, 1, 1), timezones=st.just(UTC))  # noqa: DTZ001
intervals = st.timedeltas(SECOND, timedelta(days=366))
times_of_day = st.times() | st.builds(time, st.integers(0, 23), st.sampled_from([0, 15, 30]))
schedules = st.builds(Schedule, intervals, times_of_day, times_of_day, st.sampled_from(ZONES))
# When those zones set their clocks.
set_clocks = [
    datetime(2026, 3, 29, 1, tzinfo=UTC),
    datetime(2026, 10, 25, 1, tzinfo=UTC),
    datetime(2026, 11, 1, 6, tzinfo=UTC),
    datetime(2026, 10, 3, 15, 30, tzinfo=UTC),
    datetime(2026, 4, 4, 15, tzinfo=UTC),
    datetime(2026, 11, 1, 5, tzinfo=UTC),
    datetime(2011, 12, 30, 10, tzinfo=UTC),
]
moments = times | st.builds(
    datetime.__add__, st.sampled_from(set_clocks), st.timedeltas(-2 * DAY, 2 * DAY)
)


def utc(text: str) -> datetime:
    return datetime.fromisoformat(text).replace(tzinfo=UTC)


def hours(text: str, zone: str = "UTC", every: timedelta = MINUTE) -> Schedule:
    """Return the schedule of active hours written as 09:00-17:00."""
    begin, end = map(time.fromisoformat, text.split("-"))
    return Schedule(every, begin, end, zone)


def heartbeats(schedule: Schedule, after: datetime, until: datetime) -> list[datetime]:
    """Return the scheduled heartbeats of a stretch of time."""
    found: list[datetime] = []
    while (due := next_due("main", schedule, found[-1] if found else after)) and due < until:
        found.append(due)
    return found


def test_an_interval_of_zero_is_no_schedule() -> None:
    assert next_due("main", Schedule(timedelta(0)), utc("2026-11-22")) is None
    assert next_due("main", hours("09:00-17:00", every=timedelta(0)), utc("2026-11-22")) is None


@given(st.text(max_size=8), intervals, times)
def test_the_next_point_lies_within_one_interval_and_on_one_grid(
    agent: str, every: timedelta, now: datetime
) -> None:
    schedule = Schedule(every)
    due = next_due(agent, schedule, now)
    assert due
    assert now < due <= now + every
    assert next_due(agent, schedule, due - timedelta(microseconds=1)) == due
    assert next_due(agent, schedule, due) == due + every


# The window of a night or a day, in UTC: with a heartbeat every minute the first is in its first
# minute and the last in its last one.
WINDOWS = [
    # usual days, in winter and in summer
    ("09:00-17:00", BERLIN, "2026-01-15", "2026-01-15 08:00", "2026-01-15 16:00"),
    ("09:00-17:00", BERLIN, "2026-07-15", "2026-07-15 07:00", "2026-07-15 15:00"),
    ("09:00-17:00", NEW_YORK, "2026-07-15", "2026-07-15 13:00", "2026-07-15 21:00"),
    # across midnight; until midnight; from midnight
    ("22:00-06:00", BERLIN, "2026-01-15 12:00", "2026-01-15 21:00", "2026-01-16 05:00"),
    ("22:00-06:00", NEW_YORK, "2026-01-15 12:00", "2026-01-16 03:00", "2026-01-16 11:00"),
    ("18:00-00:00", BERLIN, "2026-01-15 12:00", "2026-01-15 17:00", "2026-01-15 23:00"),
    ("00:00-06:00", BERLIN, "2026-01-15 12:00", "2026-01-15 23:00", "2026-01-16 05:00"),
    # the clock is put forward: at 02:00 to 03:00 in Berlin (01:00 UTC) and New York (07:00 UTC)
    ("09:00-17:00", BERLIN, "2026-03-29", "2026-03-29 07:00", "2026-03-29 15:00"),
    ("22:00-06:00", BERLIN, "2026-03-28 12:00", "2026-03-28 21:00", "2026-03-29 04:00"),
    ("02:30-05:00", BERLIN, "2026-03-28 12:00", "2026-03-29 01:00", "2026-03-29 03:00"),
    ("00:30-02:30", BERLIN, "2026-03-28 12:00", "2026-03-28 23:30", "2026-03-29 01:00"),
    ("02:10-03:20", BERLIN, "2026-03-28 12:00", "2026-03-29 01:00", "2026-03-29 01:20"),
    ("02:10-02:50", BERLIN, "2026-03-28 12:00", "2026-03-30 00:10", "2026-03-30 00:50"),
    ("02:10-03:00", BERLIN, "2026-03-28 12:00", "2026-03-30 00:10", "2026-03-30 01:00"),
    ("22:00-06:00", NEW_YORK, "2026-03-07 12:00", "2026-03-08 03:00", "2026-03-08 10:00"),
    ("02:30-05:00", NEW_YORK, "2026-03-07 12:00", "2026-03-08 07:00", "2026-03-08 09:00"),
    # the clock is put back: at 03:00 to 02:00 in Berlin (01:00 UTC), at 02:00 to 01:00 in New York
    ("09:00-17:00", BERLIN, "2026-10-25", "2026-10-25 08:00", "2026-10-25 16:00"),
    ("22:00-06:00", BERLIN, "2026-10-24 12:00", "2026-10-24 20:00", "2026-10-25 05:00"),
    ("02:30-05:00", BERLIN, "2026-10-24 12:00", "2026-10-25 00:30", "2026-10-25 04:00"),
    ("00:30-02:30", BERLIN, "2026-10-24 12:00", "2026-10-24 22:30", "2026-10-25 01:30"),
    ("02:10-02:50", BERLIN, "2026-10-24 12:00", "2026-10-25 00:10", "2026-10-25 01:50"),
    ("22:00-06:00", NEW_YORK, "2026-10-31 12:00", "2026-11-01 02:00", "2026-11-01 11:00"),
    ("01:10-01:50", NEW_YORK, "2026-10-31 12:00", "2026-11-01 05:10", "2026-11-01 06:50"),
    # by half an hour: at 02:00 to 02:30 (15:30 UTC), and at 02:00 to 01:30 (15:00 UTC)
    ("22:00-06:00", LORD_HOWE, "2026-10-03 06:00", "2026-10-03 11:30", "2026-10-03 19:00"),
    ("02:15-04:00", LORD_HOWE, "2026-10-03 06:00", "2026-10-03 15:30", "2026-10-03 17:00"),
    ("02:05-02:25", LORD_HOWE, "2026-10-03 06:00", "2026-10-04 15:05", "2026-10-04 15:25"),
    ("22:00-06:00", LORD_HOWE, "2026-04-04 06:00", "2026-04-04 11:00", "2026-04-04 19:30"),
    ("01:40-01:50", LORD_HOWE, "2026-04-04 06:00", "2026-04-04 14:40", "2026-04-04 15:20"),
    # a day that never was: the clock went from the end of the 29th to the beginning of the 31st
    ("09:00-17:00", "Pacific/Apia", "2011-12-30 06:00", "2011-12-30 19:00", "2011-12-31 03:00"),
    ("22:00-06:00", "Pacific/Apia", "2011-12-30 06:00", "2011-12-30 08:00", "2011-12-30 10:00"),
    # midnight itself is jumped over
    ("00:00-06:00", "America/Havana", "2026-03-08 02:00", "2026-03-08 05:00", "2026-03-08 10:00"),
]


@pytest.mark.parametrize(("active", "zone", "now", "opens", "closes"), WINDOWS)
def test_a_window_is_read_from_the_clock_of_its_time_zone(
    active: str, zone: str, now: str, opens: str, closes: str
) -> None:
    found = heartbeats(hours(active, zone), utc(now), utc(closes) + timedelta(hours=1))
    if (active, zone) == ("22:00-06:00", "Pacific/Apia"):  # goes on at once, on the day after
        found = [due for due in found if due < utc(closes)]
    assert utc(opens) <= found[0] < utc(opens) + MINUTE
    assert utc(closes) - MINUTE <= found[-1] < utc(closes)
    assert {later - due for due, later in itertools.pairwise(found)} == {MINUTE}


def test_a_night_on_which_the_clock_is_put_back_runs_into_its_own_evening() -> None:
    # Until the last 02:15 and from the first 02:30 on: the two windows overlap.
    schedule = hours("02:30-02:15", BERLIN)
    found = heartbeats(schedule, utc("2026-10-24 12:00"), utc("2026-10-25 12:00"))
    assert len(found) == 24 * 60


@pytest.mark.parametrize("zone", ["Nowhere/Land", "", "../etc", "Europe"])
def test_a_time_zone_that_is_none_is_read_as_utc(zone: str) -> None:
    now = utc("2026-01-15")
    assert next_due("main", hours("09:00-17:00", zone), now) == next_due(
        "main", hours("09:00-17:00"), now
    )


def in_a_window(schedule: Schedule, due: datetime) -> bool:
    """Whether the local time of day is within active hours, or the clock is set that day."""
    begin, end = schedule.active_from, schedule.active_until
    assert begin is not None
    assert end is not None
    zone = ZoneInfo(schedule.time_zone)
    of_day = due.astimezone(zone).time()
    inside = begin <= of_day < end if begin < end else not end <= of_day < begin
    # There the edges move; the table above says how.
    day = timedelta(hours=25)
    is_set = len({(due + n * day).astimezone(zone).utcoffset() for n in (-1, 0, 1)}) > 1
    return inside or is_set


@given(st.text(max_size=8), schedules, moments)
def test_a_heartbeat_comes_after_now_in_active_hours_and_at_a_time_that_stays(
    agent: str, schedule: Schedule, now: datetime
) -> None:
    due = next_due(agent, schedule, now)
    assert due
    assert now < due <= now + schedule.every + 3 * DAY
    assert in_a_window(schedule, due)
    assert next_due(agent, schedule, due - timedelta(microseconds=1)) == due
    following = next_due(agent, schedule, due)
    assert following
    assert following > due


@given(st.text(max_size=8), schedules, moments, st.floats(0, 1, exclude_max=True))
def test_until_it_comes_the_next_heartbeat_stays_the_same(
    agent: str, schedule: Schedule, now: datetime, share: float
) -> None:
    due = next_due(agent, schedule, now)
    assert due
    between = min(now + (due - now) * share, due - timedelta(microseconds=1))
    assert next_due(agent, schedule, between) == due


@given(
    st.text(max_size=8),
    st.builds(
        Schedule, st.timedeltas(MINUTE, DAY), times_of_day, times_of_day, st.sampled_from(ZONES)
    ),
    moments,
)
def test_no_day_goes_without_a_heartbeat(agent: str, schedule: Schedule, now: datetime) -> None:
    due = next_due(agent, schedule, now)
    assert due
    # The longest is from the first moment of one window to the last of the next: of a day that the
    # clock makes longer, or that follows a window that lay in a jump.
    assert due - now < 3 * DAY + 2 * HOUR


@pytest.mark.parametrize("active", ["09:00-17:00", "22:00-06:00", "12:00-12:01"])
@pytest.mark.parametrize("zone", [BERLIN, NEW_YORK, LORD_HOWE])
def test_a_week_has_one_heartbeat_and_a_day_has_one(active: str, zone: str) -> None:
    begin = utc("2026-01-01 12:00")
    end = begin + timedelta(days=364)
    assert len(heartbeats(hours(active, zone, 7 * DAY), begin, end)) == 52
    for every in (DAY, timedelta(hours=7)):
        opened = timedelta(hours=int(active[:2]))
        windows = sorted(
            {
                (due.astimezone(ZoneInfo(zone)).replace(tzinfo=None) - opened).date()
                for due in heartbeats(hours(active, zone, every), begin, end)
            }
        )
        missed = sum(later - day > DAY for day, later in itertools.pairwise(windows))
        # Where the clock is put forward, less than a day lies between two windows.
        assert missed <= (every == DAY)
        assert 363 <= len(windows) + missed <= 365


@pytest.mark.parametrize("every", [SECOND, MINUTE, 30 * MINUTE, DAY, 7 * DAY, 366 * DAY], ids=str)
@pytest.mark.parametrize("active", ["", "09:00-17:00", "22:00-06:00"])
def test_a_thousand_agents_with_one_interval_spread_evenly(every: timedelta, active: str) -> None:
    schedule = hours(active, BERLIN, every) if active else Schedule(every)
    now = utc("2026-01-15 23:00")
    dues = [next_due(f"agent-{number}", schedule, now) for number in range(1000)]
    if not active:
        shares = [(due - now) / every for due in dues if due]
    elif every < DAY:
        shares = [(due - now) % every / every for due in dues if due]
    else:  # over the window, whichever day's it is
        opens = datetime.combine(now, time.fromisoformat(active[:5]))
        clocks = [due.astimezone(ZoneInfo(BERLIN)).replace(tzinfo=None) for due in dues if due]
        shares = [(shown - opens) % DAY / (8 * HOUR) for shown in clocks]
    tenths = Counter(min(int(share * 10), 9) for share in shares)
    assert sum(tenths.values()) == 1000
    assert len(tenths) == 10
    assert max(tenths.values()) < 150


def test_a_thousand_agents_take_no_time_whatever_the_interval() -> None:
    now = utc("2026-03-28 12:00")
    for every in (SECOND, DAY, 366 * DAY):
        for active in ("02:30-05:00", "22:00-06:00"):
            began = process_time()
            for number in range(1000):
                next_due(f"agent-{number}", hours(active, BERLIN, every), now)
            assert process_time() - began < 1
