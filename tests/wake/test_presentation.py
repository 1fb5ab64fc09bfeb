"""Times, durations and texts as a person reads them."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wake.presentation import counted, exact, first_line, relative, rough, run_time

NOW = datetime(2026, 11, 22, 3, 14, 15, tzinfo=UTC)


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0, "now"), (0.9, "now"), (-5, "5 s ago"), (119, "in 119 s"), (120, "in 2 min"),
     (-7199, "119 min ago"), (-7200, "2 h ago"), (172800, "in 2 days")],
)  # fmt: skip
def test_how_far_a_moment_is(seconds: float, words: str) -> None:
    assert relative(NOW + timedelta(seconds=seconds), NOW) == words


@pytest.mark.parametrize(
    ("seconds", "words"),
    [(0.045, "45 ms"), (1.24, "1.2 s"), (59.94, "59.9 s"), (125, "2 min 5 s"),
     (7260, "2 h 1 min"), (-1, "0 ms")],
)  # fmt: skip
def test_how_long_something_took(seconds: float, words: str) -> None:
    assert run_time(timedelta(seconds=seconds)) == words


@given(st.timedeltas(min_value=timedelta(0)), st.timedeltas(min_value=timedelta(0)))
def test_a_longer_time_never_reads_shorter(one: timedelta, other: timedelta) -> None:
    units = {"s": 1, "min": 60, "h": 3600, "days": 86400}

    def read(duration: timedelta) -> int:
        count, unit = rough(duration).split()
        return int(count) * units[unit]

    shorter, longer = sorted((one, other))
    assert read(shorter) <= read(longer) <= longer.total_seconds()


def test_a_moment_to_the_second() -> None:
    assert exact(NOW) == "2026-11-22 03:14:15 UTC"


@pytest.mark.parametrize(
    ("text", "line"),
    [("", ""), ("\n \n", ""), ("\n  first \nsecond", "first"), ("x" * 200, "x" * 119 + "…")],
)
def test_the_first_line_that_says_something(text: str, line: str) -> None:
    assert first_line(text) == line


def test_a_number_with_its_noun() -> None:
    assert counted(1, "event") == "1 event"
    assert counted(10_000, "event") == "10,000 events"
    assert counted(2, "more waits", "more wait") == "2 more wait"
