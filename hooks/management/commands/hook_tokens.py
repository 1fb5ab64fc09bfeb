"""`manage.py hook_tokens`: list, create, rotate and revoke the tokens that hooks are sent with."""

from __future__ import annotations

import argparse
from datetime import datetime, timedelta
from typing import Any

from django.core.management.base import CommandError
from django.db.models import QuerySet

from hooks import curl, tokens
from hooks.configuration import ENVIRONMENT_TOKEN
from hooks.models import HookMapping, HookPolicy, HookToken
from wake.management.terminal import one_line, text
from wake.management.tokens import TokensCommand


class Command(TokensCommand[HookToken]):
    help = "List the hook tokens, or create, rotate or revoke one."
    model = HookToken
    environment_token = ENVIRONMENT_TOKEN
    verb = "opens"
    everything = "every hook"

    def add_what_it_opens(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--mapping",
            type=text,
            action="append",
            dest="mappings",
            metavar="NAME",
            help="the token opens this mapping and no other hook; may be given more than once",
        )

    def rows(self) -> QuerySet[HookToken]:
        return HookToken.objects.prefetch_related("mappings")

    def create_token(
        self, name: str, expires_at: datetime | None, options: dict[str, Any]
    ) -> tuple[HookToken, str]:
        mappings = _mappings(options["mappings"])
        return tokens.create(name, expires_at=expires_at, mappings=mappings)

    def rotate_token(
        self, name: str, expires_at: datetime | None, *, keep_old: timedelta, now: datetime
    ) -> tuple[HookToken, str]:
        return tokens.rotate(name, keep_old=keep_old, now=now, expires_at=expires_at)

    def opened(self, row: HookToken) -> str:
        if not row.limited:
            return self.everything
        return ", ".join(mapping.name for mapping in row.mappings.all()) or "nothing"

    def example(self, row: HookToken, token: str) -> str:
        address = f"http://127.0.0.1:8000{HookPolicy.ensure().base_path}"
        return curl.for_token(row, token, address)


def _mappings(names: list[str] | None) -> list[HookMapping] | None:
    """Return the mappings called so. Raises CommandError for a name that none has."""
    if names is None:
        return None
    found = HookMapping.objects.in_bulk(names, field_name="name")
    for name in names:
        if name not in found:
            raise CommandError(one_line(f'no hook mapping is called "{name}"'))
    return list(found.values())
