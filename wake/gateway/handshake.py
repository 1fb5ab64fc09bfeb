"""Who may connect: protocol, origin and credential. The failures are the protocol page's table."""

from __future__ import annotations

import hmac
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Final
from urllib.parse import urlsplit

from django.conf import settings
from django.http.request import split_domain_port, validate_host
from django.utils.http import is_same_domain

from wake import tokens
from wake.configuration import Snapshot
from wake.gateway import scopes
from wake.gateway.frames import (
    NEWEST_PROTOCOL,
    OLDEST_PROTOCOL,
    ConnectParams,
    Credentials,
    Error,
)
from wake.models import GatewayToken

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


@dataclass(frozen=True, slots=True)
class Credential:
    """What a client proved to hold: a name for the log, and the scopes.

    `token_id` is that of a stored token; the environment's is in force as long as the process.
    """

    name: str
    scopes: tuple[str, ...]
    token_id: int | None = None


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

    The rules are those of Django's CSRF check: the origin's host and port equal the `Host` header,
    which must be an allowed one, or the origin is in CSRF_TRUSTED_ORIGINS. Other clients send none.
    Raises HandshakeRefused.
    """
    if origin is None:
        return
    try:
        page = urlsplit(origin)
        own = split_domain_port(host)[0]
    except ValueError:
        page, own = urlsplit(""), ""
    is_own = page.netloc.lower() == host.lower() and validate_host(own, settings.ALLOWED_HOSTS)
    if not (is_own or _is_trusted(page.scheme, page.netloc.lower())):
        raise HandshakeRefused("origin not allowed", {"code": "CONTROL_UI_ORIGIN_NOT_ALLOWED"})


def _is_trusted(scheme: str, netloc: str) -> bool:
    for trusted in settings.CSRF_TRUSTED_ORIGINS:
        allowed = urlsplit(trusted)
        # As in Django, https://*.example.com stands for every subdomain.
        if scheme == allowed.scheme and is_same_domain(netloc, allowed.netloc.lstrip("*")):
            return True
    return False


def authenticate(offered: Credentials | None, now: datetime) -> Credential:
    """Return the credential that a token stands for: the environment's, or a stored usable one.

    Reads the database unless the token is the environment's.
    Raises HandshakeRefused (missing, mismatch) and DatabaseError.
    """
    candidates = [value for value in (offered and (offered.token, offered.password)) or () if value]
    if not candidates:
        raise _unauthorized("token missing", "AUTH_TOKEN_MISSING", "token_missing")
    digests = [tokens.digest(candidate) for candidate in candidates]
    if settings.OPENCLAW_GATEWAY_TOKEN:
        own = tokens.digest(settings.OPENCLAW_GATEWAY_TOKEN)
        if any(hmac.compare_digest(digest, own) for digest in digests):
            return Credential("OPENCLAW_GATEWAY_TOKEN", scopes.ALL)
    # Looking up a hash of a random token tells its holder nothing by the time it takes.
    for token in GatewayToken.objects.filter(digest__in=digests):
        if tokens.is_usable(token, now):
            tokens.note_use(GatewayToken, token.pk, now)
            return Credential(token.name, scopes.ALL, token.pk)
    raise _unauthorized("token mismatch", "AUTH_TOKEN_MISMATCH", "token_mismatch")


_stored_tokens: Snapshot[dict[int, GatewayToken]] = Snapshot(GatewayToken.objects.in_bulk)


def is_in_force(credential: Credential, now: datetime) -> bool:
    """Whether a connection's credential still holds: one that is revoked ends within a second.

    Reads the database at most twice a second, and before anyone is turned out.
    """
    if credential.token_id is None:
        return True
    held = _stored_tokens().get(credential.token_id)
    if held and tokens.is_usable(held, now):
        return True
    stored = GatewayToken.objects.filter(pk=credential.token_id).first()
    return stored is not None and tokens.is_usable(stored, now)


def _unauthorized(what: str, code: str, reason: str) -> HandshakeRefused:
    return HandshakeRefused(
        f"unauthorized: gateway {what} (provide gateway auth token)",
        {
            "code": code,
            "authReason": reason,
            "canRetryWithDeviceToken": False,
            "recommendedNextStep": "update_auth_credentials",
        },
    )
