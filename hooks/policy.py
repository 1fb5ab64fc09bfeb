"""The session key policy: which keys the HTTP door may use. Pure, over a frozen snapshot.

The rules are in docs/contract.md, "Session key policy".
"""

from __future__ import annotations

from enum import Enum

from hooks.configuration import HookConfiguration
from hooks.errors import PolicyRefused

_ALLOW_SETTING = 'allow_request_session_key ("requests may choose the session") in the hook policy'


class KeyOrigin(Enum):
    """Who wrote a session key: somebody outside, or the operator."""

    REQUEST = "sessionKey"
    TEMPLATE = "a session key template"
    TRANSFORM = "a session key from a transform"
    FIXED = "a fixed session key"
    POLICY = "the policy's default session key"


_FROM_OUTSIDE = frozenset({KeyOrigin.REQUEST, KeyOrigin.TEMPLATE, KeyOrigin.TRANSFORM})


def check_origin(hooks: HookConfiguration, origin: KeyOrigin) -> None:
    """Raise PolicyRefused unless keys of this origin may be used at all."""
    if hooks.allow_request_session_key or origin not in _FROM_OUTSIDE:
        return
    raise PolicyRefused(f"{origin.value} is not allowed: turn on {_ALLOW_SETTING}")


def check_prefix(hooks: HookConfiguration, written: str, canonical: str) -> None:
    """Raise PolicyRefused unless the key starts with an allowed prefix, when there are any.

    Either spelling will do: the key as written, or as canonicalized. Compared in lower case.
    """
    as_written = written.strip().lower()
    if not hooks.prefixes or as_written.startswith(hooks.prefixes):
        return
    if canonical.lower().startswith(hooks.prefixes):
        return
    raise PolicyRefused(
        f"session key {written.strip()[:120]!a} starts with none of the allowed session "
        f"prefixes in the hook policy: {', '.join(hooks.prefixes)}"
    )


def check_agent(hooks: HookConfiguration, agent_id: str) -> None:
    """Raise PolicyRefused unless hooks may reach this agent."""
    if hooks.allowed_agents and agent_id not in hooks.allowed_agents:
        raise PolicyRefused(
            f'agent "{agent_id}" is not one of the allowed agents in the hook policy'
        )
