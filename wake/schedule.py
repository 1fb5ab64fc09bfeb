"""When an agent's main session has its next scheduled heartbeat: pure, from a fixed grid.

The grid of an agent has one point every `every`, shifted by a stable share of the interval that
is drawn from the agent's id, so that many agents with one interval do not all run at :00. The
next point follows from the clock alone: nothing is stored that a crash could lose or a changed
interval could leave behind.
"""

from __future__ import annotations

import hashlib
from datetime import UTC, datetime, timedelta

_EPOCH = datetime(2000, 1, 1, tzinfo=UTC)


def next_due(agent_id: str, every: timedelta, now: datetime) -> datetime | None:
    """Return the first point of the agent's grid after `now`, or None with the schedule off (0)."""
    if every <= timedelta(0):
        return None
    fraction = int.from_bytes(hashlib.sha256(agent_id.encode()).digest()[:8]) / 2**64
    origin = _EPOCH + every * fraction
    return origin + ((now - origin) // every + 1) * every
