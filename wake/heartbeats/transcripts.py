"""The transcript of a session: what its agent was given and what it said, as far as it is kept.

There is no second store of it: the heartbeats are the transcript, so a removed one is forgotten
and nothing can disagree with what the console shows.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

from django.db.models import F, Func, IntegerField
from django.db.models.sql.compiler import SQLCompiler

from wake.heartbeats.runners import Exchange
from wake.models import Heartbeat, HeartbeatStatus, RunnerKind

MAX_EXCHANGES: Final = 200
# A session whose schedule runs idle can have a hundred heartbeats between two exchanges; how far
# back they are looked for is bounded, so that reading takes no longer the older a session gets.
MAX_HEARTBEATS: Final = 1000

# Lengths are read before texts, and few at first, so that little is read where little fits.
_FIRST_LENGTHS = 25


class _OctetLength(Func):
    """How many bytes a text has in UTF-8."""

    function = "OCTET_LENGTH"
    output_field = IntegerField()

    def as_sqlite(self, compiler: SQLCompiler, connection: Any, **context: Any) -> Any:
        # It has a function of this name only since version 3.43.
        return self.as_sql(
            compiler, connection, template="LENGTH(CAST(%(expressions)s AS BLOB))", **context
        )


def read(session_id: int, max_bytes: int) -> tuple[Exchange, ...]:
    """Return the newest exchanges of a session with a chat server, the oldest of them first.

    As many as have at most `max_bytes` in UTF-8, prompts and replies together, and at most
    MAX_EXCHANGES of the last MAX_HEARTBEATS heartbeats; whole ones only, and none from before one
    that does not fit. Runs that failed are no part of it, nor those that had no event and heard
    that nothing needs attention, nor those without a reply: the model said nothing, and many
    servers refuse an empty message.
    """
    if max_bytes <= 0:
        return ()
    fitting: list[int] = []
    left = max_bytes
    for heartbeat_id, size in _sizes(session_id):
        left -= size
        if left < 0 or len(fitting) == MAX_EXCHANGES:
            break
        fitting.append(heartbeat_id)
    rows = Heartbeat.objects.filter(pk__in=fitting).order_by("pk").values_list("prompt", "reply")
    return tuple(Exchange(prompt, reply) for prompt, reply in rows if reply.strip())


def _sizes(session_id: int) -> Iterator[tuple[int, int]]:
    """Yield the id of each exchange and its size in bytes, the newest first."""
    heartbeats = Heartbeat.objects.filter(session_id=session_id).order_by("-pk")
    exchanges = (
        heartbeats.filter(
            runner=RunnerKind.CHAT,
            status__in=(HeartbeatStatus.DELIVERED, HeartbeatStatus.QUIET),
        )
        .exclude(status=HeartbeatStatus.QUIET, event_count=0)
        .exclude(reply="")
        .values_list("pk", _OctetLength(F("prompt")) + _OctetLength(F("reply")))
    )
    if oldest := heartbeats.values_list("pk", flat=True)[MAX_HEARTBEATS - 1 :].first():
        exchanges = exchanges.filter(pk__gte=oldest)
    at_once = _FIRST_LENGTHS
    while rows := list(exchanges[:at_once]):
        yield from rows
        if len(rows) < at_once:
            return
        exchanges = exchanges.filter(pk__lt=rows[-1][0])
        at_once *= 2
