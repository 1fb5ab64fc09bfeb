"""Times, durations and texts as a person reads them. Pure: the present time is passed in."""

from __future__ import annotations

from datetime import datetime, timedelta
from typing import Final

# The unit, and from how many of it on the next larger one reads better.
_UNITS: Final = ((1, "s", 120), (60, "min", 120), (3600, "h", 48), (86400, "days", None))


def rough(duration: timedelta) -> str:
    """Return a length of time in one unit, for example `3 min`; its sign does not matter."""
    seconds = abs(duration.total_seconds())
    for size, unit, limit in _UNITS:
        count = int(seconds / size)
        if limit is None or count < limit:
            return f"{count} {unit}"
    raise AssertionError("the last unit has no limit")


def relative(at: datetime, now: datetime) -> str:
    """Return how far `at` lies from `now`: `3 min ago`, `in 12 min` or, within a second, `now`."""
    if abs(at - now) < timedelta(seconds=1):
        return "now"
    return f"in {rough(at - now)}" if at > now else f"{rough(now - at)} ago"


def exact(at: datetime) -> str:
    """Return a moment to the second with its zone: `2026-11-22 03:14:15 UTC`."""
    return at.strftime("%Y-%m-%d %H:%M:%S %Z").strip()


def run_time(duration: timedelta) -> str:
    """Return how long something took, as exactly as it matters: `45 ms`, `1.2 s`, `2 min 5 s`."""
    seconds = max(duration.total_seconds(), 0.0)
    if seconds < 1:
        return f"{seconds * 1000:.0f} ms"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s"
    return f"{minutes // 60} h {minutes % 60} min"


def first_line(text: str, limit: int = 120) -> str:
    """Return the first line that says something, cut to `limit` characters."""
    line = next((line for line in text.splitlines() if line.strip()), "").strip()
    return line if len(line) <= limit else f"{line[: limit - 1].rstrip()}…"


def counted(count: int, singular: str, plural: str = "") -> str:
    """Return a number with its noun: `1 event`, `2 events`, `10,000 events`."""
    return f"{count:,} {singular if count == 1 else plural or singular + 's'}"


def one_line(text: str) -> str:
    """Return text on one line: nothing unprintable, single spaces."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())
