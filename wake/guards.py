"""What keeps an agent's heartbeats within bounds: pure, from values of the queue.

Three limits of an agent, each of which may be none: heartbeats at once (kept by `queue.claim`),
heartbeats of one session within a minute, and wakes in a row that a session's own runs send to it.
What is held back stays queued, is due when the hold ends, and is handed over together.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime, timedelta
from typing import Final

MINUTE: Final = timedelta(minutes=1)
# So long a session waits that only its own runs want to wake, unless somebody else wakes it.
SELF_WAKE_HOLD: Final = timedelta(hours=1)


def rate_hold(started: Sequence[datetime], limit: int, now: datetime) -> datetime | None:
    """Return until when a session may begin no further heartbeat, or None when it may.

    `started` is when its heartbeats began, the newest first: `limit` of them are enough.
    """
    # One of the future comes from a clock that was set back.
    recent = [at for at in started if now - MINUTE < at <= now]
    return recent[limit - 1] + MINUTE if len(recent) >= limit else None


def is_self_wake_held(own_runs: int, limit: int | None) -> bool:
    """Whether a further wake by the session's own runs is held back.

    `own_runs` is how many of its heartbeats in a row had no events but such ones.
    """
    return limit is not None and own_runs >= limit
