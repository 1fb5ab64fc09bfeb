"""What the commands `hook_tokens` and `gateway_tokens` share."""

from __future__ import annotations

import argparse
from datetime import UTC, datetime, timedelta
from typing import Any, ClassVar, Generic

from django.conf import settings
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, transaction
from django.db.models import QuerySet
from django.utils import timezone

from wake.durations import format_duration, parse_duration
from wake.management.terminal import one_line, printable, show, text
from wake.models import HashedToken
from wake.tokens import TokenModel, is_usable, revoke


class TokensCommand(BaseCommand, Generic[TokenModel]):
    """Prints a table or, once, a new token. Exit status 1 with one line when it cannot."""

    requires_system_checks = ()

    model: type[TokenModel]
    # The setting with one more token of this kind.
    environment_token: ClassVar[str]
    # What such a token does with what `opened` names, and the name of all of that.
    verb: ClassVar[str]
    everything: ClassVar[str]
    # Said when there is no `example`.
    no_example: ClassVar[str] = ""

    def add_what_it_opens(self, parser: argparse.ArgumentParser) -> None:
        """Add the options of `create` that say what a token opens."""
        raise NotImplementedError

    def rows(self) -> QuerySet[TokenModel]:
        """Return the tokens for the list, with all that `opened` reads."""
        return self.model._default_manager.all()

    def create_token(
        self, name: str, expires_at: datetime | None, options: dict[str, Any]
    ) -> tuple[TokenModel, str]:
        """Store a new token. Raises CommandError and ValidationError."""
        raise NotImplementedError

    def rotate_token(
        self, name: str, expires_at: datetime | None, *, keep_old: timedelta, now: datetime
    ) -> tuple[TokenModel, str]:
        """Replace a token. Raises model.DoesNotExist and ValidationError."""
        raise NotImplementedError

    def opened(self, row: TokenModel) -> str:
        """Return what a token opens, in a few words."""
        raise NotImplementedError

    def example(self, row: TokenModel, token: str) -> str:
        """Return a command line that tries a token; an empty one when no command can."""
        raise NotImplementedError

    def add_arguments(self, parser: CommandParser) -> None:
        actions = parser.add_subparsers(dest="action", title="actions")
        actions.add_parser("list", help="print all tokens (the default)")
        create = actions.add_parser("create", help="make a token and print it, once")
        _add_name(create)
        _add_expires(create)
        self.add_what_it_opens(create)
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
        end = actions.add_parser("revoke", help="make a token useless at once")
        _add_name(end)

    def handle(self, *args: Any, **options: Any) -> None:
        action = options["action"] or "list"
        name = options.get("name", "")
        now = timezone.now()
        try:
            if action == "list":
                self._list(now)
            elif action == "create":
                row, token = self.create_token(name, _expiry(options, now), options)
                self._show(f'{self._kind.capitalize()} "{name}"', row, token)
            elif action == "rotate":
                keep_old = options["keep_old"]
                row, token = self.rotate_token(
                    name, _expiry(options, now), keep_old=keep_old, now=now
                )
                old = f"works for {format_duration(keep_old)} more" if keep_old else "is revoked"
                self._show(f'New {self._kind} "{name}" (the old one {old})', row, token)
            else:
                self._revoke(name, now)
        except self.model.DoesNotExist as error:
            raise CommandError(one_line(f'no {self._kind} is called "{name}"')) from error
        except ValidationError as error:
            raise CommandError(one_line(_in_words(error))) from error
        except OverflowError as error:
            raise CommandError("the duration reaches past the end of the calendar") from error
        except DatabaseError as error:
            raise CommandError(one_line(f"database: {error} (manage.py migrate?)")) from error

    @property
    def _kind(self) -> str:
        return str(self.model._meta.verbose_name)

    def _list(self, now: datetime) -> None:
        rows = [
            (
                printable(row.name),
                printable(f"{row.hint}…"),
                _state(row, now),
                printable(self.opened(row)),
                _at(row.created_at),
                _at(row.expires_at, "never"),
                _at(row.last_used_at),
            )
            for row in self.rows()
        ]
        if getattr(settings, self.environment_token):
            environment = "from the environment"
            rows.append((self.environment_token, "", environment, self.everything, "", "never", ""))
        if not rows:
            command = f"manage.py {self._kind.replace(' ', '_')}s"
            self.stdout.write(f"No {self._kind}s. Make one: {command} create NAME")
            return
        opened = self.verb.upper()
        headings = ("NAME", "STARTS WITH", "STATE", opened, "CREATED", "EXPIRES", "LAST USED")
        table = [headings, *rows]
        widths = [max(len(row[column]) for row in table) for column in range(len(headings))]
        cells = (
            [cell.ljust(width) for cell, width in zip(row, widths, strict=True)] for row in table
        )
        show(self.stdout, ("  ".join(row).rstrip() for row in cells))

    def _show(self, what: str, row: TokenModel, token: str) -> None:
        opened = self.opened(row)
        limits = "" if opened == self.everything else f", {self.verb} {opened}"
        self.stdout.write(printable(f"{what}{limits}, shown only this once:"))
        self.stdout.write(f"\n  {token}\n\n")
        if example := self.example(row, token):
            self.stdout.write("Try it:\n")
            for line in example.split("\n"):
                self.stdout.write(printable(f"  {line}"))
        else:
            self.stdout.write(self.no_example)

    def _revoke(self, name: str, now: datetime) -> None:
        tokens = self.model._default_manager
        with transaction.atomic():
            row = tokens.select_for_update().get(name=name)
            revoked = revoke(tokens.filter(pk=row.pk), now)
        replaced = ", and with it what it replaced" if len(revoked) > 1 else ""
        what = f'{self._kind.capitalize()} "{name}"'
        self.stdout.write(printable(f"{what} is revoked{replaced}."))


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


def _state(row: HashedToken, now: datetime) -> str:
    if row.revoked_at is not None:
        return "revoked"
    return "valid" if is_usable(row, now) else "expired"


def _at(moment: datetime | None, missing: str = "-") -> str:
    return moment.astimezone(UTC).strftime("%Y-%m-%d %H:%M UTC") if moment else missing
