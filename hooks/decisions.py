"""What a request to the HTTP door asks for: request and configuration in, a wake out. Pure.

Nothing is read, stored or sent here, so that a request can be tried out without doing it.
"""

from __future__ import annotations

from typing import Any, Final

from hooks import mapping, policy
from hooks.configuration import HookConfiguration
from hooks.errors import PayloadError, UnknownHook
from hooks.policy import KeyOrigin
from hooks.template import HookRequest
from wake.configuration import GatewayConfiguration
from wake.dispatch import Mode, WakeRequest, resolve_session

WAKE_PATH: Final = "wake"


def require_hook(path: str, hooks: HookConfiguration) -> None:
    """Raise UnknownHook when nothing can answer at `path`, whatever the payload."""
    if path != WAKE_PATH and not mapping.on_path(hooks.mappings, path):
        raise UnknownHook(f"no hook mapping matches {path[:200]!a}")


def decide(
    request: HookRequest, hooks: HookConfiguration, gateway: GatewayConfiguration
) -> WakeRequest:
    """Return the wake that a request stands for; `wake.dispatch` checks its text.

    Raises UnknownHook when no mapping matches, and Refused: a payload, a mapping, a session key or
    an agent that will not do, or a key that the policy does not allow.
    """
    wake, origin = _asked_for(request, hooks)
    if wake.session_key is not None:
        policy.check_origin(hooks, origin)
    _, session = resolve_session(wake.session_key, wake.agent_id, gateway)
    if wake.session_key is not None and session is not None:
        policy.check_prefix(hooks, wake.session_key, session.key)
    return wake


def _asked_for(request: HookRequest, hooks: HookConfiguration) -> tuple[WakeRequest, KeyOrigin]:
    if request.path == WAKE_PATH:
        return _wake_of_payload(request.payload), KeyOrigin.REQUEST
    matching = mapping.match(hooks.mappings, request.path, request.payload)
    if matching is None:
        raise UnknownHook(f"no hook mapping matches {request.path[:200]!a} with this payload")
    templated = matching.session_key.expressions
    origin = KeyOrigin.TEMPLATE if templated else KeyOrigin.FIXED
    return mapping.make_wake(matching, request), origin


def _wake_of_payload(payload: Any) -> WakeRequest:
    """Return the wake that a body of `/hooks/wake` writes. Raises PayloadError."""
    if not isinstance(payload, dict):
        raise PayloadError("the body must be a JSON object")
    return WakeRequest(
        text=_string(payload, "text") or "",
        source=f"hook:{WAKE_PATH}",
        mode=Mode.NEXT_HEARTBEAT if payload.get("mode") == Mode.NEXT_HEARTBEAT else Mode.NOW,
        session_key=_string(payload, "sessionKey"),
        agent_id=_string(payload, "agentId"),
        external=True,
    )


def _string(payload: dict[str, Any], name: str) -> str | None:
    """Return a field's text; None when it is missing, null or blank."""
    value = payload.get(name)
    if value is None:
        return None
    if not isinstance(value, str):
        raise PayloadError(f"{name} must be a string")
    return value if value.strip() else None
