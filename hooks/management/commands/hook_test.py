"""`manage.py hook_test`: what would happen to a request, step by step. Nothing is stored.

Exit status: 0 when it would be answered with 2xx, 1 when not or when it cannot be told, 2 wrong
usage.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any, Final

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, connection
from django.utils import timezone

from hooks import configuration, trials
from hooks.configuration import HookConfiguration
from hooks.models import HookPolicy
from hooks.simulation import Simulation, Trial, simulate
from wake import configuration as wake_configuration
from wake.management.terminal import one_line, printable, show

STANDARD_INPUT: Final = "-"
MARKS: Final = {"good": "+", "bad": "!", "plain": " "}


class Command(BaseCommand):
    help = "Show what would happen to a hook, step by step. Nothing is stored."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        self._parser = parser
        parser.add_argument("path", metavar="PATH", help="below the base path: wake, github, …")
        parser.add_argument(
            "--payload",
            required=True,
            metavar="FILE",
            help="the file with the body as it is sent; - reads it from standard input",
        )
        parser.add_argument(
            "--header",
            action="append",
            default=[],
            metavar="NAME:VALUE",
            help="a header, for example X-GitHub-Event:push; may be given more than once",
        )
        parser.add_argument(
            "--query",
            action="append",
            default=[],
            type=_parameter,
            metavar="NAME=VALUE",
            help="a parameter of the URL; may be given more than once",
        )
        parser.add_argument("--json", action="store_true", help="print everything as JSON")

    def handle(
        self,
        *,
        path: str,
        payload: str,
        header: list[str],
        query: list[tuple[str, str]],
        json: bool,
        **_: Any,
    ) -> None:
        try:
            hooks, gateway = configuration.hooks(), wake_configuration.gateway()
        except DatabaseError as error:
            raise CommandError(one_line(_storage_problem(error))) from error
        try:
            trial = Trial(
                path=trials.hook_path(path, hooks.base_path),
                body=_body(payload, hooks),
                headers=trials.headers(header),
                query=dict(query),
            )
        except ValueError as error:
            self._parser.error(printable(str(error)))
        simulation = simulate(trial, hooks, gateway, now=timezone.now())
        show(self.stdout, _as_json(simulation) if json else _as_text(simulation, hooks))
        if simulation.answer.status >= 300:
            sys.exit(1)


def _parameter(argument: str) -> tuple[str, str]:
    name, equals, value = argument.partition("=")
    if not equals or not name:
        raise argparse.ArgumentTypeError(f"{argument!a} is no parameter; write NAME=VALUE")
    return name, value


def _body(file: str, hooks: HookConfiguration) -> bytes:
    """Return what is in the file, cut off one byte after what is allowed, as the door does it."""
    most = hooks.max_body_bytes + 1
    try:
        if file == STANDARD_INPUT:
            return sys.stdin.buffer.read(most)
        with Path(file).open("rb") as opened:
            return opened.read(most)
    except OSError as error:
        raise CommandError(one_line(f"{file}: {error.strerror}")) from error


def _storage_problem(error: DatabaseError) -> str:
    try:
        is_migrated = HookPolicy._meta.db_table in connection.introspection.table_names()
    except DatabaseError:
        is_migrated = True  # not known: it cannot be read at all
    if is_migrated:
        return f"database: {error}"
    return "the database has no tables yet; run manage.py migrate"


def _as_json(simulation: Simulation) -> list[str]:
    """Return the simulation as one line of JSON; the answer's body is JSON, a text or null."""
    answer = simulation.answer
    lines = [
        {"title": line.title, "detail": line.detail, "verdict": line.verdict}
        for line in simulation.lines
    ]
    body = answer.text or answer.body
    return [json.dumps({"status": answer.status, "body": body, "steps": lines}, default=str)]


def _as_text(simulation: Simulation, hooks: HookConfiguration) -> list[str]:
    """Return one line for each step, `+` where it is well and `!` where not, then the answer."""
    width = max(len(line.title) for line in simulation.lines)
    shown = []
    for line in simulation.lines:
        first, *rest = line.detail.splitlines() or [""]
        shown.append(f"{MARKS[line.verdict]} {line.title.ljust(width)}  {first}".rstrip())
        shown += [f"{' ' * (width + 4)}{more}".rstrip() for more in rest]
    return [*shown, "", *trials.in_http(simulation.answer, hooks).splitlines()]
