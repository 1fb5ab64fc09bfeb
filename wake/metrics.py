"""What is counted, and how: each count in the transaction of what it counts, so that it is right.

Counts are rows of `Tally`, added to by any process and never lost by a restart. A transaction
collects what it counts in `Counts` and writes it with one statement. What changes nothing in the
database (a wake that is refused) is noted in memory and written every few seconds: what a process
noted since then is lost when it is killed.

`wake.exposition` reads them.
"""

from __future__ import annotations

import bisect
import random
import re
import threading
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Final

from django.db import DatabaseError, transaction

from wake import columns, upkeep
from wake.models import Tally

SHARDS: Final = 16
WRITE_NOTED_EVERY: Final = timedelta(seconds=5)

# Upper bounds, in seconds.
BUCKETS: Final = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300, 600)
INFINITY: Final = "+Inf"


@dataclass(frozen=True, slots=True)
class Metric:
    """One thing that is counted. With `buckets` it is a histogram, else a counter."""

    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


WAKES: Final = Metric("wakes", "Wakes, by where they came in and what became of them.",
                      ("door", "outcome"))  # fmt: skip
WAKE_TO_RUN: Final = Metric(
    "wake_to_run_seconds",
    "From the storing of an event to the start of the first run that takes it.",
    buckets=BUCKETS,
)
WAKE_TO_DONE: Final = Metric(
    "wake_to_done_seconds",
    "From the storing of an event to its end: delivered, or a dead letter.",
    ("outcome",),
    BUCKETS,
)
RUNS: Final = Metric("runs", "Runs that ended, by runner and how.", ("runner", "status"))
REPLY_POSTS: Final = Metric(
    "reply_posts", "Replies posted to their agents' reply URLs, by how that ended.", ("outcome",)
)
METRICS: Final = (WAKES, WAKE_TO_RUN, WAKE_TO_DONE, RUNS, REPLY_POSTS)

DOORS: Final = frozenset({"cli", "ws", "hook", "admin", "console", "turn", "agent"})


def door(source: str) -> str:
    """Return the door that an event came in by: the kind of its source (`hook:ci` is a hook)."""
    kind = source.partition(":")[0]
    return kind if kind in DOORS else "other"


class Counts:
    """What one transaction counts. `write` adds it to the tallies, as the last thing in it.

    Times are aware datetimes. A clock that was set back makes no time shorter than none.
    """

    def __init__(self) -> None:
        self._amounts: defaultdict[tuple[str, str], float] = defaultdict(float)

    def wake(self, source: str, outcome: str, amount: int = 1) -> None:
        """Count wakes: `queued`, `coalesced`, `replayed` or, by `note_wake`, not taken."""
        self._amounts[_wake(source, outcome)] += amount

    def started(self, events_at: Iterable[datetime], now: datetime) -> None:
        """Count the events of a first attempt, stored at these times, as handed to a run."""
        for at in events_at:
            self.observe(WAKE_TO_RUN, now - at)

    def done(self, events_at: Iterable[datetime], outcome: str, now: datetime) -> None:
        """Count events, stored at these times, as `delivered` or `dead`."""
        for at in events_at:
            self.observe(WAKE_TO_DONE, now - at, outcome=outcome)

    def run(self, runner: str, status: str) -> None:
        """Count one run that ended."""
        self.count(RUNS, runner=runner, status=status)

    def reply_post(self, outcome: str) -> None:
        """Count one post of a reply: `sent`, `failed`, or `retried` when there will be another."""
        self.count(REPLY_POSTS, outcome=outcome)

    def count(self, metric: Metric, amount: float = 1, **labels: str) -> None:
        """Add to a counter."""
        self._amounts[metric.name, written(metric, labels)] += amount

    def observe(self, metric: Metric, took: timedelta, **labels: str) -> None:
        """Add one observation to a histogram."""
        seconds = max(0.0, took.total_seconds())
        place = bisect.bisect_left(metric.buckets, seconds)
        limit = bucket_name(metric.buckets[place]) if place < len(metric.buckets) else INFINITY
        base = written(metric, labels)
        # Each bucket for itself; what reads them adds them up.
        self._amounts[f"{metric.name}_bucket", f"{base},le={limit}".lstrip(",")] += 1
        self._amounts[f"{metric.name}_sum", base] += seconds

    def write(self) -> None:
        """Add all of it to the tallies: one statement, within the transaction under way.

        Nothing when nothing was counted. Raises DatabaseError.
        """
        if not self._amounts:
            return
        shard = _shard()
        # In one order, so that two transactions never wait for each other in a circle.
        rows = [(*key, shard, amount) for key, amount in sorted(self._amounts.items())]
        self._amounts.clear()
        table = Tally._meta.db_table
        values = ", ".join(["(%s, %s, %s, %s)"] * len(rows))
        columns.execute(
            f"INSERT INTO {table} (name, labels, shard, value) VALUES {values} "  # noqa: S608 - a table's name
            "ON CONFLICT (name, labels, shard) "
            f"DO UPDATE SET value = {table}.value + excluded.value",
            [value for row in rows for value in row],
        )


@lru_cache(maxsize=1024)
def _wake(source: str, outcome: str) -> tuple[str, str]:
    return WAKES.name, written(WAKES, {"door": door(source), "outcome": outcome})


def written(metric: Metric, labels: dict[str, str]) -> str:
    """Return labels as they are stored: `door=ws,outcome=queued`, in the metric's order.

    Raises ValueError unless they are the metric's own.
    """
    if labels.keys() != set(metric.labels):
        raise ValueError(f"{metric.name} has the labels {metric.labels}, not {tuple(labels)}")
    return ",".join(f"{name}={_value(labels[name])}" for name in metric.labels)


def parsed(labels: str) -> dict[str, str]:
    """Return stored labels by name."""
    pairs = (part.partition("=") for part in labels.split(",") if part)
    return {name: value for name, _, value in pairs}


def bucket_name(limit: float) -> str:
    """Return a bucket's upper bound as it is stored and shown: `0.005`, `10.0`."""
    return str(float(limit))


_NOT_IN_A_VALUE = re.compile(r"[^A-Za-z0-9_.-]")


def _value(text: str) -> str:
    return _NOT_IN_A_VALUE.sub("_", text[:40]) or "unknown"


_own = threading.local()


def _shard() -> int:
    """Return this thread's shard. On PostgreSQL, a row keeps others waiting until the commit."""
    if not hasattr(_own, "shard"):
        _own.shard = random.randrange(SHARDS)  # noqa: S311 - spread, not a secret
    shard: int = _own.shard
    return shard


# --- What has no transaction --------------------------------------------------------------------

_noted: defaultdict[tuple[str, str], int] = defaultdict(int)
_noted_lock = threading.Lock()


def note_wake(source: str, outcome: str, amount: int = 1) -> None:
    """Note wakes that stored nothing: `refused`, `unauthorized`, `full` or `failed`. In memory."""
    with _noted_lock:
        _noted[door(source), outcome] += amount


def write_noted() -> None:
    """Write what was noted, in a transaction of its own. Raises DatabaseError; then it stays."""
    with _noted_lock:
        taken = dict(_noted)
        _noted.clear()
    if not taken:
        return
    counts = Counts()
    for (source, outcome), amount in taken.items():
        counts.wake(source, outcome, amount)
    try:
        with transaction.atomic():
            counts.write()
    except DatabaseError:
        for (source, outcome), amount in taken.items():
            note_wake(source, outcome, amount)
        raise


upkeep.register("counts", WRITE_NOTED_EVERY, lambda _: write_noted())
