"""`manage.py import_openclaw FILE`: take over agents, hook policy and mappings of an OpenClaw."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any, Final

import json5
from django.core.exceptions import ValidationError
from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError, transaction
from django.db.models import Max, Min, Model
from django.utils import timezone

from hooks.models import AllowedSessionPrefix, HookMapping, HookPolicy, HookToken
from hooks.openclaw_import import (
    AgentStep,
    AllowedAgentsStep,
    DefaultAgentStep,
    Field,
    Line,
    MalformedConfiguration,
    MappingStep,
    Outcome,
    PrefixStep,
    SettingStep,
    Step,
    TokenStep,
    read,
)
from wake.models import Agent, GatewaySettings, RunnerKind
from wake.tokens import digest, is_usable

TOKEN_NAME: Final = "openclaw"  # noqa: S105 - what the row is called
# Stands for the token's first characters, of which a short one has none to spare.
TOKEN_HINT: Final = "(imported)"  # noqa: S105

_HEADINGS = ("WHAT", "OUTCOME", "WHY")
_POSITION = re.compile(r"<string>:(?P<line>\d+) (?P<fault>.*) at column (?P<column>\d+)")


class Command(BaseCommand):
    """Prints what became of each item. Exit status 1 with one line for a file that is none."""

    help = (
        "Take over agents, session scope, hook policy, token and mappings from an openclaw.json. "
        "A second run changes nothing."
    )
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("file", type=Path, metavar="FILE", help="an openclaw.json (JSON5)")
        parser.add_argument(
            "--dry-run", action="store_true", help="print the report, store nothing"
        )
        parser.add_argument("--json", action="store_true", help="print the report as JSON")

    def handle(self, *, file: Path, dry_run: bool, **options: Any) -> None:
        steps = _steps(file)
        try:
            with transaction.atomic():
                lines = _take_all(steps)
                # Done and undone, so that the report is that of the database and not a guess.
                transaction.set_rollback(dry_run)
        except DatabaseError as error:
            raise CommandError(
                f"cannot use the database (is it migrated?): {str(error).splitlines()[0]}"
            ) from error
        if options["json"]:
            self.stdout.write(_as_json(lines, dry_run=dry_run))
        else:
            self.stdout.write(_as_table(lines, dry_run=dry_run))


def _steps(file: Path) -> tuple[Step, ...]:
    """Return the steps that a file asks for. Raises CommandError when it cannot be read."""
    try:
        return read(json5.loads(file.read_text("utf-8-sig")), os.environ)
    except OSError as error:
        raise CommandError(f"{file}: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise CommandError(f"{file}: not UTF-8 at byte {error.start + 1}") from error
    except MalformedConfiguration as error:
        raise CommandError(f"{file}: {_shown(str(error))}") from error
    except RecursionError as error:
        raise CommandError(f"{file}: nested too deep") from error
    except ValueError as error:
        if position := _POSITION.match(str(error)):
            place = f"{file}:{position['line']}:{position['column']}"
            raise CommandError(f"{place}: {position['fault']}") from error
        raise CommandError(f"{file}: {str(error).splitlines()[0]}") from error


# --- The steps ------------------------------------------------------------------------------------


def _take_all(steps: Iterable[Step]) -> list[Line]:
    lines: list[Line] = []
    mappings: list[str] = []
    for step in steps:
        lines += _take(step)
        if isinstance(step, MappingStep):
            mappings.append(step.name)
    return lines + _move_behind(mappings)


def _take(step: Step) -> list[Line]:
    match step:
        case AgentStep():
            return _agent(step)
        case DefaultAgentStep():
            return [_default_agent(step)]
        case SettingStep():
            return [_setting(step)]
        case PrefixStep():
            return [_prefix(step)]
        case AllowedAgentsStep():
            return _allowed_agents(step)
        case TokenStep():
            return [_token(step)]
        case MappingStep():
            return [_mapping(step)]
        case Line():
            return [step]


def _agent(step: AgentStep) -> list[Line]:
    what = f"agent {step.id}"
    agent = Agent.objects.filter(pk=step.id).first() or Agent(pk=step.id)
    try:
        is_changed, refused = _store(agent, step.fields)
    except ValidationError as error:
        return [Line(what, Outcome.LEFT_OUT, _reasons(error))]
    refusals = [
        Line(f"{what}: {field.what}", Outcome.LEFT_OUT, refused[field.name])
        for field in step.fields
        if field.name in refused
    ]
    needs_runner = agent.runner == RunnerKind.NONE
    runner = f"set its runner: manage.py agents set {step.id} --runner …" if needs_runner else ""
    outcome = _outcome(is_changed, is_adapted=step.adapted)
    return [Line(what, outcome, _joined(step.why, runner)), *refusals]


def _default_agent(step: DefaultAgentStep) -> Line:
    what = f"default agent {step.id}"
    agent = Agent.objects.filter(pk=step.id).first()
    if agent is None:
        return Line(what, Outcome.LEFT_OUT, "no such agent")
    return _one_field(GatewaySettings.ensure(), Field(what, "default_agent", agent, step.why))


def _setting(step: SettingStep) -> Line:
    if step.needs_prefix and not AllowedSessionPrefix.objects.exists():
        why = "its list of prefixes could not be taken, and without one every key would do"
        return Line(step.field.what, Outcome.LEFT_OUT, why)
    row = GatewaySettings.ensure() if step.row == "gateway" else HookPolicy.ensure()
    return _one_field(row, step.field)


def _prefix(step: PrefixStep) -> Line:
    what = f"prefix {step.prefix}"
    if AllowedSessionPrefix.objects.filter(prefix__iexact=step.prefix).exists():
        return Line(what, Outcome.UNCHANGED)
    row = AllowedSessionPrefix(policy=HookPolicy.ensure(), prefix=step.prefix)
    return _one_field(row, Field(what, "prefix", step.prefix))


def _allowed_agents(step: AllowedAgentsStep) -> list[Line]:
    what = "hooks.allowedAgentIds"
    policy = HookPolicy.ensure()
    present = set(policy.allowed_agents.values_list("pk", flat=True))
    if step.ids is None:
        wanted, unknown = set[str](), list[str]()
    else:
        wanted = set(Agent.objects.filter(pk__in=step.ids).values_list("pk", flat=True))
        unknown = [agent_id for agent_id in step.ids if agent_id not in wanted]
    is_closed = step.ids is not None and not wanted
    why = step.why
    if is_closed:
        # None chosen would mean all of them.
        wanted = {GatewaySettings.ensure().default_agent_id}
        why = _joined(why, "none of the list is here, so hooks reach the default agent alone")
    policy.allowed_agents.set(Agent.objects.filter(pk__in=wanted))
    return [
        Line(what, _outcome(wanted != present, is_adapted=is_closed), why),
        *(Line(f"{what}: {agent_id}", Outcome.LEFT_OUT, "no such agent") for agent_id in unknown),
    ]


def _token(step: TokenStep) -> Line:
    what = "hooks.token"
    hashed = digest(step.token)
    by_digest = HookToken.objects.filter(digest=hashed).first()
    row = by_digest or HookToken.objects.filter(name=TOKEN_NAME).first()
    if row and not is_usable(row, timezone.now()):
        # What somebody revoked does not come back by itself.
        why = f'the token "{row.name}" is here and was revoked or has expired'
        return Line(what, Outcome.LEFT_OUT, why)
    if by_digest:
        return Line(what, Outcome.UNCHANGED, _joined(f'it is "{by_digest.name}" here', step.why))
    replaces = "the one before it no longer works" if row else ""
    fields = (Field(what, "digest", hashed), Field(what, "hint", TOKEN_HINT))
    _store(row or HookToken(name=TOKEN_NAME), fields)
    return Line(what, Outcome.TAKEN, _joined(f'it is "{TOKEN_NAME}" here', replaces, step.why))


def _mapping(step: MappingStep) -> Line:
    """Store a mapping as it is, disabled if it cannot work; leave it out if it cannot be stored."""
    what = f"mapping {step.name}"
    known = HookMapping.objects.filter(name=step.name).first()
    mapping = known or HookMapping(name=step.name)
    agent = Agent.objects.filter(pk=step.agent_id).first()
    values = {**step.values, "agent": agent}
    before = {name: getattr(mapping, name) for name in (*values, "enabled")}
    for name, value in values.items():
        setattr(mapping, name, value)
    try:
        mapping.clean_fields()
    except ValidationError as error:
        return Line(what, Outcome.LEFT_OUT, _reasons(error))
    fault = step.fault
    if step.transform and not mapping.transform:
        script = f"its transform ({step.transform}) is JavaScript, write it in Python"
        fault = _joined(fault, script)
    fault = fault or _fault(mapping)
    if fault:
        mapping.enabled = False
    changed = [name for name in before if getattr(mapping, name) != before[name]]
    if known is None:
        mapping.save(force_insert=True)
    elif changed:
        mapping.save(update_fields=changed)
    is_rerouted = bool(step.agent_id) and agent is None
    why = _joined(
        f"disabled: {fault}" if fault else "" if mapping.enabled else "it stays disabled",
        f"no agent {step.agent_id} is here: for the default agent" if is_rerouted else "",
        step.why,
    )
    is_adapted = step.adapted or is_rerouted or bool(fault)
    return Line(what, _outcome(known is None or bool(changed), is_adapted=is_adapted), why)


def _fault(mapping: HookMapping) -> str:
    """Return why a mapping cannot work; empty when it can."""
    try:
        mapping.full_clean()
    except ValidationError as error:
        return _reasons(error)
    return ""


def _move_behind(names: Collection[str]) -> list[Line]:
    """Move all other mappings behind those that came from the file; their own order stays."""
    imported = HookMapping.objects.filter(name__in=names)
    others = HookMapping.objects.exclude(name__in=names)
    last = imported.aggregate(last=Max("position"))["last"]
    first = others.aggregate(first=Min("position"))["first"]
    if last is None or first is None or first > last:
        return []
    for mapping in others:
        mapping.position += last + 1 - first
        # Saved one by one: the signal makes this process forget what it holds in memory.
        mapping.save(update_fields=["position"])
    return [Line("other mappings", Outcome.CHANGED, "they come behind those of the file")]


def _one_field(row: Model, field: Field) -> Line:
    """Set one field of a row, or leave it out where it is refused."""
    try:
        is_changed, refused = _store(row, [field])
    except ValidationError as error:
        return Line(field.what, Outcome.LEFT_OUT, _reasons(error))
    if refused:
        return Line(field.what, Outcome.LEFT_OUT, refused[field.name])
    return Line(field.what, _outcome(is_changed, is_adapted=field.adapted), field.why)


def _store(row: Model, fields: Sequence[Field]) -> tuple[bool, dict[str, str]]:
    """Set fields and save the row; return whether it changed, and what was refused, by its name.

    What is refused stays as it was. Raises ValidationError when the row cannot be stored even so.
    """
    is_new = row._state.adding
    before = {field.name: getattr(row, field.name) for field in fields}
    for field in fields:
        setattr(row, field.name, field.value)
    refused: dict[str, str] = {}
    try:
        row.full_clean()
    except ValidationError as error:
        refused = {
            name: " ".join(texts) for name, texts in error.message_dict.items() if name in before
        }
        for name in refused:
            setattr(row, name, before[name])
        try:
            row.full_clean()
        except ValidationError:
            raise error from None
    changed = [name for name in before if getattr(row, name) != before[name]]
    if is_new:
        row.save(force_insert=True)
    elif changed:
        row.save(update_fields=changed)
    return is_new or bool(changed), refused


def _outcome(is_changed: bool, *, is_adapted: bool) -> Outcome:
    if not is_changed:
        return Outcome.UNCHANGED
    return Outcome.CHANGED if is_adapted else Outcome.TAKEN


def _reasons(error: ValidationError) -> str:
    return "; ".join(
        " ".join(texts) if name == "__all__" else f"{name}: {' '.join(texts)}"
        for name, texts in error.message_dict.items()
    )


def _joined(*parts: str) -> str:
    return "; ".join(filter(None, parts))


# --- The report -----------------------------------------------------------------------------------


def _as_json(lines: Sequence[Line], *, dry_run: bool) -> str:
    report = {
        "dryRun": dry_run,
        "changed": _has_changes(lines),
        "items": [{"what": line.what, "outcome": line.outcome, "why": line.why} for line in lines],
    }
    return json.dumps(report, indent=2, ensure_ascii=False)


def _as_table(lines: Sequence[Line], *, dry_run: bool) -> str:
    rows = [_HEADINGS, *((_shown(line.what), line.outcome, _shown(line.why)) for line in lines)]
    what, outcome = (max(len(row[column]) for row in rows) for column in (0, 1))
    table = [f"{row[0]:{what}}  {row[1]:{outcome}}  {row[2]}".rstrip() for row in rows]
    counts = Counter(line.outcome for line in lines)
    table += ["", ", ".join(f"{counts[outcome]} {outcome}" for outcome in Outcome) + "."]
    if not _has_changes(lines):
        table.append("Nothing changed.")
    if dry_run:
        table.append("This was a dry run: nothing is stored.")
    return "\n".join(table)


def _has_changes(lines: Iterable[Line]) -> bool:
    return any(line.outcome in (Outcome.TAKEN, Outcome.CHANGED) for line in lines)


def _shown(text: str) -> str:
    """Return a text from the file fit for one line of a terminal."""
    printable = "".join(character if character.isprintable() else " " for character in text)
    return " ".join(printable.split())
