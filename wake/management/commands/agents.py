"""`manage.py agents`: list the agents, create and change one, list the presets."""

from __future__ import annotations

import argparse
import json
import re
import shlex
import shutil
from collections.abc import Iterable, Mapping, Sequence
from datetime import time, timedelta
from typing import Any, Final

from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, transaction
from django.utils import timezone

from wake import configuration
from wake.durations import format_duration, parse_duration
from wake.heartbeats.presets import PRESETS, Preset, find
from wake.models import RUNNERS_WITH_URL, Agent, GatewaySettings, IdleRuns, RunnerKind
from wake.redaction import without_credentials
from wake.session_states import unreached_reason
from wake.signing import new_signing_secret, signing_key
from wake.status import with_counts
from wake.targets import target

MAX_TARGET_CHARACTERS: Final = 60
WRONG_USAGE: Final = 2

# The options that are fields of the same name; what is not given is not there.
_FIELDS: Final[tuple[str, ...]] = (
    "name",
    "enabled",
    "paused",
    "heartbeat_every",
    "time_zone",
    "idle_runs",
    "heartbeat_prompt",
    "url",
    "model",
    "key_variable",
    "transcript_bytes",
    "signing_secret",
    "timeout_seconds",
    "max_attempts",
    "max_parallel_runs",
    "max_runs_per_minute",
    "max_self_wakes",
    "reply_url",
)

_ACTIVE = re.compile(r"(\d{1,2}):(\d\d)\s*-\s*(\d{1,2}):(\d\d)", re.ASCII)
_SIZE = re.compile(r"(\d{1,12})([km]?)", re.ASCII)
_SIZES: Final = {"": 1, "k": 1024, "m": 1024 * 1024}

_HEADINGS = ("ID", "DEFAULT", "STATE", "RUNNER", "TARGET", "EVERY", "QUEUED", "DUE", "DEAD")


class Command(BaseCommand):
    help = "List the agents (list, the default), create and change one (set), list the presets."
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
        presets = actions.add_parser("presets", help="list the commands of well-known programs")
        presets.add_argument(
            "--json", action="store_true", default=argparse.SUPPRESS, help="print JSON"
        )
        _add_changes(
            actions.add_parser(
                "set",
                help="create an agent, or change what is given",
                usage="manage.py agents set ID [options] [-- PROGRAM ARGS…]",
                epilog="-- PROGRAM ARGS… is the command of the command runner, or, with --preset, "
                "what is added to the preset's; no shell is involved.",
                argument_default=argparse.SUPPRESS,
            )
        )

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
            elif action == "presets":
                self._list_presets(as_json=options["json"])
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
        **options: Any,
    ) -> None:
        if program is not None and not program:
            raise CommandError("-- wants a program behind it", returncode=WRONG_USAGE)
        _require_text([id, *(program or []), *options.values()])
        changes = {name: options[name] for name in _FIELDS if name in options}
        if "active" in options:
            changes["active_from"], changes["active_until"] = options["active"]
        preset = find(options["preset"]) if "preset" in options else None
        if preset or program:
            changes["command"] = [*(preset.command if preset else ()), *(program or ())]
        with transaction.atomic():
            agent, is_new, secret = _save(id.strip().lower(), changes, options)
        self.stdout.write(
            f"agent {agent.pk} {'created' if is_new else 'changed'}: {_described(agent)}"
        )
        if options.get("default"):
            self.stdout.write(f"agent {agent.pk} is the default agent")
        if secret:
            self.stdout.write(f"signing secret (shown only this once): {secret}")
        if preset and not shutil.which(preset.program):
            self.stdout.write(
                f"{preset.program} is not installed here, or not on the PATH: {preset.install}"
            )

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

    # --- presets --------------------------------------------------------------------------------

    def _list_presets(self, *, as_json: bool) -> None:
        if as_json:
            listed = [_preset_as_json(preset) for preset in PRESETS]
            self.stdout.write(json.dumps(listed, indent=2, ensure_ascii=False))
        else:
            self.stdout.write("\n\n".join(_preset_in_words(preset) for preset in PRESETS))


def _save(
    agent_id: str, changes: Mapping[str, Any], options: Mapping[str, Any]
) -> tuple[Agent, bool, str | None]:
    """Store the changes; return the agent, whether it is new, and the secret that was made for it.

    Raises ValidationError, and CommandError for options that do not go together.
    """
    settings = GatewaySettings.ensure()
    known = Agent.objects.select_for_update().filter(pk=agent_id).first()
    agent = known or Agent(pk=agent_id)
    for name, value in changes.items():
        setattr(agent, name, value)
    agent.runner = _runner(agent.runner, changes, options)
    made = None
    if agent.needs_secret:
        agent.signing_secret = made = new_signing_secret()
    agent.full_clean(validate_unique=known is None)
    agent.save(force_insert=known is None)
    if options.get("default"):
        settings.default_agent = agent
        settings.full_clean()
        settings.save()
    return agent, known is None, made


def _runner(present: str, changes: Mapping[str, Any], options: Mapping[str, Any]) -> str:
    """Return the runner that the options ask for, or the present one.

    A program, a model and a URL imply a runner of their own, and go with no other.
    """
    chosen: str | None = options.get("runner")
    by_option = {
        "-- PROGRAM": (RunnerKind.COMMAND,) if "command" in changes else (),
        "--model": (RunnerKind.CHAT,) if changes.get("model") else (),
        "--url": RUNNERS_WITH_URL if changes.get("url") else (),
    }
    if "preset" in options:
        by_option = {"--preset": by_option.pop("-- PROGRAM"), **by_option}
    for option, kinds in by_option.items():
        runners = [kind.value for kind in kinds]
        if runners and chosen is None:
            chosen = present if present in runners else runners[0]
        elif runners and chosen not in runners:
            raise CommandError(
                f"{option} goes with --runner {' or '.join(runners)}, not with {chosen}",
                returncode=WRONG_USAGE,
            )
    return present if chosen is None else chosen


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


def _size(text: str) -> int:
    """Read a number of bytes, with `k` or `m` for 1024 and 1024² of them."""
    written = _SIZE.fullmatch(text.strip().lower())
    if not written:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a size; write for example 64k")
    return int(written[1]) * _SIZES[written[2]]


def _count(text: str) -> int | None:
    """Read a whole number; None for `off`."""
    if text.strip().lower() == "off":
        return None
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text[:40]!r} is not a number, nor off") from None


def _active_hours(text: str) -> tuple[time | None, time | None]:
    """Read `08:00-22:00`, where 24:00 is midnight; two None for `off`."""
    if text.strip().lower() == "off":
        return None, None
    written = _ACTIVE.fullmatch(text.strip())
    try:
        if not written:
            raise ValueError
        start, end = (int(written[1]), int(written[2])), (int(written[3]), int(written[4]))
        return time(*start), time(0) if end == (24, 0) else time(*end)
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text[:40]!r} are no hours; write for example 08:00-22:00, or off"
        ) from None


def _unless_off(text: str) -> str:
    return "" if text.strip().lower() == "off" else text


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


def _add_changes(parser: argparse.ArgumentParser) -> None:
    """Add what `set` takes."""
    parser.add_argument("id", metavar="ID")
    parser.add_argument("--name", help="what people call it")
    enabled = parser.add_mutually_exclusive_group()
    enabled.add_argument("--enable", dest="enabled", action="store_true")
    enabled.add_argument("--disable", dest="enabled", action="store_false", help="refuse its wakes")
    paused = parser.add_mutually_exclusive_group()
    paused.add_argument("--pause", dest="paused", action="store_true", help="let its events wait")
    paused.add_argument("--resume", dest="paused", action="store_false")
    parser.add_argument("--default", action="store_true", help="make it the default agent")

    reached = parser.add_argument_group("how it is reached")
    reached.add_argument(
        "--runner",
        choices=RunnerKind.values,
        help="a program, a preset, a URL or a model implies its own",
    )
    reached.add_argument(
        "--preset",
        choices=[preset.key for preset in PRESETS],
        help="the command of a well-known program; agents presets lists them",
    )
    reached.add_argument(
        "--url", help="where http posts, the gateway of openclaw, the base URL of chat"
    )
    reached.add_argument("--model", metavar="NAME", help="the model of chat")
    reached.add_argument(
        "--key-variable",
        type=_unless_off,
        metavar="NAME",
        help="the environment variable that holds the key of chat or the token of openclaw; or off",
    )
    reached.add_argument(
        "--transcript",
        dest="transcript_bytes",
        type=_size,
        metavar="SIZE",
        help="how much of a session's earlier turns chat sends along, as 64k",
    )
    reached.add_argument(
        "--reply-url", type=_unless_off, metavar="URL", help="where its replies are posted; or off"
    )
    reached.add_argument(
        "--secret",
        dest="signing_secret",
        type=_signing_secret,
        metavar="whsec_…",
        help="what signs what is posted; made and shown once where there is none",
    )

    heartbeats = parser.add_argument_group("heartbeats")
    heartbeats.add_argument(
        "--every",
        dest="heartbeat_every",
        type=_duration,
        metavar="DURATION",
        help="how often its main session has a heartbeat by itself, as 30m; or off",
    )
    heartbeats.add_argument(
        "--active",
        type=_active_hours,
        metavar="HOURS",
        help="when it has them, as 08:00-22:00, across midnight too; or off",
    )
    heartbeats.add_argument(
        "--time-zone", metavar="NAME", help="whose hours these are, as Europe/Berlin"
    )
    heartbeats.add_argument(
        "--idle-runs", choices=IdleRuns.values, help="whether there are any without events"
    )
    heartbeats.add_argument(
        "--prompt",
        dest="heartbeat_prompt",
        metavar="TEXT",
        help="what follows the events in every prompt",
    )
    heartbeats.add_argument(
        "--timeout",
        dest="timeout_seconds",
        type=_seconds,
        metavar="SECONDS",
        help="how long one may take: seconds, or a duration such as 10m",
    )

    limits = parser.add_argument_group("limits")
    limits.add_argument(
        "--max-attempts", type=int, metavar="N", help="attempts before dead letters"
    )
    for option, name, text in (
        ("--max-parallel", "max_parallel_runs", "runs at once; or off"),
        ("--max-per-minute", "max_runs_per_minute", "runs a minute in each session; or off"),
        (
            "--max-self-wakes",
            "max_self_wakes",
            "wakes of a session by its own runs in a row; or off",
        ),
    ):
        limits.add_argument(option, dest=name, type=_count, metavar="N", help=text)


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
        "model": agent.model,
        "keyVariable": agent.key_variable,
        "transcriptBytes": agent.transcript_bytes,
        "replyUrl": without_credentials(agent.reply_url) if agent.reply_url else "",
        "every": _every(agent),
        "active": _active(agent),
        "timeZone": agent.time_zone,
        "idleRuns": agent.idle_runs,
        "prompt": agent.heartbeat_prompt,
        "timeoutSeconds": agent.timeout_seconds,
        "maxAttempts": agent.max_attempts,
        "maxParallel": agent.max_parallel_runs,
        "maxPerMinute": agent.max_runs_per_minute,
        "maxSelfWakes": agent.max_self_wakes,
        "queued": agent.queued,
        "due": agent.due,
        "dead": agent.dead,
    }


def _state(agent: Agent) -> str:
    if not agent.enabled:
        return "disabled"
    if agent.paused:
        return "paused"
    return "unreached" if unreached_reason(agent.pk, configuration.gateway()) else "enabled"


def _target(agent: Agent) -> str:
    shown = target(agent)
    if len(shown) <= MAX_TARGET_CHARACTERS:
        return shown
    return shown[: MAX_TARGET_CHARACTERS - 1] + "…"


def _active(agent: Agent) -> str:
    if agent.active_from is None or agent.active_until is None:
        return "off"
    return f"{agent.active_from:%H:%M}-{agent.active_until:%H:%M}"


def _every(agent: Agent) -> str:
    return format_duration(agent.heartbeat_every) if agent.heartbeat_every else "off"


def _described(agent: Agent) -> str:
    runner = f"{agent.runner} {_target(agent)}".strip()
    words = [_state(agent), f"runner {runner}", f"every {_every(agent)}"]
    if agent.active_from is not None:
        words.append(f"active {_active(agent)} {agent.time_zone}")
    return ", ".join(words)


def _preset_as_json(preset: Preset) -> dict[str, Any]:
    return {
        "id": preset.key,
        "name": preset.title,
        "command": preset.command,
        "continues": preset.continues,
        "install": preset.install,
        "logIn": preset.log_in,
        "hint": preset.hint,
        "documentation": preset.documentation,
    }


def _preset_in_words(preset: Preset) -> str:
    conversation = "one conversation for each session"
    if not preset.continues:
        conversation = "a new conversation for each heartbeat"
    return "\n".join(
        (
            f"{preset.key}: {preset.title}, {conversation}",
            f"  command  {shlex.join(preset.command)}",
            f"  install  {preset.install}",
            f"  log in   {preset.log_in}",
            f"  more     {preset.hint}",
            f"           {preset.documentation}",
        )
    )


def _table(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(len(cell) for cell in column) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in rows
    )
    return "\n".join(lines)
