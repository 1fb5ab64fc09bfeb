"""The session key policy: which keys the HTTP door may use. Pure, over a frozen snapshot.

The rules are in docs/contract.md, "Session key policy".
"""

from __future__ import annotations

from enum import Enum

from hooks.configuration import HookConfiguration
from hooks.errors import PolicyRefused

_ALLOW_SETTING = 'allow_request_session_key ("requests may choose the session") in the hook policy'


class KeyOrigin(Enum):
    """Who wrote a session key. All but a fixed one come from outside."""

    REQUEST = "sessionKey"
    TEMPLATE = "a session key template"
    FIXED = "a fixed session key"


def check_origin(hooks: HookConfiguration, origin: KeyOrigin) -> None:
    """Raise PolicyRefused unless keys of this origin may be used at all."""
    if hooks.allow_request_session_key or origin is KeyOrigin.FIXED:
        return
    raise PolicyRefused(f"{origin.value} is not allowed: turn on {_ALLOW_SETTING}")


def check_prefix(hooks: HookConfiguration, written: str, canonical: str) -> None:
    """Raise PolicyRefused unless the key starts with an allowed prefix, when there are any.

    Either spelling will do: the key as written, or as canonicalized. Compared in lower case.
    """
    spellings = (written.strip().lower(), canonical.lower())
    if not hooks.prefixes or any(key.startswith(hooks.prefixes) for key in spellings):
        return
    raise PolicyRefused(
        f"session key {written.strip()[:120]!a} starts with none of the allowed session "
        f"prefixes in the hook policy: {', '.join(hooks.prefixes)}"
    )
