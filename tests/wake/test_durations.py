"""Durations as people write them."""

from __future__ import annotations

import contextlib
from datetime import timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wake.durations import format_duration, parse_duration


@pytest.mark.parametrize(
    ("text", "duration"),
    [
        ("90d", timedelta(days=90)),
        ("24h", timedelta(days=1)),
        ("1h30m", timedelta(minutes=90)),
        (" 1H 30m 5s ", timedelta(seconds=5405)),
        ("0", timedelta(0)),
        ("0s", timedelta(0)),
        ("off", timedelta(0)),
        ("OFF", timedelta(0)),
    ],
)
def test_what_is_understood(text: str, duration: timedelta) -> None:
    assert parse_duration(text) == duration


@pytest.mark.parametrize("text", ["", " ", "5", "5x", "-5m", "1.5h", "h", "5m!", "five", "٣m"])
def test_what_is_not(text: str) -> None:
    with pytest.raises(ValueError, match="write for example"):
        parse_duration(text)


@pytest.mark.parametrize("text", ["9999999999d", "9" * 5000 + "s"])
def test_what_is_too_long(text: str) -> None:
    with pytest.raises(ValueError, match="too long"):
        parse_duration(text)


@given(st.text())
def test_any_text_is_a_duration_or_a_value_error(text: str) -> None:
    with contextlib.suppress(ValueError):
        assert parse_duration(text) >= timedelta(0)


@given(st.timedeltas(min_value=timedelta(0)).map(lambda each: each - each % timedelta(seconds=1)))
def test_a_duration_is_read_back_as_it_was_written(duration: timedelta) -> None:
    assert parse_duration(format_duration(duration)) == duration
