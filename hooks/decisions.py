"""What a request to the HTTP door asks for: request and configuration in, wakes out. Pure.

Nothing is read, stored or sent here, so that a request can be tried out without doing it. The door
takes what `decide` returns; the simulator watches each step on the way.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Final, TypeAlias
from uuid import uuid5

import msgspec
from msgspec.structs import replace

from hooks import mapping, policy
from hooks.configuration import HookConfiguration, MappingConfiguration
from hooks.credentials import Credential
from hooks.errors import NotAuthorized, PayloadError, UnknownHook
from hooks.mapping import CLOSED
from hooks.models import ENDPOINTS, LONGEST_TURN_SECONDS, SignatureScheme
from hooks.policy import KeyOrigin
from hooks.template import HookRequest
from wake.configuration import GatewayConfiguration
from wake.dispatch import (
    Mode,
    Turn,
    WakeRequest,
    clean_text,
    parse_run_id,
    resolve_session,
)
from wake.presentation import one_line

WAKE_PATH: Final = "wake"
AGENT_PATH: Final = "agent"
# An agent that posts from within a run names it, so that a run cannot wake its session for ever.
RUN_HEADER: Final = "x-openclaw-run-id"


class Decision(msgspec.Struct, frozen=True):
    """What a request comes to.

    `wakes` are to be stored together or not at all; none means that there is nothing to do.
    `mapping` is None at the endpoints. `several` tells that there is one wake for each item.
    `challenge` is a text to answer with, and nothing else.
    """

    mapping: MappingConfiguration | None = None
    wakes: tuple[WakeRequest, ...] = ()
    several: bool = False
    challenge: str | None = None


class Matched(msgspec.Struct, frozen=True):
    """The mapping that answers, or None at an endpoint."""

    mapping: MappingConfiguration | None


class Item(msgspec.Struct, frozen=True):
    """One of `count` items is looked at, counted from 0."""

    index: int
    count: int


class Transformed(msgspec.Struct, frozen=True):
    """The fields that the mapping's transform set; None when it wants nothing done."""

    fields: dict[str, Any] | None


class Asked(msgspec.Struct, frozen=True):
    """The wake as it is asked for, its session key as written, and who wrote that."""

    wake: WakeRequest
    origin: KeyOrigin


class Located(msgspec.Struct, frozen=True):
    """The agent and the canonical session key; None for the latter where there is no key."""

    agent_id: str
    session_key: str | None


class Allowed(msgspec.Struct, frozen=True):
    """The policy allows it."""


Step: TypeAlias = Matched | Item | Transformed | Asked | Located | Allowed
Watch: TypeAlias = Callable[[Step], object]


def require_hook(path: str, hooks: HookConfiguration) -> None:
    """Raise UnknownHook when nothing can answer at `path`, whatever the payload."""
    if path not in ENDPOINTS and not mapping.on_path(hooks.mappings, path):
        raise UnknownHook(f"no hook mapping matches {path[:200]!a}")


def decide(
    request: HookRequest,
    credential: Credential,
    hooks: HookConfiguration,
    gateway: GatewayConfiguration,
    *,
    watch: Watch | None = None,
) -> Decision:
    """Return what a request comes to; `watch`, if any, is called with each step on the way.

    Raises UnknownHook when no mapping matches, NotAuthorized when only such match that the
    credential does not open, TransformFailed, and Refused: a payload, a mapping, a session key or
    an agent that will not do, or what the policy does not allow.
    """
    if request.path in ENDPOINTS:
        if credential.mappings is not None:
            raise NotAuthorized("the credential is limited to mappings")
        if watch:
            watch(Matched(None))
        of_payload = _wake_of_payload if request.path == WAKE_PATH else _turn_of_payload
        asked = Asked(of_payload(request.payload), KeyOrigin.REQUEST)
        return Decision(wakes=(_checked(asked, request, hooks, gateway, watch),))
    matching = _matching(request, credential, hooks)
    if watch:
        watch(Matched(matching))
    challenge = _challenge(matching, request.payload)
    if challenge is not None:
        return Decision(matching, challenge=challenge)
    wakes = []
    items = mapping.items(matching, request)
    for index, item in enumerate(items):
        if watch and matching.for_each:
            watch(Item(index, len(items)))
        fields = mapping.transformed(matching, item)
        if watch and matching.transform:
            watch(Transformed(None if fields is None else dict(fields)))
        if fields is None:
            continue
        written = mapping.write(matching, item, fields)
        asked = Asked(mapping.make_wake(matching, written), written.origin)
        # Each item has an id of its own, in case that its session is named after it.
        own = replace(item, uid=uuid5(item.uid, str(index))) if matching.for_each else item
        wakes.append(_checked(asked, own, hooks, gateway, watch))
    return Decision(matching, tuple(wakes), several=bool(matching.for_each))


def _matching(
    request: HookRequest, credential: Credential, hooks: HookConfiguration
) -> MappingConfiguration:
    closed = False
    for candidate in hooks.mappings:
        reason = mapping.why_not(candidate, request.path, request.payload, credential)
        if reason is None:
            return candidate
        closed = closed or reason == CLOSED
    if closed:
        raise NotAuthorized("the credential does not open this hook")
    raise UnknownHook(f"no hook mapping matches {request.path[:200]!a} with this payload")


def _checked(
    asked: Asked,
    request: HookRequest,
    hooks: HookConfiguration,
    gateway: GatewayConfiguration,
    watch: Watch | None,
) -> WakeRequest:
    """Give a turn its session where it names none, and check text, key, agent and policy."""
    wake, origin = asked.wake, asked.origin
    if wake.turn is not None and wake.session_key is None:
        key = hooks.default_session_key or f"hook:{request.uid}"
        wake, origin = replace(wake, session_key=key), KeyOrigin.POLICY
    if watch:
        watch(Asked(wake, origin))
    clean_text(wake.text)
    if wake.session_key is not None:
        policy.check_origin(hooks, origin)
    agent_id, session = resolve_session(wake.session_key, wake.agent_id, gateway)
    if watch:
        watch(Located(agent_id, session.key if session else None))
    policy.check_agent(hooks, agent_id)
    if wake.session_key is not None and session is not None:
        policy.check_prefix(hooks, wake.session_key, session.key)
    if watch:
        watch(Allowed())
    run_id = parse_run_id(request.header(RUN_HEADER))
    return replace(wake, run_id=run_id) if run_id else wake


def _challenge(matching: MappingConfiguration, payload: Any) -> str | None:
    """Return what Slack wants to hear when it checks the address, if this is such a check."""
    if matching.signature is None or matching.signature.scheme != SignatureScheme.SLACK:
        return None
    if not isinstance(payload, dict) or payload.get("type") != "url_verification":
        return None
    return _string(payload, "challenge") or ""


def _wake_of_payload(payload: Any) -> WakeRequest:
    """Return the wake that a body of `/hooks/wake` writes. Raises PayloadError."""
    if not isinstance(payload, dict):
        raise PayloadError("the body must be a JSON object")
    return WakeRequest(
        text=_string(payload, "text") or "",
        source=f"hook:{WAKE_PATH}",
        mode=_mode(payload, "mode"),
        session_key=_string(payload, "sessionKey"),
        agent_id=_string(payload, "agentId"),
        external=True,
    )


def _turn_of_payload(payload: Any) -> WakeRequest:
    """Return the turn that a body of `/hooks/agent` asks for. Raises PayloadError."""
    if not isinstance(payload, dict):
        raise PayloadError("the body must be a JSON object")
    for name in ("channel", "to"):
        if payload.get(name) is not None:
            raise PayloadError(
                f"{name} is not supported: this gateway delivers to sessions; leave it out and "
                "name the session in sessionKey"
            )
    message = _string(payload, "message")
    if message is None:
        raise PayloadError("message required")
    deliver = payload.get("deliver")
    if deliver is not None and not isinstance(deliver, bool):
        raise PayloadError("deliver must be true or false")
    name = one_line(_string(payload, "name") or "")[:100] or AGENT_PATH
    return WakeRequest(
        text=message,
        # Not the name: the agent reads the source outside of what is marked as data.
        source=f"hook:{AGENT_PATH}",
        mode=_mode(payload, "wakeMode"),
        session_key=_string(payload, "sessionKey"),
        agent_id=_string(payload, "agentId"),
        external=True,
        turn=Turn(name, deliver is not False, _timeout(payload)),
    )


def _mode(payload: dict[str, Any], name: str) -> Mode:
    return Mode.NEXT_HEARTBEAT if payload.get(name) == Mode.NEXT_HEARTBEAT else Mode.NOW


def _timeout(payload: dict[str, Any]) -> int | None:
    """Return the whole seconds that a turn may take; None when the request does not say."""
    value = payload.get("timeoutSeconds")
    if value is None:
        return None
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    if not is_number or not 1 <= value <= LONGEST_TURN_SECONDS:
        raise PayloadError(f"timeoutSeconds must be a number from 1 to {LONGEST_TURN_SECONDS}")
    return int(value)


def _string(payload: dict[str, Any], name: str) -> str | None:
    """Return a field's text; None when it is missing, null or blank."""
    value = payload.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise PayloadError(f"{name} must be a string")
    return value if value.strip() else None
