"""Every error this project raises on purpose. The message is what the caller sees, word for word.

A door (command line, HTTP, WebSocket) translates by class and never by text:
`Refused` is the caller's mistake, `QueueFull` and `StorageUnavailable` ask for another try.
"""

from __future__ import annotations


class WakeError(Exception):
    """Base of all; `str(error)` is safe to show to the caller."""


class Refused(WakeError):
    """The request is wrong and will stay wrong: 400, INVALID_REQUEST, exit status 1."""


class SessionKeyError(Refused):
    """A session key that is malformed, too long, or another agent's."""


class AgentError(Refused):
    """An agent that does not exist or is disabled."""


class TextError(Refused):
    """An event text that is empty, too long or not storable."""


class QueueFull(WakeError):
    """A session holds as many queued events as it may: 429, UNAVAILABLE, exit status 1."""

    retry_after_seconds = 10


class StorageUnavailable(WakeError):
    """The database could not store now (locked, full, away): 503, UNAVAILABLE, exit status 1."""

    retry_after_seconds = 5


class LeaseLost(WakeError):
    """A heartbeat's answer came after its lease had gone to another run; nothing was stored."""


class KeyUnavailable(WakeError):
    """An agent's key is not where the agent says it is; the message names the place alone."""
