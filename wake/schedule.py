"""When an agent's main session has its next scheduled heartbeat: pure, from a fixed grid.

The grid of an agent has one point every `every`, shifted by a stable share of the interval that
is drawn from the agent's id, so that many agents with one interval do not all run at :00. The
next point follows from the clock alone: nothing is stored that a crash could lose or a changed
interval could leave behind.

With active hours, heartbeats happen within windows. Each local day has one: it opens when the
clock of the time zone first shows `active_from` on that day, and closes when it last shows
`active_until`, on the next day where that is not later than `active_from`. So where the clock is
put back over one of the two times, the window is the longer one. A time that the clock jumps over
is the moment of the jump; a window that lies in a jump is none.

* A point inside a window is a heartbeat.
* A point outside stands for the first heartbeat of the next window. That is the first point in
  there or, where there is none, a place of its own: a second stable share of the window's length.

So no window goes without a heartbeat that a point came before, and an interval that is longer
than a day has one heartbeat for each of its points.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, time, timedelta
from typing import Final
from zoneinfo import ZoneInfo

_EPOCH: Final = datetime(2000, 1, 1, tzinfo=UTC)
_DAY: Final = timedelta(days=1)
_MICROSECOND: Final = timedelta(microseconds=1)


@dataclass(frozen=True, slots=True)
class Schedule:
    """How often, and between which times of day on the clock of `time_zone`.

    `every` of 0 is no schedule. Without one of the times of day, all day is active.
    """

    every: timedelta
    active_from: time | None = None
    active_until: time | None = None
    time_zone: str = "UTC"


def next_due(agent_id: str, schedule: Schedule, now: datetime) -> datetime | None:
    """Return the agent's first scheduled heartbeat after `now`, or None with the schedule off."""
    every = schedule.every
    if every <= timedelta(0):
        return None
    digest = hashlib.sha256(agent_id.encode()).digest()
    origin = _EPOCH + _share(every, digest[:8])
    last_point = origin + (now - origin) // every * every

    def heartbeat(point: datetime) -> datetime:
        """Return the heartbeat that a point stands for."""
        opens, closes = _window(schedule, point)
        if opens <= point:
            return point
        first = origin - (origin - opens) // every * every
        return first if first < closes else opens + _share(closes - opens, digest[8:16])

    # That of the last point may be ahead still; those of the points before it are not.
    due = heartbeat(last_point)
    return due if due > now else heartbeat(last_point + every)


def _share(length: timedelta, drawn: bytes) -> timedelta:
    """Return a part of `length`, less than the whole, as eight random bytes say."""
    return length // _MICROSECOND * int.from_bytes(drawn) // 2**64 * _MICROSECOND


def _window(schedule: Schedule, point: datetime) -> tuple[datetime, datetime]:
    """Return the window that a point lies in, or else the next one: its opening and its closing."""
    begin, end = schedule.active_from, schedule.active_until
    if begin is None or end is None:
        return point, datetime.max.replace(tzinfo=UTC)
    zone = _zone(schedule.time_zone)
    # Its window may have opened on the day before, and the clock been put back to that day since.
    day = point.astimezone(zone).date() - 2 * _DAY
    while True:
        opens, _ = _shown(datetime.combine(day, begin), zone)
        _, closes = _shown(datetime.combine(day if begin < end else day + _DAY, end), zone)
        if max(opens, point) < closes:
            return opens, closes
        day += _DAY


def _shown(local: datetime, zone: ZoneInfo) -> tuple[datetime, datetime]:
    """Return when the clock of the zone shows a time of day first, and when it does so last."""
    first, last = (local.replace(tzinfo=zone, fold=fold).astimezone(UTC) for fold in (0, 1))
    if first <= last:
        return first, last
    # It never does. Read by the offset after the jump it lies before it, and the other way round.
    before, after = last, first
    offset = before.astimezone(zone).utcoffset()
    while after - before > _MICROSECOND:
        middle = before + (after - before) // 2
        if middle.astimezone(zone).utcoffset() == offset:
            before = middle
        else:
            after = middle
    return after, after


def _zone(name: str) -> ZoneInfo:
    try:
        return ZoneInfo(name)
    except (KeyError, OSError, ValueError):  # its name is checked, but zones are renamed
        return ZoneInfo("UTC")
