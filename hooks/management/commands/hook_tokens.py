"""`manage.py hook_tokens`: list, create, rotate and revoke the tokens that hooks are sent with."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime, timedelta
from typing import Any

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError
from django.utils import timezone

from hooks import curl, tokens
from hooks.configuration import ENVIRONMENT_TOKEN
from hooks.models import HookMapping, HookPolicy, HookToken
from wake.durations import format_duration, parse_duration
from wake.management.terminal import one_line, printable, show, text
from wake.tokens import is_usable

_COLUMNS = ("NAME", "STARTS WITH", "STATE", "OPENS", "CREATED", "EXPIRES", "LAST USED")
_EVERY_HOOK = "every hook"


class Command(BaseCommand):
    """Prints a table or, once, a new token. Exit status 1 with one line when it cannot."""

    help = "List the hook tokens, or create, rotate or revoke one."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", title="actions")
        actions.add_parser("list", help="print all tokens (the default)")
        create = actions.add_parser("create", help="make a token and print it, once")
        _add_name(create)
        _add_expires(create)
        create.add_argument(
            "--mapping",
            type=text,
            action="append",
            dest="mappings",
            metavar="NAME",
            help="the token opens this mapping and no other hook; may be given more than once",
        )
        rotate = actions.add_parser("rotate", help="replace a token; the old one works on a while")
        _add_name(rotate)
        _add_expires(rotate)
        rotate.add_argument(
            "--keep-old",
            type=_duration,
            default=timedelta(hours=24),
            metavar="DURATION",
            help="how long the old token still works: 24h (default), 15m, 0",
        )
        revoke = actions.add_parser("revoke", help="make a token useless at once")
        _add_name(revoke)

    def handle(self, *args: Any, **options: Any) -> None:
        action = options["action"] or "list"
        name = options.get("name", "")
        now = timezone.now()
        try:
            if action == "list":
                self._list(now)
            elif action == "create":
                mappings = _mappings(options["mappings"])
                row, token = tokens.create(
                    name, expires_at=_expiry(options, now), mappings=mappings
                )
                self._show(f'Hook token "{name}"', row, token)
            elif action == "rotate":
                keep_old = options["keep_old"]
                row, token = tokens.rotate(
                    name, keep_old=keep_old, now=now, expires_at=_expiry(options, now)
                )
                old = f"works for {format_duration(keep_old)} more" if keep_old else "is revoked"
                self._show(f'New hook token "{name}" (the old one {old})', row, token)
            else:
                count = tokens.revoke(name, now=now)
                replaced = ", and with it what it replaced" if count > 1 else ""
                self.stdout.write(printable(f'Hook token "{name}" is revoked{replaced}.'))
        except HookToken.DoesNotExist as error:
            raise CommandError(one_line(f'no hook token is called "{name}"')) from error
        except ValidationError as error:
            raise CommandError(one_line(_in_words(error))) from error
        except OverflowError as error:
            raise CommandError("the duration reaches past the end of the calendar") from error
        except DatabaseError as error:
            raise CommandError(one_line(f"database: {error} (manage.py migrate?)")) from error

    def _list(self, now: datetime) -> None:
        rows = [
            (
                printable(token.name),
                printable(f"{token.hint}…"),
                _state(token, now),
                printable(_opened(token)),
                _at(token.created_at),
                _at(token.expires_at, "never"),
                _at(token.last_used_at),
            )
            for token in HookToken.objects.prefetch_related("mappings")
        ]
        if settings.OPENCLAW_HOOKS_TOKEN:
            rows.append(
                (ENVIRONMENT_TOKEN, "", "from the environment", _EVERY_HOOK, "", "never", "")
            )
        if not rows:
            self.stdout.write("No hook tokens. Make one: manage.py hook_tokens create NAME")
            return
        table = [_COLUMNS, *rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(_COLUMNS))]
        cells = (
            [cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table
        )
        show(self.stdout, ("  ".join(row).rstrip() for row in cells))

    def _show(self, what: str, row: HookToken, token: str) -> None:
        address = f"http://127.0.0.1:8000{HookPolicy.ensure().base_path}"
        opens = f", opens {_opened(row)}" if row.limited else ""
        self.stdout.write(printable(f"{what}{opens}, shown only this once:"))
        self.stdout.write(f"\n  {token}\n\nTry it:\n")
        for line in curl.for_token(row, token, address).split("\n"):
            self.stdout.write(printable(f"  {line}"))


def _add_name(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("name", type=text, metavar="NAME", help="what the token is called")


def _add_expires(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--expires",
        type=_duration,
        default=timedelta(0),
        metavar="DURATION",
        help="how long the new token works: 90d, 24h, 0 for ever (default)",
    )


def _in_words(error: ValidationError) -> str:
    if not hasattr(error, "error_dict"):
        return " ".join(error.messages)
    return "; ".join(f"{name}: {' '.join(texts)}" for name, texts in error.message_dict.items())


def _duration(text: str) -> timedelta:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _expiry(options: dict[str, Any], now: datetime) -> datetime | None:
    return now + options["expires"] if options["expires"] else None


def _mappings(names: list[str] | None) -> list[HookMapping] | None:
    """Return the mappings called so. Raises CommandError for a name that none has."""
    if names is None:
        return None
    found = HookMapping.objects.in_bulk(names, field_name="name")
    for name in names:
        if name not in found:
            raise CommandError(one_line(f'no hook mapping is called "{name}"'))
    return list(found.values())


def _opened(token: HookToken) -> str:
    if not token.limited:
        return _EVERY_HOOK
    return ", ".join(mapping.name for mapping in token.mappings.all()) or "nothing"


def _state(token: HookToken, now: datetime) -> str:
    if token.revoked_at is not None:
        return "revoked"
    return "valid" if is_usable(token, now) else "expired"


def _at(moment: datetime | None, missing: str = "-") -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if moment else missing
