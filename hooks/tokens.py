"""The life of hook tokens: made, replaced while the old one still works for a while, revoked."""

from __future__ import annotations

from collections.abc import Collection
from datetime import UTC, datetime, timedelta
from typing import Final

from django.core.exceptions import ValidationError
from django.db import transaction
from django.db.models import Q

from hooks.models import HookMapping, HookToken
from wake import tokens

PREFIX: Final = "och_"

# A replaced token is called `NAME (until 2026-11-22T12:00:00.000Z)`: 100 characters at most.
REPLACED_MARK: Final = " (until "
REPLACED_NAME_LENGTH: Final = 67


def create(
    name: str,
    *,
    expires_at: datetime | None = None,
    mappings: Collection[HookMapping] | None = None,
) -> tuple[HookToken, str]:
    """Store a new token and return its row and the token itself, which nobody can read again.

    It opens these mappings and nothing else; with None every hook.
    Raises ValidationError: a name that is empty, too long or taken.
    """
    with transaction.atomic():
        row, token = tokens.create(HookToken, name, prefix=PREFIX, expires_at=expires_at)
        if mappings is not None:
            row.limited = True
            row.save(update_fields=["limited"])
            row.mappings.set(mappings)
    return row, token


def rotate(
    name: str, *, keep_old: timedelta, now: datetime, expires_at: datetime | None = None
) -> tuple[HookToken, str]:
    """Make a new token under `name`; the old one gets another name and works for `keep_old` more.

    Both open the same. Zero revokes the old one at once; its own expiry is never put off.
    Raises HookToken.DoesNotExist, or ValidationError when the old one is revoked.
    """
    with transaction.atomic():
        old = HookToken.objects.select_for_update().get(name=name)
        if old.revoked_at is not None:
            raise ValidationError(f'token "{name}" is revoked; create one under another name')
        ends_at = min(old.expires_at or now + keep_old, now + keep_old)
        at = ends_at.astimezone(UTC).isoformat(timespec="milliseconds").removesuffix("+00:00")
        old.name = f"{name[:REPLACED_NAME_LENGTH]}{REPLACED_MARK}{at}Z)"
        old.expires_at = ends_at
        if ends_at <= now:
            old.revoked_at = now
        old.save()
        opened = list(old.mappings.all()) if old.limited else None
        return create(name, expires_at=expires_at, mappings=opened)


def revoke(name: str, *, now: datetime) -> int:
    """Make a token useless at once, and with it those that it replaced and that still worked.

    Return how many were valid until now. Raises HookToken.DoesNotExist.
    """
    HookToken.objects.get(name=name)
    replaced = Q(name__startswith=f"{name[:REPLACED_NAME_LENGTH]}{REPLACED_MARK}")
    valid = HookToken.objects.filter(Q(name=name) | replaced).exclude(expires_at__lte=now)
    return len(tokens.revoke(valid, now))
