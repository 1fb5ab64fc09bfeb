"""Durations as people type and read them on the command line: `90d`, `1h30m`, `45s`, `off`."""

from __future__ import annotations

import re
from datetime import timedelta
from typing import Final

_UNITS: Final = {
    "d": timedelta(days=1),
    "h": timedelta(hours=1),
    "m": timedelta(minutes=1),
    "s": timedelta(seconds=1),
}
_PART = re.compile(r"\s*(\d+)\s*([dhms])", re.ASCII)


def parse_duration(text: str) -> timedelta:
    """Return the duration that `text` names: whole numbers with units d, h, m, s, summed.

    `0` and `off` are zero. A number without a unit is refused rather than guessed at.
    Raises ValueError whose message says what a duration looks like.
    """
    written = text.strip().lower()
    if written in {"0", "off"}:
        return timedelta(0)
    total = timedelta(0)
    end = 0
    try:
        while part := _PART.match(written, end):
            total += int(part[1]) * _UNITS[part[2]]
            end = part.end()
    except (OverflowError, ValueError) as error:  # ValueError: more digits than int() takes
        raise ValueError(f"{text[:40]!r} is too long a duration") from error
    if end == 0 or end != len(written):
        raise ValueError(
            f"{text[:40]!r} is not a duration; write for example 90d, 24h, 1h30m, 45s, or 0 for off"
        )
    return total


def format_duration(duration: timedelta) -> str:
    """Return the duration as `parse_duration` reads it, in whole seconds: `1h30m`; `0` for none.

    Negative ones carry a minus sign, which `parse_duration` refuses.
    """
    seconds = round(duration.total_seconds())
    parts = []
    rest = abs(seconds)
    for unit, length in _UNITS.items():
        count, rest = divmod(rest, int(length.total_seconds()))
        if count:
            parts.append(f"{count}{unit}")
    return ("-" if seconds < 0 else "") + "".join(parts) if parts else "0"
