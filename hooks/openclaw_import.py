"""What an `openclaw.json` asks of this gateway: the parsed file in, steps to take out. Pure.

The file is the configuration of OpenClaw (https://docs.openclaw.ai/gateway/configuration), of
which `hooks`, `agents` and `session` concern this gateway. Each step is one line of the report:
what to store, or a `Line` for what cannot come along. `manage.py import_openclaw` takes the steps.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from datetime import time, timedelta
from enum import StrEnum
from itertools import count
from typing import Any, Final, Literal, TypeAlias

from django.core.exceptions import ValidationError

from hooks import presets
from hooks.models import BODY_BYTES, ENDPOINTS, LONGEST_TURN_SECONDS, HookMapping
from wake.models import GatewaySettings, validate_time_zone
from wake.session_keys import AGENT_ID_PATTERN

SHORT_TOKEN_CHARACTERS: Final = 16

# Who OpenClaw's one agent is where the file lists none.
_ONLY_AGENT = "main"

_VARIABLE = re.compile(r"(?P<escaped>\$?)\$\{(?P<name>[A-Z_][A-Z0-9_]*)\}")
_DURATION_PART = re.compile(r"(?P<count>\d+(?:\.\d+)?)(?P<unit>ms|s|m|h|d)", re.ASCII)
_DURATION_UNITS: Final = {
    "ms": timedelta(milliseconds=1),
    "s": timedelta(seconds=1),
    "m": timedelta(minutes=1),
    "h": timedelta(hours=1),
    "d": timedelta(days=1),
}

_TIME_OF_DAY = re.compile(r"([01]\d|2[0-3]):([0-5]\d)", re.ASCII)
_MIDNIGHT = "24:00"

_NO_SUCH_SETTING = "this gateway has no such setting"
_NOT_A_CHAT = "this gateway delivers to sessions, not to chats"
_AGENTS_OWN = "the agent's own affair, not the gateway's"
_INCLUDED = "included files are not read: copy what they hold into this one"

_HOOKS_REASONS: Final = {
    "$include": _INCLUDED,
    "gmail": "the Gmail watcher is a part of OpenClaw: let it post to this gateway instead",
    "internal": "hooks inside OpenClaw, which have nothing to do with HTTP",
    "transformsDir": "transforms are Python functions here, named by HOOK_TRANSFORMS",
}
_MAPPING_REASONS: Final = {
    "$include": _INCLUDED,
    "channel": _NOT_A_CHAT,
    "to": _NOT_A_CHAT,
    "model": _AGENTS_OWN,
    "fallbacks": _AGENTS_OWN,
    "thinking": _AGENTS_OWN,
    "sessionMode": "what a session remembers is its agent's own affair",
    "allowUnsafeExternalContent": "a hook's text is always marked as coming from outside",
    "textTemplate": "only the action wake uses it",
    "messageTemplate": "only the action agent uses it",
}
_HEARTBEAT_REASONS: Final = {
    "target": _NOT_A_CHAT,
    "to": _NOT_A_CHAT,
    "accountId": _NOT_A_CHAT,
    "directPolicy": _NOT_A_CHAT,
    "includeReasoning": _NOT_A_CHAT,
    "suppressToolErrorWarnings": _NOT_A_CHAT,
    "model": _AGENTS_OWN,
    "lightContext": _AGENTS_OWN,
    "isolatedSession": _AGENTS_OWN,
    "includeSystemPromptSection": _AGENTS_OWN,
    "session": "scheduled heartbeats are always those of the main session",
    "skipWhenBusy": "a session has one heartbeat at a time, and what comes meanwhile waits",
    "ackMaxChars": "300 characters may stand beside HEARTBEAT_OK, always",
}


class MalformedConfiguration(ValueError):
    """The file is not a configuration of OpenClaw; the text says where."""


class Outcome(StrEnum):
    """What became of one item of the file."""

    TAKEN = "taken"
    CHANGED = "changed"
    LEFT_OUT = "left out"
    UNCHANGED = "unchanged"


@dataclass(frozen=True, slots=True)
class Line:
    """One line of the report; as a step, of something that is left out."""

    what: str
    outcome: Outcome
    why: str = ""


@dataclass(frozen=True, slots=True)
class Field:
    """A value for a row's field `name`; `what` is the setting as the file calls it.

    An `adapted` value is not quite what the file says; `why` says what is worth knowing.
    """

    what: str
    name: str
    value: Any
    why: str = ""
    adapted: bool = False


@dataclass(frozen=True, slots=True)
class AgentStep:
    """Make an agent, or change the fields of the one that is there."""

    id: str
    fields: tuple[Field, ...]
    why: str = ""
    adapted: bool = False


@dataclass(frozen=True, slots=True)
class DefaultAgentStep:
    """Make an agent the default one."""

    id: str
    why: str = ""


@dataclass(frozen=True, slots=True)
class SettingStep:
    """Set one field of the gateway's settings or of the hook policy.

    With `needs_prefix` only where there is an allowed session prefix.
    """

    row: Literal["gateway", "policy"]
    field: Field
    needs_prefix: bool = False


@dataclass(frozen=True, slots=True)
class PrefixStep:
    """Allow a session prefix."""

    prefix: str


@dataclass(frozen=True, slots=True)
class AllowedAgentsStep:
    """Let hooks reach these agents: None for all, none at all for the default one alone."""

    ids: tuple[str, ...] | None
    why: str = ""


@dataclass(frozen=True, slots=True)
class TokenStep:
    """Let senders go on with their token."""

    token: str = field(repr=False)
    why: str = ""


@dataclass(frozen=True, slots=True)
class MappingStep:
    """Make a mapping, or change the one with this name; `values` are its fields.

    An empty `agent_id` is the default agent. A mapping with a `fault`, or with a `transform` that
    this gateway does not have, is disabled.
    """

    name: str
    values: Mapping[str, Any]
    agent_id: str = ""
    fault: str = ""
    transform: str = ""
    why: str = ""
    adapted: bool = False


Step: TypeAlias = (
    Line
    | AgentStep
    | DefaultAgentStep
    | SettingStep
    | PrefixStep
    | AllowedAgentsStep
    | TokenStep
    | MappingStep
)


def read(configuration: object, environment: Mapping[str, str]) -> tuple[Step, ...]:
    """Return what the file asks for, in the order in which to do it.

    `configuration` is the parsed file; `${NAME}` in its strings stands for a variable of the
    environment or of its own `env`. Raises MalformedConfiguration.
    """
    _require_text(configuration)
    root = _Object("", configuration, environment)
    # As OpenClaw does it: what the process has goes before the file's own variables.
    set_here = {name: value for name, value in environment.items() if value}
    root.environment = {**_own_variables(root), **set_here}
    return tuple(_read(root))


def _read(root: _Object) -> Iterator[Step]:
    if "agents" in root:
        yield from _agents(root.child("agents"))
    if "session" in root:
        yield from _session(root.child("session"))
    yield from _hooks(root.child("hooks"), is_partial="$include" in root)
    gateway = _Object("gateway.", root.values.get("gateway", {}), root.environment)
    if "token" in gateway.child("auth"):
        why = "set OPENCLAW_GATEWAY_TOKEN to it, or make a gateway token in the admin"
        yield Line("gateway.auth.token", Outcome.LEFT_OUT, why)
    yield from root.left_out("only agents, session and hooks are read", {"$include": _INCLUDED})


def _own_variables(root: _Object) -> dict[str, str]:
    own = root.child("env")
    values = {**own.values, **own.child("vars").values}
    return {name: value for name, value in values.items() if isinstance(value, str)}


# --- Agents ---------------------------------------------------------------------------------------


def _agents(agents: _Object) -> Iterator[Step]:
    defaults = agents.child("defaults")
    shared = defaults.child("heartbeat")
    system = defaults.child("systemAgent")
    entries = list(_agent_entries(agents))
    if not entries and shared.values:
        entries = [(_ONLY_AGENT, _Object("", {}, agents.environment))]
    known: dict[str, _Object] = {}
    for written, entry in entries:
        agent_id = _agent_id(written)
        if not agent_id:
            yield Line(entry.what, Outcome.LEFT_OUT, entry.faults.get("id", "it has no id"))
        elif agent_id in known:
            yield Line(entry.what, Outcome.LEFT_OUT, f"agent {agent_id} is listed twice")
        else:
            known[agent_id] = entry
    if known:
        default, why = _default_agent(known, system)
        scheduled = _scheduled_agents(known, shared, default)
        shared_hours = shared.child("activeHours")
        for agent_id, entry in known.items():
            is_scheduled = agent_id in scheduled
            yield from _agent(
                agent_id, entry, shared, shared_hours, defaults, is_scheduled=is_scheduled
            )
        yield from shared_hours.left_out(_NO_SUCH_SETTING)
        yield DefaultAgentStep(default, why)
    yield from shared.left_out(_NO_SUCH_SETTING, _HEARTBEAT_REASONS)
    yield from system.left_out(_NO_SUCH_SETTING)
    yield from defaults.left_out(_AGENTS_OWN)
    yield from agents.left_out(_NO_SUCH_SETTING, {"$include": _INCLUDED})


def _agent_entries(agents: _Object) -> Iterator[tuple[str, _Object]]:
    """Yield each agent's id as written, and what is said of it, in both of OpenClaw's shapes."""
    for entry in agents.children("list"):
        yield entry.text("id"), entry
    entries = agents.child("entries")
    for written in entries.values:
        yield written, entries.child(written)


def _default_agent(known: Mapping[str, _Object], system: _Object) -> tuple[str, str]:
    """Return the agent that is meant where none is named, and why it is."""
    marked = [name for name, entry in known.items() if entry.flag("default", default=False)]
    if owner := _agent_id(system.text("agentId")):
        return owner, "the file's systemAgent"
    if marked or len(known) == 1:
        return next(iter(marked or known)), ""
    return next(iter(known)), "the first in the file, because none is marked as the default"


def _scheduled_agents(
    known: Mapping[str, _Object], shared: _Object, default: str
) -> frozenset[str]:
    """Return whose main session has heartbeats by itself, by OpenClaw's rule.

    An agent with a heartbeat of its own takes it from all that have none.
    """
    own = frozenset(agent_id for agent_id, entry in known.items() if "heartbeat" in entry)
    owner = _agent_id(shared.text("agentId"))
    if own or owner:
        return own or frozenset({owner})
    return frozenset(known) if shared.values else frozenset({default})


@dataclass(frozen=True, slots=True)
class _Hours:
    """When scheduled heartbeats run. `is_never`: at no time, which OpenClaw can say and this not.

    `why` tells where the time zone is from; it is `guessed` where the file says nothing of it.
    """

    start: time | None = None
    end: time | None = None
    time_zone: str = ""
    why: str = ""
    guessed: bool = False
    is_never: bool = False


def _active_hours(hours: _Object, defaults: _Object) -> _Hours:
    """Return the hours of `activeHours`; a fault, or one of the two alone, leaves the whole day."""
    if not hours.values:
        return _Hours()
    start, end = _time_of_day(hours, "start"), _time_of_day(hours, "end")
    time_zone, why, guessed = _time_zone(hours, defaults)
    if start is None or end is None:
        return _Hours()
    if start == end:
        is_all_day = hours.text("end") == _MIDNIGHT
        return _Hours(is_never=not is_all_day)
    return _Hours(start, end, time_zone, why, guessed)


def _time_of_day(hours: _Object, key: str) -> time | None:
    written = hours.text(key)
    if match := _TIME_OF_DAY.fullmatch(written):
        return time(int(match[1]), int(match[2]))
    if key == "end" and written == _MIDNIGHT:
        return time(0)
    hours.faults.setdefault(key, "it must be a time of day such as 08:00, for these hours to count")
    return None


def _time_zone(hours: _Object, defaults: _Object) -> tuple[str, str, bool]:
    """Return the time zone of active hours, where it is from, and whether it is guessed.

    Without a name of one OpenClaw takes the user's, else that of its machine.
    """
    written = hours.text("timezone")
    if written and written not in ("user", "local"):
        if _is_time_zone(written):
            return written, "", False
        hours.faults.setdefault("timezone", "no such time zone")
    if written != "local" and (user := defaults.text("userTimezone")):
        if _is_time_zone(user):
            return user, f"active hours in {user}, the file's userTimezone", False
        defaults.faults.setdefault("userTimezone", "no such time zone")
    here = hours.environment.get("TZ", "").removeprefix(":")
    if _is_time_zone(here):
        return here, f"active hours in {here}, the TZ of this machine", True
    why = "active hours in UTC, as the file names no time zone: manage.py agents set ID --time-zone"
    return "UTC", why, True


def _is_time_zone(name: str) -> bool:
    try:
        validate_time_zone(name)
    except ValidationError:
        return False
    return True


def _agent(
    agent_id: str,
    entry: _Object,
    shared: _Object,
    shared_hours: _Object,
    defaults: _Object,
    *,
    is_scheduled: bool,
) -> Iterator[Step]:
    written = entry.text("id")
    entry.prefix = f"agent {agent_id}: "
    own = entry.child("heartbeat")
    own_hours = own.child("activeHours")
    hours = _active_hours(own_hours if own_hours.values else shared_hours, defaults)
    every = own.duration("every") if "every" in own else shared.duration("every")
    seconds = own.number("timeoutSeconds") or shared.number("timeoutSeconds")
    why = []
    if not is_scheduled:
        every = timedelta(0)
        why.append("its schedule is off, because in OpenClaw other agents have the heartbeats")
    elif hours.is_never:
        every = timedelta(0)
        why.append("its schedule is off, because its active hours begin and end at the same time")
    if hours.why:
        why.append(hours.why)
    is_renamed = bool(written) and written.lower() != agent_id
    if is_renamed:
        why.append("its id has characters that are not possible here")
    fields = (
        Field("name", "name", entry.text("name")),
        Field("heartbeat.every", "heartbeat_every", every),
        Field("heartbeat.activeHours", "active_from", hours.start),
        Field("heartbeat.activeHours", "active_until", hours.end),
        Field("heartbeat.activeHours.timezone", "time_zone", hours.time_zone),
        Field("heartbeat.timeoutSeconds", "timeout_seconds", seconds),
        Field("heartbeat.prompt", "heartbeat_prompt", own.text("prompt") or shared.text("prompt")),
    )
    given = tuple(field for field in fields if field.value not in (None, ""))
    yield AgentStep(agent_id, given, "; ".join(why), adapted=is_renamed or hours.guessed)
    yield from own_hours.left_out(_NO_SUCH_SETTING)
    yield from own.left_out(_NO_SUCH_SETTING, _HEARTBEAT_REASONS)
    yield from entry.left_out(_AGENTS_OWN)


def _agent_id(written: str) -> str:
    """Return the id that OpenClaw makes of what is written; it may still be no valid one here."""
    lowered = written.strip().lower()
    if re.fullmatch(AGENT_ID_PATTERN, lowered):
        return lowered
    return re.sub(r"[^a-z0-9_-]+", "-", lowered).strip("-")[:64]


# --- Session --------------------------------------------------------------------------------------


def _session(session: _Object) -> Iterator[Step]:
    if scope := session.text("scope"):
        here = GatewaySettings.Scope.PER_AGENT
        if scope == "global":
            here = GatewaySettings.Scope.GLOBAL
        why = "" if scope == here else f"called {here.value} here"
        yield SettingStep("gateway", Field("session.scope", "scope", here.value, why))
    if main_key := session.text("mainKey"):
        yield SettingStep("gateway", Field("session.mainKey", "main_key", main_key.lower()))
    yield from session.left_out(_NO_SUCH_SETTING, {"$include": _INCLUDED})


# --- Hooks ----------------------------------------------------------------------------------------


def _hooks(hooks: _Object, *, is_partial: bool) -> Iterator[Step]:
    """Yield the policy, then the token, then the mappings.

    What an included file says is unknown: with one, a missing key does not mean its default.
    """
    is_partial = is_partial or "$include" in hooks
    enabled = hooks.get("enabled") is True
    if enabled or "enabled" in hooks or not is_partial:
        why = "" if enabled else "OpenClaw's hooks are off unless this is true"
        yield SettingStep("policy", Field("hooks.enabled", "enabled", enabled, why))
    if path := hooks.text("path"):
        yield SettingStep("policy", Field("hooks.path", "base_path", _base_path(path)))
    yield from _session_keys(hooks)
    if "allowedAgentIds" in hooks or not is_partial:
        yield _allowed_agents(hooks)
    yield from _body_limit(hooks)
    yield from _token(hooks)
    yield from _mappings(hooks)
    yield from hooks.left_out(_NO_SUCH_SETTING, _HOOKS_REASONS)


def _token(hooks: _Object) -> Iterator[Step]:
    token = hooks.text("token")
    if token:
        is_short = len(token) < SHORT_TOKEN_CHARACTERS
        why = "short and easy to guess: replace it, manage.py hook_tokens rotate openclaw"
        yield TokenStep(token, why if is_short else "")
    elif "token" not in hooks.faults:
        why = "there is none in the file: manage.py hook_tokens create NAME makes one"
        yield Line("hooks.token", Outcome.LEFT_OUT, why)


def _base_path(written: str) -> str:
    return f"/{written.strip('/')}"


def _session_keys(hooks: _Object) -> Iterator[Step]:
    prefixes = hooks.texts("allowedSessionKeyPrefixes")
    for prefix in dict.fromkeys(prefix.lower() for prefix in prefixes):
        yield PrefixStep(prefix)
    if "allowRequestSessionKey" in hooks:
        allowed = hooks.flag("allowRequestSessionKey", default=False)
        # Also where the list cannot be used: it was meant to limit.
        is_limited = hooks.values.get("allowedSessionKeyPrefixes") not in (None, [])
        why = ""
        if allowed and not is_limited:
            why = (
                "no prefix limits the keys: whoever holds a token can write into every session; "
                "list prefixes in the hook policy"
            )
        what = "hooks.allowRequestSessionKey"
        setting = Field(what, "allow_request_session_key", allowed, why)
        yield SettingStep("policy", setting, needs_prefix=allowed and is_limited)
    if key := hooks.text("defaultSessionKey"):
        what = "hooks.defaultSessionKey"
        yield SettingStep("policy", Field(what, "default_session_key", key))


def _allowed_agents(hooks: _Object) -> AllowedAgentsStep:
    if "allowedAgentIds" not in hooks:
        return AllowedAgentsStep(None, "not in the file: hooks reach every agent")
    ids = hooks.texts("allowedAgentIds")
    if "*" in ids:
        return AllowedAgentsStep(None)
    # A list that cannot be used was meant to limit, so it is no list of all.
    fault = hooks.faults.pop("allowedAgentIds", "")
    return AllowedAgentsStep(tuple(dict.fromkeys(map(_agent_id, ids))), fault)


def _body_limit(hooks: _Object) -> Iterator[Step]:
    limit = hooks.number("maxBodyBytes")
    if limit is not None:
        lowest, highest = BODY_BYTES
        kept = min(max(limit, lowest), highest)
        why = "" if kept == limit else f"{kept} bytes: from {lowest} to {highest} are possible here"
        field = Field("hooks.maxBodyBytes", "max_body_bytes", kept, why, adapted=kept != limit)
        yield SettingStep("policy", field)


def _mappings(hooks: _Object) -> Iterator[Step]:
    """Yield the mappings in their order, and behind them those of the presets, as OpenClaw does."""
    may_choose = hooks.values.get("allowRequestSessionKey") is True
    names: set[str] = set()
    mappings = hooks.children("mappings")
    for position, mapping in enumerate(mappings, 1):
        yield from _mapping(mapping, position, names, may_choose=may_choose)
    for preset in dict.fromkeys(hooks.texts("presets")):
        if preset == "gmail":
            yield _gmail(len(mappings) + 1, names, may_choose=may_choose)
        else:
            yield Line(f"preset {preset}", Outcome.LEFT_OUT, "OpenClaw has no such preset")


def _mapping(
    mapping: _Object, position: int, names: set[str], *, may_choose: bool
) -> Iterator[Step]:
    written = mapping.text("id") or mapping.text("name") or f"mapping {position}"
    mapping.get("name")
    name = _free_name(" ".join(written.split()), names)
    mapping.prefix = f"mapping {name}: "
    match = mapping.child("match")
    path = match.template("path").strip().strip("/")
    if path in ENDPOINTS:
        yield Line(mapping.what, Outcome.LEFT_OUT, f"{path} is an endpoint: it is never asked")
        return
    action = mapping.one_of("action", HookMapping.Action.values, "agent")
    is_turn = action == HookMapping.Action.AGENT
    session_key = mapping.template("sessionKey")
    timeout = mapping.number("timeoutSeconds")
    kept_timeout = timeout and min(timeout, LONGEST_TURN_SECONDS)
    for key, harmless in (("channel", "last"), ("allowUnsafeExternalContent", False)):
        if mapping.values.get(key) == harmless:
            mapping.get(key)
    template = "messageTemplate" if is_turn else "textTemplate"
    values = {
        "position": position,
        "match_path": path,
        "match_source": match.text("source"),
        "action": action,
        "mode": mapping.one_of("wakeMode", HookMapping.Mode.values, "now"),
        "session_key": session_key,
        "for_each": mapping.text("forEach"),
        "text_template": mapping.template(template),
        "deliver": mapping.flag("deliver", default=True),
        "timeout_seconds": kept_timeout,
    }
    agent_id = _agent_id(mapping.text("agentId"))
    transform = mapping.child("transform")
    faults = {**match.faults, **mapping.faults}
    remarks = [_key_remark(session_key, may_choose=may_choose)]
    if name != written:
        remarks.append("it has another name here, where names are of one line and unique")
    if kept_timeout != timeout:
        remarks.append(f"a turn may take {kept_timeout} s at most here")
    yield MappingStep(
        name=name,
        values=values,
        agent_id=agent_id,
        fault="; ".join(f"{key}: {fault}" for key, fault in faults.items()),
        transform="" if "transform" not in mapping else transform.text("module") or "without name",
        why="; ".join(filter(None, remarks)),
        adapted=kept_timeout != timeout or name != written,
    )
    yield from match.unread(_NO_SUCH_SETTING, {})
    yield from mapping.unread(_NO_SUCH_SETTING, _MAPPING_REASONS)


def _gmail(position: int, names: set[str], *, may_choose: bool) -> MappingStep:
    preset = presets.find("gmail")
    return MappingStep(
        name=_free_name(preset.title, names),
        values={**preset.values, "position": position},
        why=_key_remark(preset.values["session_key"], may_choose=may_choose),
    )


def _free_name(written: str, names: set[str]) -> str:
    """Return the name, with a number where it is taken, and take it."""
    name = written
    numbers = count(2)
    while name in names:
        name = f"{written} {next(numbers)}"
    names.add(name)
    return name


def _key_remark(session_key: str, *, may_choose: bool) -> str:
    if "{{" not in session_key or may_choose:
        return ""
    return "refused until requests may choose the session: its session key is a template"


# --- Reading the file -----------------------------------------------------------------------------


class _Object:
    """An object of the file: its values by key, typed, with variables filled in.

    A value that cannot be used counts as missing, and `faults` says why. What was never asked for
    is left out. `prefix` stands before a key in the report.
    """

    def __init__(self, prefix: str, values: object, environment: Mapping[str, str]) -> None:
        self.prefix = prefix
        if not isinstance(values, dict):
            raise MalformedConfiguration(f"{self.what or 'the file'} must be an object")
        self.values = {key: value for key, value in values.items() if value is not None}
        self.environment = environment
        self.faults: dict[str, str] = {}
        self._asked: set[str] = set()

    @property
    def what(self) -> str:
        return self.prefix.rstrip(".: ")

    def __contains__(self, key: str) -> bool:
        return key in self.values

    def get(self, key: str) -> Any:
        self._asked.add(key)
        return self.values.get(key)

    def child(self, key: str) -> _Object:
        """Return the object under a key; an empty one where there is none."""
        value = self.get(key)
        return _Object(f"{self.prefix}{key}.", {} if value is None else value, self.environment)

    def children(self, key: str) -> list[_Object]:
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            raise MalformedConfiguration(f"{self.prefix}{key} must be a list")
        return [
            _Object(f"{self.prefix}{key}[{index}].", item, self.environment)
            for index, item in enumerate(value or ())
        ]

    def text(self, key: str) -> str:
        """Return a string, trimmed; empty where there is none."""
        filled = self.template(key)
        return "" if key in self.faults else filled.strip()

    def template(self, key: str) -> str:
        """Return a string as it is; variables that are not set stay as they are written."""
        return self._filled(key, self.get(key) if key in self else "")

    def texts(self, key: str) -> list[str]:
        """Return a list of strings, trimmed and without empty ones; empty if one is unusable."""
        value = self.get(key)
        if value is not None and not isinstance(value, list):
            self.faults[key] = "it must be a list"
            return []
        texts = [self._filled(key, item).strip() for item in value or ()]
        return [] if key in self.faults else [text for text in texts if text]

    def flag(self, key: str, *, default: bool) -> bool:
        value = self.get(key)
        if isinstance(value, bool):
            return value
        if value is not None:
            self.faults[key] = "it must be true or false"
        return default

    def one_of(self, key: str, choices: Collection[str], default: str) -> str:
        text = self.text(key) or default
        if text in choices:
            return text
        self.faults[key] = f"it must be one of {', '.join(choices)}"
        return default

    def number(self, key: str) -> int | None:
        """Return a number above zero, without its fraction."""
        value = self.get(key)
        if value is None:
            return None
        if not _is_number(value) or int(value) < 1:
            self.faults[key] = "it must be a number above 0"
            return None
        return int(value)

    def duration(self, key: str) -> timedelta | None:
        """Return a duration as OpenClaw reads it: `30m`, `1h30m`; a bare number is minutes."""
        value = self.get(key)
        if value is None:
            return None
        written = str(value) if _is_number(value) else self.text(key)
        try:
            return _duration(written)
        except ValueError as error:
            self.faults.setdefault(key, str(error))
            return None

    def left_out(self, reason: str, reasons: Mapping[str, str] | None = None) -> Iterator[Line]:
        """Yield a line for each key that cannot be used, and those of `unread`."""
        for key, fault in self.faults.items():
            yield Line(f"{self.prefix}{key}", Outcome.LEFT_OUT, fault)
        yield from self.unread(reason, reasons or {})

    def unread(self, reason: str, reasons: Mapping[str, str]) -> Iterator[Line]:
        """Yield what was never asked for: a line for each of `reasons`, by key, or `reason`."""
        keys_by_reason: dict[str, list[str]] = {}
        for key in self.values:
            if key not in self._asked:
                keys_by_reason.setdefault(reasons.get(key, reason), []).append(key)
        for why, keys in keys_by_reason.items():
            yield Line(f"{self.prefix}{', '.join(keys)}", Outcome.LEFT_OUT, why)

    def _filled(self, key: str, value: object) -> str:
        if not isinstance(value, str):
            self.faults[key] = "it must be a string"
            return ""
        unset: list[str] = []

        def fill(match: re.Match[str]) -> str:
            if match["escaped"]:
                return match[0][1:]
            found = self.environment.get(match["name"], "")
            if not found or not _is_storable(found):
                unset.append(match["name"])
            return found or match[0]

        filled = _VARIABLE.sub(fill, value)
        if unset:
            self.faults[key] = f"not set in the environment: {', '.join(unset)}"
        return filled


def _duration(written: str) -> timedelta:
    """Return the duration. Raises ValueError."""
    text = written.strip().lower()
    if re.fullmatch(r"[0-9.]+", text):
        text += "m"
    total, end = timedelta(0), 0
    try:
        while part := _DURATION_PART.match(text, end):
            total += float(part["count"]) * _DURATION_UNITS[part["unit"]]
            end = part.end()
    except OverflowError as error:
        raise ValueError(f"{written[:40]!a} is too long a duration") from error
    if end == 0 or end != len(text):
        raise ValueError(f"{written[:40]!a} is not a duration; write for example 30m or 1h")
    return total


def _is_number(value: object) -> bool:
    if isinstance(value, float):
        return math.isfinite(value)
    return isinstance(value, int) and not isinstance(value, bool)


def _require_text(value: object) -> None:
    """Raise MalformedConfiguration for strings and keys that cannot be stored or shown."""
    if isinstance(value, dict):
        for key, item in value.items():
            _require_text(key)
            _require_text(item)
    elif isinstance(value, list):
        for item in value:
            _require_text(item)
    elif isinstance(value, str) and not _is_storable(value):
        raise MalformedConfiguration(f"{value[:40]!a} is not text that can be stored")


def _is_storable(text: str) -> bool:
    """Whether both databases take the text: no NUL, no lone surrogates."""
    return "\0" not in text and not any("\ud800" <= character <= "\udfff" for character in text)
