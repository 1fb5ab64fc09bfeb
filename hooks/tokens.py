"""What is a hook token's own: the mappings that it opens. The rest is in `wake.tokens`."""

from __future__ import annotations

from collections.abc import Collection
from datetime import datetime, timedelta
from typing import Final

from django.db import transaction

from hooks.models import HookMapping, HookToken
from wake import tokens

PREFIX: Final = "och_"


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
    """Replace a hook token by one that opens the same; see `wake.tokens.rotate`."""

    def renew(old: HookToken) -> tuple[HookToken, str]:
        opened = list(old.mappings.all()) if old.limited else None
        return create(name, expires_at=expires_at, mappings=opened)

    return tokens.rotate(HookToken, name, keep_old=keep_old, now=now, renew=renew)
