"""Session keys: one pure function turns what a caller wrote into the one name of a session.

A session key reads `agent:<agentId>:<rest>`. The rules, in order, are in docs/contract.md,
"Session keys". Nothing here touches the database or Django.
"""

from __future__ import annotations

import re
import unicodedata
from functools import lru_cache
from typing import Final, Literal, NamedTuple

from wake.errors import SessionKeyError

Scope = Literal["per-agent", "global"]

AGENT_ID_PATTERN: Final = r"[a-z0-9][a-z0-9_-]{0,63}"
MAX_LENGTH: Final = 512
GLOBAL_KEY: Final = "global"

_AGENT_PREFIX = "agent:"
_MAIN_ALIAS = "main"
# Controls (Cc), invisible formats such as direction marks (Cf) and lone surrogates (Cs): none of
# them can be seen, and the last cannot be stored.
_UNPRINTABLE_CATEGORIES = frozenset({"Cc", "Cf", "Cs"})
# Chat networks own these ids and tell them apart by case: one segment of a Signal group, and all
# that follows a Matrix room.
_SIGNAL_GROUP = re.compile(r"(?:^|:)signal:group:(?P<id>[^:]*)", re.IGNORECASE | re.ASCII)
_MATRIX_ROOM = re.compile(r"(?:^|:)matrix:(?:channel|group):(?P<id>.*)", re.IGNORECASE | re.ASCII)
_THREAD_MARKER = re.compile(r"(?<=[^:]):thread:(?=[^:])", re.IGNORECASE | re.ASCII)


class SessionKey(NamedTuple):
    """A session's identity: its agent's id and its canonical key.

    Under the scope `per-agent` the key alone already names the agent; under `global` every
    agent's one session has the key `global`.
    """

    agent_id: str
    key: str


def main_session_key(
    agent_id: str, *, main_key: str = "main", scope: Scope = "per-agent"
) -> SessionKey:
    """Return the agent's main session."""
    if scope == "global":
        return SessionKey(agent_id, GLOBAL_KEY)
    return SessionKey(agent_id, f"{_AGENT_PREFIX}{agent_id}:{main_key}")


def canonicalize(
    raw: str | None,
    *,
    selected_agent: str | None = None,
    default_agent: str = "main",
    main_key: str = "main",
    scope: Scope = "per-agent",
) -> SessionKey | None:
    """Return the session that `raw` names, or None when it is missing or blank.

    `selected_agent` is the agent the request chose, if any; whether agents exist is not decided
    here. Canonicalizing a canonical key for the same agent returns it unchanged.

    Raises SessionKeyError: malformed, too long, unprintable, or another agent's key.
    """
    written = (raw or "").strip()
    if not written:
        return None
    agent_id = selected_agent or default_agent
    if scope == "global":
        return SessionKey(agent_id, GLOBAL_KEY)
    return _canonical(written, agent_id, selected_agent is not None, main_key)


# The same few sessions are named again and again. What is refused is not kept.
@lru_cache(maxsize=4096)
def _canonical(written: str, agent_id: str, is_selected: bool, main_key: str) -> SessionKey:
    named_agent, rest = _split(written)
    if named_agent is not None and named_agent != agent_id:
        chosen = "selected" if is_selected else "default"
        raise SessionKeyError(
            f'session key "{_shown(written)}" targets agent "{_shown(named_agent)}" '
            f'but the {chosen} agent is "{agent_id}"; cross-agent wake is not supported'
        )
    rest = _lower_except_opaque_ids(rest)
    if rest == _MAIN_ALIAS:
        rest = main_key
    key = f"{_AGENT_PREFIX}{agent_id}:{rest}"
    _check_characters(written, key)
    return SessionKey(agent_id, key)


def named_agent(raw: str) -> str | None:
    """Return the agent that a full key names, in lower case, or None.

    Raises SessionKeyError for a malformed key.
    """
    written = raw.strip()
    return _split(written)[0] if written else None


def _split(written: str) -> tuple[str | None, str]:
    """Return the agent that the key names (None if it names none) and what follows it."""
    segments = written.split(":")
    is_full = len(segments) > 1 and segments[0].lower() == "agent"
    if (is_full and len(segments) < 3) or not all(segments):
        raise SessionKeyError(f'malformed session key "{_shown(written)}"')
    if not is_full:
        return None, written
    return segments[1].lower(), ":".join(segments[2:])


def _lower_except_opaque_ids(rest: str) -> str:
    matrix = _MATRIX_ROOM.search(rest)
    if matrix:
        room = _THREAD_MARKER.sub(":thread:", matrix["id"])
        return rest[: matrix.start("id")].lower() + room
    signal = _SIGNAL_GROUP.search(rest)
    if signal:
        return rest[: signal.start("id")].lower() + signal["id"] + rest[signal.end("id") :].lower()
    return rest.lower()


def _check_characters(written: str, key: str) -> None:
    if len(key) > MAX_LENGTH:
        raise SessionKeyError(
            f'session key "{_shown(written)}" is {len(key)} characters long; '
            f"at most {MAX_LENGTH} are allowed"
        )
    for character in key:
        if character.isspace():
            raise SessionKeyError(f'session key "{_shown(written)}" contains whitespace')
        if unicodedata.category(character) in _UNPRINTABLE_CATEGORIES:
            raise SessionKeyError(
                f'session key "{_shown(written)}" contains '
                f"a control character (U+{ord(character):04X})"
            )


def _shown(written: str) -> str:
    """Return `written` fit for an error line: printable, on one line, and not too long."""
    short = written if len(written) <= 120 else written[:117] + "..."
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode("ascii")
        for character in short
    )
