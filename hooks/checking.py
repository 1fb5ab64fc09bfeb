"""The check of a mapping while it is being written: what is wrong, and what it makes of a sample.

What is said comes from the code that decides about real requests (`hooks.decisions.decide`), with
this one mapping in the configuration. Pure, apart from what a transform does with the sample.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Final
from uuid import uuid4

from hooks import mapping as mappings
from hooks import policy, transforms
from hooks.configuration import HookConfiguration, MappingConfiguration, frozen
from hooks.credentials import Credential
from hooks.decisions import (
    Allowed,
    Asked,
    Decision,
    Item,
    Located,
    Step,
    Transformed,
    decide,
)
from hooks.errors import MappingError, PolicyRefused
from hooks.models import ENDPOINTS, HookMapping
from hooks.policy import KeyOrigin
from hooks.samples import Sample
from hooks.simulation import Line
from hooks.template import EMPTY, HookRequest, Template, TemplateError
from wake.configuration import GatewayConfiguration
from wake.dispatch import Mode
from wake.errors import AgentError, WakeError

# A template is at most as long as an event's text may be, and of what it makes so much is shown.
MAX_TEMPLATE_CHARACTERS: Final = 64 * 1024
SHOWN_CHARACTERS: Final = 2000
SHOWN_ITEMS: Final = 3

_EVERYTHING: Final = Credential("any", "any")
_SOME_TEXT: Final = Template(("text",))


@dataclass(frozen=True, slots=True)
class Check:
    """What is to be said: about the mapping itself, and about what it makes of the sample."""

    mapping: tuple[Line, ...]
    sample: tuple[Line, ...] = ()


def check(
    mapping: HookMapping,
    hooks: HookConfiguration,
    gateway: GatewayConfiguration,
    *,
    now: datetime,
    earlier: Sequence[MappingConfiguration] = (),
    sample: Sample | None = None,
) -> Check:
    """Return what there is to say about a mapping, which need not be stored or valid.

    `earlier` are the enabled mappings that are asked before it. Its choices (action, mode, scheme)
    must be some that exist; all else may be anything. Never raises WakeError.
    """
    if faults := _faults(mapping):
        return Check(faults)
    own = frozen(mapping)
    lines = [*_hidden(own, earlier), *_fields(own), *_session(own, hooks, gateway, now)]
    if sample is None:
        return Check(tuple(lines))
    # The sample has come to this mapping, whatever source it would have to name for it.
    return Check(tuple(lines), _with_sample(replace(own, source=""), sample, hooks, gateway, now))


def _faults(mapping: HookMapping) -> tuple[Line, ...]:
    """Return why the mapping cannot be read at all."""
    lines = []
    if mapping.match_path.strip("/") in ENDPOINTS:
        detail = f"{mapping.match_path.strip('/')} is an endpoint of its own; use another path."
        lines.append(Line("Match path", detail, "bad"))
    for title, written in (
        ("Session key", mapping.session_key),
        ("Text template", mapping.text_template),
    ):
        if len(written) > MAX_TEMPLATE_CHARACTERS:
            detail = f"longer than {MAX_TEMPLATE_CHARACTERS:,} characters"
            lines.append(Line(title, detail, "bad"))
            continue
        try:
            Template.parse(written)
        except TemplateError as error:
            line = written.count("\n", 0, error.position) + 1
            where = f", in line {line}" if "\n" in written else ""
            lines.append(Line(title, f"{error}{where}", "bad"))
    if mapping.transform and not transforms.find(mapping.transform):
        detail = f'no transform is registered as "{mapping.transform}"'
        lines.append(Line("Transform", detail, "bad"))
    if not mapping.text_template.strip() and not mapping.transform:
        detail = "Write a text, or choose a transform that does."
        lines.append(Line("Text template", detail, "bad"))
    return tuple(lines)


def _hidden(own: MappingConfiguration, earlier: Sequence[MappingConfiguration]) -> list[Line]:
    """Tell of the first mapping that answers all that this one would."""
    for other in earlier:
        if other.path in ("", own.path) and other.source in ("", own.source):
            answers = f'"{other.name}" comes first and answers '
            if own.signature is None:
                detail = f"{answers}everything that this one would: it is never asked."
                return [Line("Order", detail, "bad")]
            detail = f"{answers}whoever shows a hook token. Signed requests still come here."
            return [Line("Order", detail)]
    return []


def _fields(own: MappingConfiguration) -> list[Line]:
    written = _expressions(own)
    if not written:
        return []
    return [Line("Taken from the request", ", ".join(written))]


def _expressions(own: MappingConfiguration) -> list[str]:
    expressions = (*own.text.expressions, *own.session_key.expressions)
    return list(dict.fromkeys(expression.written for expression in expressions))


def _session(
    own: MappingConfiguration,
    hooks: HookConfiguration,
    gateway: GatewayConfiguration,
    now: datetime,
) -> list[Line]:
    """Tell where events go, and whether the policy lets them, as far as no payload decides it."""
    if own.session_key.expressions:
        lines = [Line("Session key", "from outside: a template, filled from each request")]
        try:
            policy.check_origin(hooks, KeyOrigin.TEMPLATE)
        except PolicyRefused as error:
            return [*lines, Line("Policy", str(error), "bad")]
        limit = f"a key that starts with {' or '.join(hooks.prefixes)}" if hooks.prefixes else ""
        return [*lines, Line("Policy", f"allows {limit or 'every key'}", "good")]
    # Any text will do, and none of the request's values: the key is the same for all of them.
    same = replace(own, source="", for_each="", transform=None, text=_SOME_TEXT)
    request = HookRequest(same.path, {}, now, uuid4())
    steps, end = _walk(same, request, hooks, gateway)
    lines = []
    for step in steps:
        if isinstance(step, Located):
            lines.append(Line("Session key", _in_words(own, step, hooks), "good"))
        elif isinstance(step, Allowed):
            lines.append(Line("Policy", "allowed", "good"))
    if isinstance(end, WakeError):
        lines.append(Line(_about(end), str(end), "bad"))
    return lines


def _about(error: WakeError) -> str:
    if isinstance(error, PolicyRefused):
        return "Policy"
    return "Agent" if isinstance(error, AgentError) else "Session key"


def _in_words(own: MappingConfiguration, located: Located, hooks: HookConfiguration) -> str:
    if own.session_key != EMPTY:
        return f"fixed: {located.session_key}"
    if own.action == HookMapping.Action.AGENT:
        if hooks.default_session_key:
            return f"none: the policy's default session, {located.session_key}"
        return "none: each turn has a session of its own, hook:<random id>"
    main = f"none: the main session of agent {located.agent_id}"
    nudges_all = own.mode == Mode.NOW and not own.agent_id
    return f"{main}, and every agent is nudged" if nudges_all else main


def _with_sample(
    own: MappingConfiguration,
    sample: Sample,
    hooks: HookConfiguration,
    gateway: GatewayConfiguration,
    now: datetime,
) -> tuple[Line, ...]:
    """Tell what the mapping makes of a sample."""
    headers = {name.lower(): value for name, value in sample.headers.items()}
    request = HookRequest(own.path, sample.payload, now, uuid4(), headers)
    steps, end = _walk(own, request, hooks, gateway)
    lines: list[Line] = []
    suffix, shown = "", True
    for step in steps:
        match step:
            case Item(index, count):
                suffix, shown = f" (item {index + 1} of {count})", index < SHOWN_ITEMS
            case _ if shown:
                lines += [replace(line, title=line.title + suffix) for line in _told(step)]
    if isinstance(end, WakeError):
        lines.append(Line(f"Refused{suffix}", str(end), "bad"))
    elif end.challenge is not None:
        lines.append(Line("Answer", "the sender's check of the address is answered", "good"))
    elif not end.wakes:
        lines.append(Line("Outcome", "nothing to do: answered with 204"))
    return (*_empty(own, request), *lines)


def _told(step: Step) -> list[Line]:
    match step:
        case Transformed(None):
            return [Line("Transform", "wants nothing done")]
        case Transformed(fields):
            return [Line("Transform", f"sets {', '.join(sorted(fields or {})) or 'nothing'}")]
        case Asked(wake):
            return [Line("Text", _short(wake.text))]
        case Located(_, session_key):
            return [Line("Session", session_key or "a main session")]
        case Allowed():
            return [Line("Policy", "allowed", "good")]
        case _:
            return []


def _empty(own: MappingConfiguration, request: HookRequest) -> list[Line]:
    """Tell which expressions the sample, or the first of its items, has no value for."""
    try:
        first = mappings.items(own, request)[:1]
    except MappingError:
        return []  # said where the walk ends
    expressions = {
        expression.written: expression
        for expression in (*own.text.expressions, *own.session_key.expressions)
    }
    missing = [
        written
        for item in first
        for written, expression in expressions.items()
        if not expression.render(item).strip()
    ]
    return [Line("Empty in this sample", ", ".join(missing))] if missing else []


def _walk(
    own: MappingConfiguration,
    request: HookRequest,
    hooks: HookConfiguration,
    gateway: GatewayConfiguration,
) -> tuple[list[Step], Decision | WakeError]:
    """Return the steps of the decision, and how it ended."""
    seen: list[Step] = []
    try:
        alone = replace(hooks, mappings=(own,))
        return seen, decide(request, _EVERYTHING, alone, gateway, watch=seen.append)
    except WakeError as error:
        return seen, error


def _short(text: str) -> str:
    return text if len(text) <= SHOWN_CHARACTERS else f"{text[:SHOWN_CHARACTERS]}…"
