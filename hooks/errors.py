"""The errors of the HTTP door, beside those of `wake.errors`. The message is what senders see."""

from __future__ import annotations

from wake.errors import Refused, WakeError


class PolicyRefused(Refused):
    """The hook policy does not allow what was asked for; the text names the setting to change."""


class PayloadError(Refused):
    """A body that is not JSON, or a field in it of the wrong type."""


class MappingError(Refused):
    """A mapping that cannot make a wake of this request; the text names the mapping."""


class CredentialInQuery(Refused):
    """A token in the URL, where logs and proxies keep it."""


class UnknownHook(WakeError):
    """No endpoint and no mapping for this request: 404."""


class BodyTooLarge(WakeError):
    """A body over the policy's limit: 413."""
