"""`manage.py agents`: list the agents, or create and change one."""

from __future__ import annotations

import argparse
import json
import shlex
from collections.abc import Iterable, Sequence
from datetime import timedelta
from typing import Any, Final

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, transaction
from django.utils import timezone

from wake.durations import format_duration, parse_duration
from wake.models import Agent, GatewaySettings, RunnerKind
from wake.redaction import without_credentials
from wake.signing import new_signing_secret, signing_key
from wake.status import with_counts

MAX_TARGET_CHARACTERS: Final = 60
WRONG_USAGE: Final = 2

_HEADINGS = ("ID", "DEFAULT", "STATE", "RUNNER", "TARGET", "EVERY", "QUEUED", "DUE", "DEAD")


class Command(BaseCommand):
    help = "List the agents (list, the default), or create and change one (set)."
    # What stands behind `--`. argparse would not do: its versions differ in what they make of `--`
    # behind a subcommand, and all of them give a second positional its share too early.
    stealth_options = ("program",)
    _program: Sequence[str] | None = None

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--json", action="store_true", help="print the list as JSON")
        actions = parser.add_subparsers(dest="action", metavar="ACTION")
        listing = actions.add_parser("list", help="list the agents")
        listing.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON"
        )
        change = actions.add_parser(
            "set",
            help="create an agent, or change what is given",
            usage="manage.py agents set ID [options] [-- PROGRAM ARGS…]",
            epilog="-- PROGRAM ARGS… is the command of the command runner; no shell is involved.",
        )
        change.add_argument("id", metavar="ID")
        change.add_argument("--name", help="what people call it")
        enabled = change.add_mutually_exclusive_group()
        enabled.add_argument("--enable", dest="enabled", action="store_true", default=None)
        enabled.add_argument(
            "--disable", dest="enabled", action="store_false", help="refuse its wakes"
        )
        paused = change.add_mutually_exclusive_group()
        paused.add_argument(
            "--pause", dest="paused", action="store_true", default=None, help="let its events wait"
        )
        paused.add_argument("--resume", dest="paused", action="store_false")
        change.add_argument(
            "--every",
            dest="heartbeat_every",
            type=_duration,
            metavar="DURATION",
            help="how often its main session has a heartbeat by itself, as 30m; or off",
        )
        change.add_argument(
            "--prompt",
            dest="heartbeat_prompt",
            metavar="TEXT",
            help="what follows the events in every prompt",
        )
        change.add_argument(
            "--runner",
            choices=RunnerKind.values,
            help="how it is reached; a program or a URL implies its own",
        )
        change.add_argument("--url", help="where the http runner posts")
        change.add_argument(
            "--secret",
            dest="signing_secret",
            type=_signing_secret,
            metavar="whsec_…",
            help="what signs the http runner's requests; made and shown once where there is none",
        )
        change.add_argument(
            "--timeout",
            dest="timeout_seconds",
            type=_seconds,
            metavar="SECONDS",
            help="how long one heartbeat may take: seconds, or a duration such as 10m",
        )
        change.add_argument(
            "--max-attempts", type=int, metavar="N", help="attempts before dead letters"
        )
        change.add_argument("--default", action="store_true", help="make it the default agent")

    def run_from_argv(self, argv: list[str]) -> None:
        if "--" in argv:
            place = argv.index("--")
            self._program = argv[place + 1 :]
            argv = argv[:place]
        super().run_from_argv(argv)

    def handle(self, *, action: str | None, **options: Any) -> None:
        program: Sequence[str] | None = options.pop("program", self._program)
        try:
            if action == "set":
                self._set(program=program, **options)
            elif program is not None:
                raise CommandError("-- PROGRAM goes with set", returncode=WRONG_USAGE)
            else:
                self._list(as_json=options["json"])
        except ValidationError as error:
            raise CommandError(_one_line(error)) from error
        except DatabaseError as error:
            raise CommandError(
                f"cannot use the database (is it migrated?): {str(error).splitlines()[0]}"
            ) from error

    # --- set ------------------------------------------------------------------------------------

    def _set(
        self,
        *,
        id: str,  # noqa: A002 - the name that requests use
        program: Sequence[str] | None,
        runner: str | None,
        default: bool,
        **options: Any,
    ) -> None:
        changes = {
            name: options[name]
            for name in (
                "name",
                "enabled",
                "paused",
                "heartbeat_every",
                "heartbeat_prompt",
                "url",
                "signing_secret",
                "timeout_seconds",
                "max_attempts",
            )
            if options[name] is not None
        }
        if program is not None:
            changes["command"] = list(program)
        runner = _runner(runner, program=program, url=options["url"])
        if runner is not None:
            changes["runner"] = runner
        _require_text([id, *(program or []), *(options[name] for name in options)])
        with transaction.atomic():
            agent, is_new, secret = _save(id.strip().lower(), changes, make_default=default)
        self.stdout.write(
            f"agent {agent.pk} {'created' if is_new else 'changed'}: {_described(agent)}"
        )
        if default:
            self.stdout.write(f"agent {agent.pk} is the default agent")
        if secret:
            self.stdout.write(f"signing secret (shown only this once): {secret}")

    # --- list -----------------------------------------------------------------------------------

    def _list(self, *, as_json: bool) -> None:
        default_agent = GatewaySettings.ensure().default_agent_id
        agents = with_counts(Agent.objects.order_by("pk"), timezone.now())
        if as_json:
            listed = [_as_json(agent, default_agent) for agent in agents]
            self.stdout.write(json.dumps(listed, indent=2, ensure_ascii=False))
        else:
            self.stdout.write(
                _table([_HEADINGS, *(_row(agent, default_agent) for agent in agents)])
            )


def _save(
    agent_id: str, changes: dict[str, Any], *, make_default: bool
) -> tuple[Agent, bool, str | None]:
    """Store the changes; return the agent, whether it is new, and the secret that was made for it.

    Raises ValidationError.
    """
    settings = GatewaySettings.ensure()
    known = Agent.objects.select_for_update().filter(pk=agent_id).first()
    agent = known or Agent(pk=agent_id)
    for name, value in changes.items():
        setattr(agent, name, value)
    made = None
    if agent.runner == RunnerKind.HTTP and not agent.signing_secret:
        agent.signing_secret = made = new_signing_secret()
    agent.full_clean(validate_unique=known is None)
    agent.save(force_insert=known is None)
    if make_default:
        settings.default_agent = agent
        settings.full_clean()
        settings.save()
    return agent, known is None, made


def _runner(chosen: str | None, *, program: Sequence[str] | None, url: str | None) -> str | None:
    """Return the runner that the options ask for; None leaves it as it is.

    A program or a URL is there for its own runner, and implies it.
    """
    if program is not None and not program:
        raise CommandError("-- wants a program behind it", returncode=WRONG_USAGE)
    implied = {
        RunnerKind.COMMAND.value: "-- PROGRAM" if program else None,
        RunnerKind.HTTP.value: "--url" if url else None,
    }
    runner = chosen
    for kind, option in implied.items():
        if option is None:
            continue
        if runner not in (None, kind):
            raise CommandError(
                f"{option} goes with --runner {kind}, not with {runner}", returncode=WRONG_USAGE
            )
        runner = kind
    return runner


def _require_text(values: Iterable[object]) -> None:
    """Refuse arguments that are not valid in the terminal's encoding: they cannot be stored."""
    for value in values:
        if isinstance(value, str):
            try:
                value.encode()
            except UnicodeEncodeError:
                raise CommandError(f"not valid UTF-8: {ascii(value)[:80]}") from None


def _duration(text: str) -> timedelta:
    try:
        return parse_duration(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error


def _seconds(text: str) -> int:
    """Read whole seconds, or a duration."""
    try:
        return int(text)
    except ValueError:
        return int(_duration(text).total_seconds())


def _signing_secret(text: str) -> str:
    try:
        signing_key(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from error
    return text


def _one_line(error: ValidationError) -> str:
    if not hasattr(error, "error_dict"):
        return " ".join(error.messages)
    return "; ".join(
        " ".join(messages) if field == "__all__" else f"{field}: {' '.join(messages)}"
        for field, messages in error.message_dict.items()
    )


# --- How an agent is shown --------------------------------------------------------------------


def _row(agent: Any, default_agent: str) -> tuple[str, ...]:
    return (
        agent.pk,
        "default" if agent.pk == default_agent else "",
        _state(agent),
        agent.runner,
        _target(agent),
        _every(agent),
        str(agent.queued),
        str(agent.due),
        str(agent.dead),
    )


def _as_json(agent: Any, default_agent: str) -> dict[str, Any]:
    return {
        "id": agent.pk,
        "name": agent.name,
        "default": agent.pk == default_agent,
        "state": _state(agent),
        "runner": agent.runner,
        "command": agent.command,
        "url": without_credentials(agent.url) if agent.url else "",
        "every": _every(agent),
        "prompt": agent.heartbeat_prompt,
        "timeoutSeconds": agent.timeout_seconds,
        "maxAttempts": agent.max_attempts,
        "queued": agent.queued,
        "due": agent.due,
        "dead": agent.dead,
    }


def _state(agent: Agent) -> str:
    if not agent.enabled:
        return "disabled"
    return "paused" if agent.paused else "enabled"


def _target(agent: Agent) -> str:
    target = ""
    if agent.runner == RunnerKind.COMMAND:
        target = shlex.join(agent.command)
    elif agent.runner == RunnerKind.HTTP:
        target = without_credentials(agent.url)
    target = " ".join(target.split())
    if len(target) <= MAX_TARGET_CHARACTERS:
        return target
    return target[: MAX_TARGET_CHARACTERS - 1] + "…"


def _every(agent: Agent) -> str:
    return format_duration(agent.heartbeat_every) if agent.heartbeat_every else "off"


def _described(agent: Agent) -> str:
    runner = f"{agent.runner} {_target(agent)}".strip()
    return f"{_state(agent)}, runner {runner}, every {_every(agent)}"


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)
