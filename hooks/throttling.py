"""Throttling of wrong credentials: a client may show 20 of them within 60 seconds.

They are counted in the database, so that all processes count together and a restart forgets
nothing. Only what has failed is counted: a right credential is served however many were wrong
before it, and clears the count.
"""

from __future__ import annotations

import ipaddress
import logging
import math
from collections.abc import Iterable, Mapping
from datetime import datetime, timedelta
from functools import lru_cache
from typing import Any, Final

from django.db import DatabaseError, transaction

from hooks.models import FailedCredentials
from wake import columns

logger = logging.getLogger(__name__)

FAILURES: Final = 20
WINDOW_SECONDS: Final = 60
MAX_CLIENT_LENGTH: Final = 64


def client_of(meta: Mapping[str, Any]) -> str:
    """Return the address that a request came from, or `unknown`; at most 64 characters.

    The server has put the one that a trusted proxy reports in its place (TRUSTED_PROXIES).
    Headers are not read here: anybody can write them.
    """
    return str(meta.get("REMOTE_ADDR") or "unknown")[:MAX_CLIENT_LENGTH]


@lru_cache(maxsize=1024)
def throttled_as(client: str) -> str:
    """Return what is counted for a client: an IPv4 address, or a network of IPv6, a /64.

    Whoever has one address of such a network usually has all of them. What is no address is
    counted as it is.
    """
    try:
        address = ipaddress.ip_address(client)
    except ValueError:
        return client
    if isinstance(address, ipaddress.IPv4Address):
        return str(address)
    if address.ipv4_mapped:
        return str(address.ipv4_mapped)
    return str(ipaddress.IPv6Network((address.packed, 64), strict=False))


def count(failed_at: Iterable[float], now: float) -> tuple[list[float], int | None]:
    """Return the failures to remember after one at `now`, and how long the client must wait.

    Times are seconds since the epoch, at most 20 and in order. None means that this one was
    counted. At the limit it is not, and the wait is the whole seconds, 1 to 60, until one will
    be again. A time in the future is that of a clock that was set back: it counts as now, so that
    nobody waits for the clock to come back.
    """
    recent = sorted(min(time, now) for time in failed_at if now - time < WINDOW_SECONDS)
    if len(recent) < FAILURES:
        return [*recent, now], None
    return recent, max(1, math.ceil(WINDOW_SECONDS - (now - recent[0])))


def note_failure(client: str, now: datetime) -> int | None:
    """Count one wrong credential of a client. Return None when it may be answered with 401.

    Over the limit it is not counted, nothing is written, and the answer is how many seconds the
    client is to wait (429). A database that cannot count now is no reason to answer otherwise.
    """
    counted_as = throttled_as(client)
    try:
        return _note_failure(counted_as, now)
    except DatabaseError as error:
        logger.warning("a wrong credential from %s is not counted: %s", counted_as, error)
        return None


def _note_failure(counted_as: str, now: datetime) -> int | None:
    at = now.timestamp()
    # Looked at without a lock first: on SQLite every transaction takes the write lock, and a
    # flood must not keep others from writing.
    seen = FailedCredentials.objects.filter(pk=counted_as).first()
    if seen:
        failed_at, wait = count(seen.failed_at, at)
        if failed_at == seen.failed_at:
            return wait
    with transaction.atomic():
        # Makes the row or locks it in one statement: others may delete it at any moment.
        FailedCredentials.objects.bulk_create(
            [FailedCredentials(client=counted_as, updated_at=now)],
            update_conflicts=True,
            unique_fields=["client"],
            update_fields=["updated_at"],
        )
        row = FailedCredentials.objects.get(pk=counted_as)
        row.failed_at, wait = count(row.failed_at, at)
        row.save(update_fields=["failed_at"])
    if len(row.failed_at) == 1:
        # So the table holds about as many rows as clients fail in a minute. Not in the transaction
        # above: two that wait for each other's row would never end.
        prune(now)
    return wait


def clear(clients: Iterable[str]) -> None:
    """Forget the wrong credentials of clients that have shown a right one: one DELETE."""
    counted_as = {throttled_as(client) for client in clients}
    if counted_as:
        # Django's own delete looks first for what else is to go; this is part of every hook.
        columns.delete(FailedCredentials._meta.db_table, "client", sorted(counted_as))


def prune(now: datetime) -> int:
    """Delete what no longer decides anything, and return how many rows that were."""
    oldest = now - timedelta(seconds=WINDOW_SECONDS)
    return FailedCredentials.objects.filter(updated_at__lte=oldest).delete()[0]
