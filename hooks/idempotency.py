"""Idempotency keys: a request that comes twice is answered twice and stored once.

The key is remembered in the transaction that stores the request, under a primary key: of two that
race, in whatever processes, the second one waits for the first and gets its answer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from datetime import datetime, timedelta
from typing import Any, Final

from hooks.errors import PayloadError
from hooks.models import IdempotencyKey

KEPT_FOR: Final = timedelta(hours=24)

_FIELD: Final = "idempotencyKey"
# Headers that hold a key of the sender's choice, or the id that a provider gives a delivery and
# repeats when it sends that again. GitHub, Standard Webhooks.
_HEADERS: Final = ("idempotency-key", "x-openclaw-idempotency-key")
_PROVIDER_HEADERS: Final = ("x-github-delivery", "webhook-id")
# Providers whose id is in the payload: the header that tells them, the field, how it starts.
_PROVIDER_FIELDS: Final = (
    ("stripe-signature", "id", "evt_"),
    ("x-slack-signature", "event_id", "Ev"),
)
_ALL_HEADERS: Final = frozenset(
    (*_HEADERS, *_PROVIDER_HEADERS, *(header for header, *_ in _PROVIDER_FIELDS))
)
# Schemes whose signature covers an id. There it goes before all others, and headers that are not
# signed count for nothing: whoever catches a request could run it once for each key he makes up.
WITH_SIGNED_ID: Final = frozenset({"standard-webhooks", "stripe", "slack"})


def key_of(headers: Mapping[str, str], payload: Any, scheme: str = "") -> str | None:
    """Return a request's idempotency key, the sender's own before the provider's, or None.

    `headers` are by lower-case name; `scheme` is that of the signature which was the request's
    credential, if one was. Raises PayloadError for a field `idempotencyKey` that is neither text
    nor a number. Pure.
    """
    fields = payload if isinstance(payload, dict) else {}
    if _FIELD not in fields and headers.keys().isdisjoint(_ALL_HEADERS):
        return None  # as most have
    own = _written(fields.get(_FIELD))
    in_payload = [
        value
        for header, field, start in _PROVIDER_FIELDS
        if header in headers
        and isinstance(value := fields.get(field), str)
        and value.startswith(start)
    ]
    if scheme in WITH_SIGNED_ID:
        signed = [headers.get("webhook-id", "")] if scheme == "standard-webhooks" else in_payload
        candidates = [*signed, own]
    else:
        in_headers = [headers.get(name, "") for name in _HEADERS]
        provided = [headers.get(name, "") for name in _PROVIDER_HEADERS]
        candidates = [*in_headers, own, *provided, *in_payload]
    return next((stripped for key in candidates if (stripped := key.strip())), None)


def _written(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, bool) or not isinstance(value, str | int):
        raise PayloadError(f"{_FIELD} must be a string")
    return str(value)


def digest_of(credential_key: str, path: str, key: str) -> str:
    """Return what stands for a key at a credential and a path: hex SHA-256. Pure."""
    parts = (part.encode("utf-8", "surrogatepass") for part in (credential_key, path, key))
    return hashlib.sha256(b"".join(len(part).to_bytes(8) + part for part in parts)).hexdigest()


def claim(digest: str, now: datetime) -> dict[str, Any] | None:
    """Return the first answer to this key, or None: then this request is the first.

    Inside the transaction that stores the request; `keep` follows. One that holds the key and has
    not committed yet is waited for.
    """
    row = None
    while row is None:
        IdempotencyKey.objects.bulk_create(
            [IdempotencyKey(digest=digest, created_at=now)], ignore_conflicts=True
        )
        # None: it was there, too old to count, and was pruned in between.
        row = IdempotencyKey.objects.select_for_update().filter(digest=digest).first()
    if not _counts(row, now):
        IdempotencyKey.objects.filter(digest=digest).update(answer=None, created_at=now)
        return None
    answer: dict[str, Any] | None = row.answer
    return answer


def keep(digest: str, answer: dict[str, Any]) -> None:
    """Remember the answer to a key that was claimed in this transaction."""
    IdempotencyKey.objects.filter(digest=digest).update(answer=answer)


def find(digest: str, now: datetime) -> dict[str, Any] | None:
    """Return the first answer to this key, if there is one that still counts."""
    row = IdempotencyKey.objects.filter(digest=digest).first()
    return row.answer if row and _counts(row, now) else None


def _counts(row: IdempotencyKey, now: datetime) -> bool:
    # One from a day ahead comes from a clock that was wrong.
    return abs(now - row.created_at) < KEPT_FOR
