"""Bearer tokens: made here, kept as hashes only, compared in constant time."""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Iterable
from datetime import datetime, timedelta
from typing import Final, TypeVar

from django.db import DatabaseError, transaction
from django.db.models import Q

from wake.models import HashedToken

TokenModel = TypeVar("TokenModel", bound=HashedToken)

logger = logging.getLogger(__name__)

USE_NOTED_EVERY: Final = timedelta(minutes=1)

_HINT_LENGTH = 8


def digest(token: str) -> str:
    """Return the hash under which a token is kept: hex SHA-256.

    A plain hash is enough, because a token is 256 random bits and not a password.
    """
    return hashlib.sha256(token.encode("utf-8", "surrogatepass")).hexdigest()


def create(
    model: type[TokenModel],
    name: str,
    *,
    prefix: str,
    expires_at: datetime | None = None,
) -> tuple[TokenModel, str]:
    """Store a new token and return its row and the token itself, which nobody can read again."""
    token = f"{prefix}{secrets.token_urlsafe(32)}"
    row = model(
        name=name,
        digest=digest(token),
        hint=token[: len(prefix) + _HINT_LENGTH][:16],
        expires_at=expires_at,
    )
    row.full_clean()
    row.save(force_insert=True)
    return row, token


def revoke(tokens: Iterable[HashedToken], now: datetime) -> list[HashedToken]:
    """Make tokens useless at once and return those that were not revoked before."""
    revoked = [token for token in tokens if token.revoked_at is None]
    for token in revoked:
        token.revoked_at = now
        # Saved one by one: the signal makes this process forget the token at once.
        token.save(update_fields=["revoked_at"])
    return revoked


def is_usable(token: HashedToken, now: datetime) -> bool:
    """Whether the token is neither revoked nor expired."""
    return token.revoked_at is None and (token.expires_at is None or token.expires_at > now)


def note_use(model: type[HashedToken], pk: int, now: datetime) -> None:
    """Store when a token was used, to the minute. Failing to do so is no reason to refuse it."""
    # Another process may have noted it within this minute.
    outdated = Q(last_used_at__isnull=True) | Q(last_used_at__lte=now - USE_NOTED_EVERY)
    try:
        with transaction.atomic():
            model._default_manager.filter(outdated, pk=pk).update(last_used_at=now)
    except DatabaseError as error:
        kind = model._meta.verbose_name
        logger.warning("the use of %s %d is not noted: %s", kind, pk, error)
