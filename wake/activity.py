"""What came and what was delivered, minute by minute, counted from the rows.

So it survives a restart and is the same in every process, nearly:

- Events are counted in the order of their ids, which is that of time but for transactions that
  overlap; deliveries by the end of their heartbeat. A turn that took longer than any agent allows,
  or than an hour, is passed over.
- The queue's depth is walked back from the present one by what came and went. A dead letter that
  was requeued never died, as far as the rows know.
- Delivery times are those of a share of the deliveries, some hundreds of a minute.
- Minutes that are over are held in memory and change no more, whatever becomes of their events.
"""

from __future__ import annotations

import threading
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import pairwise
from math import ceil
from typing import Any, Final

from django.db.backends.base.base import BaseDatabaseWrapper
from django.db.models import (
    BooleanField,
    Count,
    ExpressionWrapper,
    F,
    FloatField,
    Func,
    IntegerField,
    Max,
    Min,
    Q,
    QuerySet,
    Sum,
)
from django.db.models.sql.compiler import SQLCompiler

from wake import configuration
from wake.models import EventState, Heartbeat, HeartbeatStatus, SystemEvent

MINUTE: Final = timedelta(minutes=1)
MOST_MINUTES: Final = 180
LONGEST_TURN: Final = timedelta(hours=1)
# What happened in a minute is committed within this time after it: the database's own limits are
# shorter (see settings).
COMMITTED_WITHIN: Final = timedelta(seconds=15)

# Of more deliveries in a minute than this, a share is timed.
MOST_TIMED: Final = 500
# So many heartbeats at least stand for a minute, or one long one would.
FEWEST_RUNS_TIMED: Final = 16
# How many points of a minute are looked at to find where the next one begins.
POINTS: Final = 16

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


_held: dict[datetime, Minute] = {}
_lock = threading.Lock()


def last_minutes(count: int, now: datetime) -> list[Minute]:
    """Return the last `count` minutes (at most MOST_MINUTES), the oldest first.

    The last one is not over yet; each one before it is counted once in a process. Raises
    DatabaseError.
    """
    present = now.astimezone(UTC).replace(second=0, microsecond=0)
    starts = [present - back * MINUTE for back in range(count - 1, -1, -1)]
    with _lock:
        held = {start: _held[start] for start in starts[:-1] if start in _held}
    unknown = next(place for place, start in enumerate(starts) if start not in held)
    minutes = {minute.start: minute for minute in _count(starts[unknown:])} | held
    with _lock:
        for start, minute in minutes.items():
            if start + MINUTE + COMMITTED_WITHIN <= now:
                _held.setdefault(start, minute)
        for start in [start for start in _held if start <= present - MOST_MINUTES * MINUTE]:
            del _held[start]
    return [minutes[start] for start in starts]


def forget() -> None:
    """Forget the minutes that are held."""
    with _lock:
        _held.clear()


def _count(starts: Sequence[datetime]) -> list[Minute]:
    """Count the minutes that begin at `starts`: every one from the first to the present one."""
    delivering, failing = _runs(starts[0])
    times = _delivery_times(delivering)
    died = _dead(failing)
    minutes = [_minute_of_day(start) for start in starts]
    queued = _stored(starts)
    delivered = [delivering[minute].events if minute in delivering else 0 for minute in minutes]
    dead = [died.get(minute, 0) for minute in minutes]
    waiting = SystemEvent.objects.filter(state=EventState.QUEUED).count()
    depths = walk_back(waiting, queued, delivered, dead)
    return [
        Minute(
            start=start,
            queued=queued[place],
            delivered=delivered[place],
            dead=dead[place],
            depth=depths[place],
            median_ms=percentile(times[minute], 0.5),
            p95_ms=percentile(times[minute], 0.95),
        )
        for place, (start, minute) in enumerate(zip(starts, minutes, strict=True))
    ]


# --- Pure parts -----------------------------------------------------------------------------------


def walk_back(
    depth: int, queued: Sequence[int], delivered: Sequence[int], dead: Sequence[int]
) -> list[int]:
    """Return the queue's depth at the end of each minute; at the end of the last it is `depth`."""
    depths = []
    for came, went, died in reversed(list(zip(queued, delivered, dead, strict=True))):
        depths.append(depth)
        depth = max(0, depth - came + went + died)
    return depths[::-1]


def percentile(values: Iterable[int], share: float) -> int | None:
    """Return the least of the values that a share of them (0 < share <= 1) does not exceed."""
    ranked = sorted(values)
    return ranked[ceil(share * len(ranked)) - 1] if ranked else None


def shares(runs: int, events: int) -> tuple[int, int]:
    """Return that one in so many heartbeats, and one in so many of their events, is timed.

    Whole heartbeats are the cheaper ones to draw, as long as there are enough.
    """
    share = 1
    while events > share * MOST_TIMED:
        share *= 4
    of_runs = 1
    while of_runs < share and runs >= 4 * of_runs * FEWEST_RUNS_TIMED:
        of_runs *= 4
    return of_runs, share // of_runs


def _minute_of_day(start: datetime) -> int:
    return start.hour * 60 + start.minute


# --- What came ------------------------------------------------------------------------------------


def _stored(starts: Sequence[datetime]) -> list[int]:
    """Return how many events came in each minute; the last one has no end."""
    newest = SystemEvent.objects.order_by("-pk").values_list("pk", flat=True).first()
    if newest is None:
        return [0] * len(starts)
    minutes = list(pairwise([*_first_events(starts, newest), newest + 1]))
    lengths = [end - first for first, end in minutes]
    stored = SystemEvent.objects.filter(pk__gte=minutes[0][0], pk__lte=newest)
    # Where no id is missing, as is the rule, one query counts them all.
    if stored.count() == sum(lengths):
        return lengths
    return [
        stored.filter(pk__gte=first, pk__lt=end).count() if first < end else 0
        for first, end in minutes
    ]


def _first_events(starts: Sequence[datetime], newest: int) -> list[int]:
    """Return, for each minute, the id from which on events came in it or later.

    Times have no index. The first id is found by halving. Then points at equal distances tell
    between which ids the other minutes begin, and only there every row is looked at.
    """
    first = _first_event(starts[0], newest)
    distance = max(1, (newest + 1 - first) // (POINTS * len(starts)))
    points = SystemEvent.objects.filter(pk__in=range(first, newest + 1, distance)).order_by("pk")
    known = list(points.values_list("pk", "created_at"))
    at: list[int] = []
    gaps = Q(pk__in=[])
    for start in starts[1:]:
        place = bisect_left(known, start, key=lambda point: point[1])
        before = known[place - 1][0] if place else first - 1
        at.append(known[place][0] if place < len(known) else newest + 1)
        gaps |= Q(pk__gt=before, pk__lt=at[-1])
    in_gaps = SystemEvent.objects.filter(gaps).values_list(_MinuteOfDay("created_at"))
    earliest = dict(in_gaps.annotate(first=Min("pk")))
    found = newest + 1
    firsts = []
    for start, known_one in zip(reversed(starts[1:]), reversed(at), strict=True):
        found = min(found, known_one, earliest.get(_minute_of_day(start), found))
        firsts.append(found)
    return [first, *reversed(firsts)]


def _first_event(since: datetime, newest: int) -> int:
    """Return the id from which on events came at `since` or later."""
    low = SystemEvent.objects.order_by("pk").values_list("pk", flat=True).first() or newest
    high = newest
    while low <= high:
        middle = (low + high) // 2
        following = SystemEvent.objects.filter(pk__gte=middle, pk__lte=high).order_by("pk")
        event = following.values_list("pk", "created_at").first()
        if event and event[1] < since:
            low = event[0] + 1
        else:
            high = middle - 1
    return low


# --- What went ------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Runs:
    """Heartbeats that ended in one minute: how many, with how many events, between which ids."""

    count: int
    events: int
    first: int
    last: int


# By minute of the day.
_ByMinute = Mapping[int, _Runs]


def _runs(since: datetime) -> tuple[_ByMinute, _ByMinute]:
    """Return the heartbeats that ended since then: those that delivered, and those that failed."""
    delivering: dict[int, _Runs] = {}
    failing: dict[int, _Runs] = {}
    timeouts = [agent.timeout for agent in configuration.gateway().agents.values()]
    longest = min(max(timeouts), LONGEST_TURN)
    # Starts have an index, ends have none. It only tells after which id to begin: rows are read
    # twice as fast in the order of their ids.
    earlier = Heartbeat.objects.filter(started_at__lt=since - longest).order_by("-started_at")
    ended = Heartbeat.objects.filter(
        pk__gt=earlier.values_list("pk", flat=True).first() or 0,
        finished_at__gte=since,
        status__in=[*_DELIVERED, *_FAILED],
    )
    failed = ExpressionWrapper(Q(status__in=_FAILED), output_field=BooleanField())
    for minute, is_failed, *numbers in ended.values_list(
        _MinuteOfDay("finished_at"), failed
    ).annotate(runs=Count("pk"), handed=Sum("event_count"), first=Min("pk"), last=Max("pk")):
        (failing if is_failed else delivering)[minute] = _Runs(*numbers)
    return delivering, failing


def _dead(failing: _ByMinute) -> dict[int, int]:
    """Return, by minute, how many events became dead letters, those discarded since included."""
    if not failing:
        return {}
    failed = _of_minutes(failing, Heartbeat.objects.filter(status__in=_FAILED))
    settled = SystemEvent.objects.filter(heartbeat__in=failed)
    by_minute = settled.values_list(_MinuteOfDay("heartbeat__finished_at"))
    return dict(by_minute.annotate(count=Count("pk")))


def _delivery_times(delivering: _ByMinute) -> Mapping[int, list[int]]:
    """Return, by minute, the times of its deliveries, or of a share of them, in milliseconds."""
    by_share: dict[tuple[int, int], dict[int, _Runs]] = defaultdict(dict)
    for minute, runs in delivering.items():
        if runs.events:
            by_share[shares(runs.count, runs.events)][minute] = runs
    times: dict[int, list[int]] = defaultdict(list)
    for (of_runs, of_events), minutes in by_share.items():
        # Drawn before anything else of a row is looked at.
        drawn = _one_in(of_runs, Heartbeat.objects.all()).filter(status__in=_DELIVERED)
        events = SystemEvent.objects.filter(heartbeat__in=_of_minutes(minutes, drawn))
        for minute, milliseconds in _one_in(of_events, events).values_list(
            _MinuteOfDay("settled_at"), _Milliseconds("settled_at", "created_at")
        ):
            # Less than nothing, where the clocks of two machines differ.
            times[minute].append(max(0, round(milliseconds)))
    return times


def _of_minutes(minutes: _ByMinute, heartbeats: QuerySet[Heartbeat]) -> QuerySet[Any]:
    """Return the ids of the heartbeats that ended in these minutes."""
    ids = (min(of.first for of in minutes.values()), max(of.last for of in minutes.values()))
    ended: QuerySet[Any] = (
        heartbeats.filter(pk__range=ids)
        .alias(minute=_MinuteOfDay("finished_at"))
        .filter(minute__in=list(minutes))
        .values("pk")
    )
    return ended


def _one_in(share: int, rows: QuerySet[Any]) -> QuerySet[Any]:
    """Return one in so many rows, always the same ones; no rhythm of the ids matters."""
    if share == 1:
        return rows
    drawn: QuerySet[Any] = rows.alias(drawn=F("pk") * 7919 % 1009)
    return drawn.filter(drawn__lt=max(1, 1009 // share))


class _MinuteOfDay(Func):
    """The number of a moment's minute in its day, in UTC; enough, as all are of a few hours."""

    output_field = IntegerField()
    # The database's sessions are in UTC, as Django sets them.
    template = (
        "(DATE_PART('hour', %(expressions)s) * 60 + DATE_PART('minute', %(expressions)s))::int"
    )

    def as_sqlite(
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, **context: Any
    ) -> Any:
        template = "(SUBSTR(%(expressions)s, 12, 2) * 60 + SUBSTR(%(expressions)s, 15, 2))"
        return self.as_sql(compiler, connection, template=template, **context)


class _Milliseconds(Func):
    """From the second of two moments to the first."""

    output_field = FloatField()
    template = "DATE_PART('epoch', %(expressions)s) * 1000"
    arg_joiner = " - "

    def as_sqlite(
        self, compiler: SQLCompiler, connection: BaseDatabaseWrapper, **context: Any
    ) -> Any:
        template = "(JULIANDAY(%(expressions)s)) * 86400000"
        return self.as_sql(
            compiler, connection, template=template, arg_joiner=") - JULIANDAY(", **context
        )
