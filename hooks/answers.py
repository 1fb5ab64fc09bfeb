"""What the HTTP door answers: receipts and refusals as values. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final

import msgspec

from hooks.decisions import Decision
from hooks.errors import (
    BodyTooLarge,
    NotAuthorized,
    TooManyFailures,
    TransformFailed,
    UnknownHook,
)
from hooks.models import DeliveryOutcome
from wake.dispatch import Receipt
from wake.errors import QueueFull, Refused, StorageUnavailable, WakeError

_STATUSES: Final[Mapping[type[WakeError], int]] = {
    Refused: 400,
    NotAuthorized: 401,
    UnknownHook: 404,
    BodyTooLarge: 413,
    QueueFull: 429,
    TooManyFailures: 429,
    TransformFailed: 500,
    StorageUnavailable: 503,
}

REPLAYED: Final = DeliveryOutcome.REPLAYED.value


class Answer(msgspec.Struct, frozen=True):
    """An answer to a hook: JSON in `body`, else plain `text`; with neither it is empty (204)."""

    status: int
    outcome: DeliveryOutcome
    body: Mapping[str, Any] | None = None
    text: str = ""
    retry_after_seconds: int | None = None

    @property
    def error(self) -> str:
        """What went wrong; empty where nothing did."""
        return str((self.body or {}).get("error", ""))


def of_receipts(decision: Decision, receipts: Sequence[Receipt]) -> Answer:
    """Return the answer to wakes that are stored: one receipt, or a list where there may be more.

    A turn's receipt is its run id.
    """
    outcome, bodies = DeliveryOutcome.COALESCED, []
    for wake, receipt in zip(decision.wakes, receipts, strict=True):
        if receipt.event_outcome == "queued":
            outcome = DeliveryOutcome.QUEUED
        bodies.append(
            receipt.as_json() if wake.turn is None else {"ok": True, "runId": str(receipt.event_id)}
        )
    body = {"ok": True, "results": bodies} if decision.several else bodies[0]
    return Answer(200, outcome, body)


def of_replay(first: Mapping[str, Any]) -> Answer:
    """Return the first answer to an idempotency key as it is given again."""
    body = {**first, "eventOutcome": REPLAYED}
    if "results" in body:
        body["results"] = [{**result, "eventOutcome": REPLAYED} for result in body["results"]]
    return Answer(200, DeliveryOutcome.REPLAYED, body)


def of_nothing(decision: Decision) -> Answer:
    """Return the answer where nothing is to be stored: a sender's challenge, or 204."""
    if decision.challenge is not None:
        return Answer(200, DeliveryOutcome.ANSWERED, text=decision.challenge)
    return Answer(204, DeliveryOutcome.IGNORED)


def of_error(error: WakeError) -> Answer:
    """Return the answer to an error; its text is meant for the sender."""
    status = next(code for kind, code in _STATUSES.items() if isinstance(error, kind))
    return Answer(
        status,
        DeliveryOutcome.FAILED if status >= 500 else DeliveryOutcome.REFUSED,
        {"ok": False, "error": str(error)},
        retry_after_seconds=getattr(error, "retry_after_seconds", None),
    )
