"""Bearer tokens: made here, kept as hashes only, replaced without a gap, revoked.

What is the same for every kind, and the gateway's own; `hooks.tokens` has the other kind.
"""

from __future__ import annotations

import hashlib
import logging
import secrets
from collections.abc import Callable, Collection, Sequence
from datetime import UTC, datetime, timedelta
from typing import Any, Final, TypeVar

from django.core.exceptions import ValidationError
from django.db import DatabaseError, transaction
from django.db.models import Q, QuerySet

from wake.models import GatewayToken, HashedToken, OperatorScope

TokenModel = TypeVar("TokenModel", bound=HashedToken)

logger = logging.getLogger(__name__)

GATEWAY_PREFIX: Final = "ocg_"
EVERY_SCOPE: Final = "every scope"

# A replaced token is called `NAME (until 2026-11-22T12:00:00.000Z)`: 100 characters at most.
REPLACED_MARK: Final = " (until "
REPLACED_NAME_LENGTH: Final = 67

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
    **fields: Any,
) -> tuple[TokenModel, str]:
    """Store a new token and return its row and the token itself, which nobody can read again.

    `fields` are those that only this kind has.
    Raises ValidationError: a name that is empty, too long or taken, or what is wrong with `fields`.
    """
    token = f"{prefix}{secrets.token_urlsafe(32)}"
    row = model(
        name=name,
        digest=digest(token),
        hint=token[: len(prefix) + _HINT_LENGTH][:16],
        expires_at=expires_at,
        **fields,
    )
    row.full_clean()
    row.save(force_insert=True)
    return row, token


def create_for_gateway(
    name: str,
    *,
    scopes: Sequence[str] = tuple(OperatorScope.values),
    agent_id: str | None = None,
    expires_at: datetime | None = None,
) -> tuple[GatewayToken, str]:
    """Store a new gateway token that holds `scopes`; see `create`.

    With an `agent_id` it is bound to that agent, and may hold no scope.
    """
    return create(
        GatewayToken,
        name,
        prefix=GATEWAY_PREFIX,
        expires_at=expires_at,
        scopes=list(scopes),
        agent_id=agent_id,
    )


def rotate(
    model: type[TokenModel],
    name: str,
    *,
    keep_old: timedelta,
    now: datetime,
    renew: Callable[[TokenModel], tuple[TokenModel, str]],
) -> tuple[TokenModel, str]:
    """Make a new token under `name`; the old one gets another name and works for `keep_old` more.

    `renew` takes the old one, renamed by then, and makes one that opens the same under the name
    that is free now. Zero revokes the old one at once; its own expiry is never put off.
    Raises model.DoesNotExist, or ValidationError when the old one is revoked.
    """
    with transaction.atomic():
        old = model._default_manager.select_for_update().get(name=name)
        if old.revoked_at is not None:
            raise ValidationError(f'token "{name}" is revoked; create one under another name')
        ends_at = min(old.expires_at or now + keep_old, now + keep_old)
        at = ends_at.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        old.name = f"{_name_when_replaced(name)}{at}Z)"
        old.expires_at = ends_at
        if ends_at <= now:
            old.revoked_at = now
        old.save(update_fields=["name", "expires_at", "revoked_at"])
        return renew(old)


def rotate_for_gateway(
    name: str, *, keep_old: timedelta, now: datetime, expires_at: datetime | None = None
) -> tuple[GatewayToken, str]:
    """Replace a gateway token by one with the same scopes and agent; see `rotate`."""

    def renew(old: GatewayToken) -> tuple[GatewayToken, str]:
        return create_for_gateway(
            name, scopes=old.scopes, agent_id=old.agent_id, expires_at=expires_at
        )

    return rotate(GatewayToken, name, keep_old=keep_old, now=now, renew=renew)


def held_in_words(token: GatewayToken) -> str:
    """Return what a gateway token opens, for a list: its scopes, and the agent it is bound to."""
    words = [scopes_in_words(token.scopes), f"agent {token.agent_id}" if token.agent_id else ""]
    return ", ".join(word for word in words if word)


def scopes_in_words(scopes: Collection[str]) -> str:
    """Return the scopes of a gateway token for a list: `read, write`, or `every scope`."""
    if set(OperatorScope.values) <= set(scopes):
        return EVERY_SCOPE
    return ", ".join(scope.removeprefix("operator.") for scope in scopes)


def revoke(chosen: QuerySet[TokenModel], now: datetime) -> list[TokenModel]:
    """Make tokens useless at once, and with them those that they replaced and that still work.

    Return all those that were not revoked before.
    """
    with transaction.atomic():
        # Locked: a rotation under way ends first, and its token goes by the new name.
        revoked = {token.pk: token for token in chosen.select_for_update()}
        names = tuple(_name_when_replaced(token.name) for token in revoked.values())
        working = chosen.model._default_manager.filter(revoked_at__isnull=True)
        replaced = working.filter(name__contains=REPLACED_MARK).exclude(expires_at__lte=now)
        for token in replaced:
            # Not asked of the database: to SQLite small and capital letters are the same.
            if token.name.startswith(names):
                revoked.setdefault(token.pk, token)
        fresh = [token for token in revoked.values() if token.revoked_at is None]
        for token in fresh:
            token.revoked_at = now
            # Saved one by one: the signal makes this process forget the token at once.
            token.save(update_fields=["revoked_at"])
    return fresh


def _name_when_replaced(name: str) -> str:
    """Return how the name of a token that `name` replaced begins."""
    return f"{name[:REPLACED_NAME_LENGTH]}{REPLACED_MARK}"


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
