"""Who may connect: protocol and origin. The failures are the protocol page's table; pure."""

from __future__ import annotations

from typing import Any, Final
from urllib.parse import urlsplit

from django.conf import settings
from django.http.request import split_domain_port, validate_host
from django.utils.http import is_same_domain

from wake.gateway.frames import NEWEST_PROTOCOL, OLDEST_PROTOCOL, ConnectParams, Error

CLOSE_PROTOCOL_ERROR: Final = 1002
CLOSE_POLICY_VIOLATION: Final = 1008


class HandshakeRefused(Exception):
    """A connection is not taken: answered on the request, then closed with `close_code`."""

    def __init__(
        self,
        message: str,
        details: dict[str, Any] | None = None,
        *,
        close_code: int = CLOSE_POLICY_VIOLATION,
    ) -> None:
        super().__init__(message)
        self.error = Error(code="INVALID_REQUEST", message=message, details=details)
        self.close_code = close_code


def agree_on_protocol(params: ConnectParams) -> int:
    """Return the highest protocol that both sides speak. Raises HandshakeRefused."""
    protocol = min(params.max_protocol, NEWEST_PROTOCOL)
    if protocol < max(params.min_protocol, OLDEST_PROTOCOL):
        raise HandshakeRefused(
            "protocol mismatch",
            {
                "code": "PROTOCOL_MISMATCH",
                "clientMinProtocol": params.min_protocol,
                "clientMaxProtocol": params.max_protocol,
                "expectedProtocol": NEWEST_PROTOCOL,
            },
            close_code=CLOSE_PROTOCOL_ERROR,
        )
    return protocol


def check_origin(origin: str | None, host: str) -> None:
    """Refuse a browser whose page is neither this site's nor of a trusted origin.

    A trusted one is in CSRF_TRUSTED_ORIGINS. Clients that are no browser send none.
    Raises HandshakeRefused.
    """
    if origin is None or is_own_page(origin, host):
        return
    try:
        page = urlsplit(origin)
    except ValueError:
        page = urlsplit("")
    if not _is_trusted(page.scheme, page.netloc.lower()):
        raise HandshakeRefused("origin not allowed", {"code": "CONTROL_UI_ORIGIN_NOT_ALLOWED"})


def is_own_page(origin: str | None, host: str) -> bool:
    """Whether a page of this site connects; only to it is a user's session a credential.

    As in Django's CSRF check, the origin's host and port equal the `Host` header, which must be an
    allowed one.
    """
    try:
        page = urlsplit(origin or "")
        own = split_domain_port(host)[0]
    except ValueError:
        return False
    return page.netloc.lower() == host.lower() and validate_host(own, settings.ALLOWED_HOSTS)


def _is_trusted(scheme: str, netloc: str) -> bool:
    for trusted in settings.CSRF_TRUSTED_ORIGINS:
        allowed = urlsplit(trusted)
        # As in Django, https://*.example.com stands for every subdomain.
        if scheme == allowed.scheme and is_same_domain(netloc, allowed.netloc.lstrip("*")):
            return True
    return False
