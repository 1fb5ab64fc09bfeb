"""What goes of everything that is stored, and when: for `manage.py prune` and for the server."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Final

from django.db.models import QuerySet
from django.utils import timezone

from hooks.idempotency import KEPT_FOR
from hooks.models import FailedCredentials, HookDelivery, HookPolicy, IdempotencyKey
from hooks.throttling import WINDOW_SECONDS
from wake import pruning, upkeep
from wake.pruning import Kind, delete_in_batches, made_before

# How often a server process prunes.
EVERY: Final = timedelta(hours=1)

logger = logging.getLogger(__name__)


def kinds(now: datetime, days: int | None = None) -> Iterator[Kind]:
    """Yield what is to go of the hooks' rows, and then what `wake.pruning.kinds` yields.

    Deliveries and what is settled stay for `days`; without that number, as long as the policy and
    the gateway settings say. More deliveries than the policy allows go in any case.
    """
    yield Kind("deliveries", _deliveries(now, days))
    yield Kind("idempotency keys", IdempotencyKey.objects.filter(created_at__lte=now - KEPT_FOR))
    forgotten = now - timedelta(seconds=WINDOW_SECONDS)
    yield Kind("failed credentials", FailedCredentials.objects.filter(updated_at__lte=forgotten))
    yield from pruning.kinds(now, days)


def _deliveries(now: datetime, days: int | None) -> QuerySet[HookDelivery]:
    policy = HookPolicy.ensure()
    before = now - timedelta(days=days or policy.keep_deliveries_days)
    # Those of the future come from a clock that was wrong, and take nobody's place.
    present = HookDelivery.objects.filter(received_at__lte=now)
    newest = present.order_by("-received_at").values_list("received_at", flat=True)
    oldest_kept = newest[policy.keep_deliveries_count - 1 : policy.keep_deliveries_count].first()
    if oldest_kept is not None:
        before = max(before, oldest_kept)
    old = HookDelivery.objects.filter(received_at__lt=before)
    return made_before(old, "received_at", before, now)


def prune(stopped: threading.Event) -> None:
    """Delete all that is to go, until `stopped` is set. Raises DatabaseError."""
    for kind in kinds(timezone.now()):
        deleted = 0
        for count in delete_in_batches(kind, pause=stopped.wait):
            deleted += count
            if stopped.is_set():
                return
        if deleted:
            logger.info("pruned: %d %s", deleted, kind.name)


upkeep.register("prune", EVERY, prune)
