"""What came and what was delivered, minute by minute, counted from the rows.

So it survives a restart and is the same in every process, nearly: events are found in the order of
their ids, which is that of time but for transactions that overlap; the queue's depth is walked back
from the present one, and a dead letter that was requeued never died as far as the rows know;
delivery times are those of the newest heartbeats of a minute. A minute that is over is counted once
in a process.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from math import ceil
from typing import Final

from django.db.models import QuerySet, Sum

from wake.models import Heartbeat, HeartbeatStatus, Session, SystemEvent

MINUTE: Final = timedelta(minutes=1)
MOST_MINUTES: Final = 180
# What happened in a minute is committed within this time after it: the database's own limits are
# shorter (see settings).
COMMITTED_WITHIN: Final = timedelta(seconds=15)
# So many heartbeats of a minute, and so many events of theirs, are timed.
RUNS_TIMED: Final = 100
EVENTS_TIMED: Final = 200

_DELIVERED: Final = (HeartbeatStatus.DELIVERED, HeartbeatStatus.QUIET)
_FAILED: Final = (HeartbeatStatus.FAILED, HeartbeatStatus.LOST)


@dataclass(frozen=True, slots=True)
class Minute:
    """What happened in one minute, in numbers of events; `depth` were queued at its end.

    The times are from an event's coming to the end of its heartbeat, in milliseconds; None where
    nothing was delivered.
    """

    start: datetime
    queued: int
    delivered: int
    dead: int
    depth: int
    median_ms: int | None
    p95_ms: int | None


@dataclass(frozen=True, slots=True)
class _Flow:
    """What came and went in a minute; `times` in milliseconds."""

    queued: int
    delivered: int
    dead: int
    times: tuple[int, ...]


_held: dict[datetime, _Flow] = {}
_lock = threading.Lock()


def last_minutes(count: int, now: datetime) -> list[Minute]:
    """Return the last `count` minutes (at most MOST_MINUTES), the oldest first.

    The last one is not over yet. Raises DatabaseError.
    """
    present = now.astimezone(UTC).replace(second=0, microsecond=0)
    starts = [present - back * MINUTE for back in range(count - 1, -1, -1)]
    with _lock:
        flows = {start: _held[start] for start in starts[:-1] if start in _held}
    unknown = [start for start in starts if start not in flows]
    flows |= dict(zip(unknown, _count(unknown, present), strict=True))
    with _lock:
        _held.update(
            (start, flow)
            for start, flow in flows.items()
            if start + MINUTE + COMMITTED_WITHIN <= now
        )
        for start in [start for start in _held if start <= present - MOST_MINUTES * MINUTE]:
            del _held[start]
    told = [flows[start] for start in starts]
    depths = walk_back(
        Session.objects.aggregate(queued=Sum("queued", default=0))["queued"],
        [flow.queued - flow.delivered - flow.dead for flow in told],
    )
    return [
        Minute(
            start=start,
            queued=flow.queued,
            delivered=flow.delivered,
            dead=flow.dead,
            depth=depth,
            median_ms=percentile(flow.times, 0.5),
            p95_ms=percentile(flow.times, 0.95),
        )
        for start, flow, depth in zip(starts, told, depths, strict=True)
    ]


def forget() -> None:
    """Forget the minutes that are held."""
    with _lock:
        _held.clear()


def walk_back(depth: int, grown: Sequence[int]) -> list[int]:
    """Return the queue's depth at the end of each minute; at the end of the last it is `depth`.

    `grown` is by how much it grew in each minute.
    """
    depths = []
    for growth in reversed(grown):
        depths.append(depth)
        depth = max(0, depth - growth)
    return depths[::-1]


def percentile(values: Iterable[int], share: float) -> int | None:
    """Return the least of the values that a share of them (0 < share <= 1) does not exceed."""
    ranked = sorted(values)
    return ranked[ceil(share * len(ranked)) - 1] if ranked else None


def _count(starts: Sequence[datetime], present: datetime) -> Iterator[_Flow]:
    """Count minutes; of the present one all that came and went since its start."""
    events = SystemEvent.objects.order_by("pk").values_list("pk", flat=True)
    begin, newest = events.first() or 0, events.last() or 0
    firsts: dict[datetime, int] = {}
    for moment in sorted({*starts, *(start + MINUTE for start in starts)}):
        firsts[moment] = begin = _first_event(moment, begin, newest)
    for start in starts:
        came = SystemEvent.objects.filter(pk__gte=firsts[start])
        ended = Heartbeat.objects.filter(finished_at__gte=start)
        if start < present:
            came = came.filter(pk__lt=firsts[start + MINUTE])
            ended = ended.filter(finished_at__lt=start + MINUTE)
        yield _flow(came, ended)


def _flow(came: QuerySet[SystemEvent], ended: QuerySet[Heartbeat]) -> _Flow:
    delivered = ended.filter(status__in=_DELIVERED)
    newest = delivered.filter(event_count__gt=0).order_by("-finished_at")
    timed = SystemEvent.objects.filter(
        heartbeat__in=list(newest.values_list("pk", flat=True)[:RUNS_TIMED])
    )
    times = timed.values_list("created_at", "settled_at")[:EVENTS_TIMED]
    return _Flow(
        queued=came.count(),
        delivered=delivered.aggregate(count=Sum("event_count", default=0))["count"],
        dead=SystemEvent.objects.filter(
            heartbeat__in=ended.filter(status__in=_FAILED).values("pk")
        ).count(),
        times=tuple(
            # Less than nothing, where the clocks of two machines differ.
            max(0, round((settled_at - created_at) / timedelta(milliseconds=1)))
            for created_at, settled_at in times
            if settled_at
        ),
    )


def _first_event(since: datetime, low: int, high: int) -> int:
    """Return the id between these from which on events came at `since` or later.

    Times have no index, so it is found by halving.
    """
    events = SystemEvent.objects.order_by("pk").values_list("pk", "created_at")
    while low <= high:
        middle = (low + high) // 2
        # The next one that there is: ids can be missing.
        found = events.filter(pk__gte=middle, pk__lte=high).first()
        if found and found[1] < since:
            low = found[0] + 1
        else:
            high = middle - 1
    return low
