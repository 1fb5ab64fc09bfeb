"""The sign of life of this process's heartbeat loop, for those who ask whether it works."""

from __future__ import annotations

import time
from typing import Final

# It looks several times a second; a database that is slow may hold it up for a while.
LONGEST_SECONDS: Final = 30.0

_is_expected = False
_last: float | None = None


def expect(is_expected: bool) -> None:
    """Say whether this process is to run heartbeats."""
    global _is_expected, _last
    _is_expected, _last = is_expected, None


def beat() -> None:
    """Note that the loop has looked for what is due, and that the database answered."""
    global _last
    _last = time.monotonic()


def complaint() -> str:
    """Return what is wrong with the loop, for a person; empty where nothing is."""
    if not _is_expected:
        return ""
    if _last is None:
        return "the heartbeat loop has not begun yet"
    silent = time.monotonic() - _last
    if silent > LONGEST_SECONDS:
        return f"the heartbeat loop has not looked for work for {silent:.0f} s"
    return ""
