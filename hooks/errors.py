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


class NotAuthorized(WakeError):
    """A credential that does not open this hook: 401, as for a wrong one."""


class TooManyFailures(WakeError):
    """Too many wrong credentials from one client: 429."""

    def __init__(self, retry_after_seconds: int) -> None:
        super().__init__("too many wrong credentials; try again later")
        self.retry_after_seconds = retry_after_seconds


class TransformFailed(WakeError):
    """A defect in a registered transform: 500. The traceback is in the log, never in the answer."""


class UnknownHook(WakeError):
    """No endpoint and no mapping for this request: 404."""


class BodyTooLarge(WakeError):
    """A body over the policy's limit, in bytes: 413."""

    def __init__(self, limit: int) -> None:
        super().__init__(f"the body is larger than {limit} bytes, the limit in the hook policy")
