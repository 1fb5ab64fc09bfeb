"""What a client proves to hold, the scopes that come with it, and whether it still holds.

That is the shared token of the environment, a stored token, or the session of a user who is signed
in to the site. Everything here but the first reads the database.
"""

from __future__ import annotations

import hmac
from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from importlib import import_module
from typing import Any, Final

from django.conf import settings
from django.contrib import auth
from django.contrib.auth.models import AbstractBaseUser, AnonymousUser
from django.http import HttpRequest

from wake import tokens
from wake.configuration import Snapshot
from wake.gateway import scopes
from wake.gateway.frames import Credentials
from wake.gateway.handshake import HandshakeRefused
from wake.models import GatewayToken

CREDENTIAL_ENDED: Final = "unauthorized: the credential was revoked, expired or changed"
WRITE_PERMISSION: Final = "wake.change_session"


@dataclass(frozen=True, slots=True)
class Credential:
    """What a client proved to hold: a name for the log, and the scopes.

    `token_id` is that of a stored token, `session_key` that of a signed-in user's session; without
    either it is the environment's token, in force as long as the process. With an `agent_id` the
    token is bound to that agent: its holder may take this agent's heartbeats, whatever the scopes.
    """

    name: str
    scopes: tuple[str, ...]
    token_id: int | None = None
    session_key: str = ""
    agent_id: str = ""


def authenticate(offered: Credentials | None, session_key: str, now: datetime) -> Credential:
    """Return the credential of a token that is offered or, without any, of a user's session.

    `session_key` is "" unless the client is a page of this site.
    Raises HandshakeRefused (missing, mismatch) and DatabaseError.
    """
    candidates = [value for value in (offered and (offered.token, offered.password)) or () if value]
    if candidates:
        return _of_token(candidates, now)
    user = _user_of(session_key)
    if held := scopes_of_user(user):
        return Credential(f"user {user.get_username()}", held, session_key=session_key)
    raise _unauthorized("token missing", "AUTH_TOKEN_MISSING", "token_missing")


def _of_token(candidates: Collection[str], now: datetime) -> Credential:
    digests = [tokens.digest(candidate) for candidate in candidates]
    if settings.OPENCLAW_GATEWAY_TOKEN:
        own = tokens.digest(settings.OPENCLAW_GATEWAY_TOKEN)
        if any(hmac.compare_digest(digest, own) for digest in digests):
            return Credential("OPENCLAW_GATEWAY_TOKEN", scopes.ALL)
    # Looking up a hash of a random token tells its holder nothing by the time it takes.
    for token in GatewayToken.objects.filter(digest__in=digests):
        if tokens.is_usable(token, now) and (token.scopes or token.agent_id):
            tokens.note_use(GatewayToken, token.pk, now)
            return Credential(
                token.name, tuple(token.scopes), token.pk, agent_id=token.agent_id or ""
            )
    raise _unauthorized("token mismatch", "AUTH_TOKEN_MISMATCH", "token_mismatch")


def scopes_of_user(user: AbstractBaseUser | AnonymousUser) -> tuple[str, ...]:
    """Return what a user may do: nothing unless of the staff, everything as a superuser."""
    if not (user.is_active and getattr(user, "is_staff", False)):
        return ()
    if getattr(user, "is_superuser", False):
        return scopes.ALL
    may_change = isinstance(user, auth.get_user_model()) and user.has_perm(WRITE_PERMISSION)
    return (scopes.READ, scopes.WRITE) if may_change else (scopes.READ,)


def _user_of(session_key: str) -> AbstractBaseUser | AnonymousUser:
    """Return the user who is signed in with a session. A changed password ends it, as elsewhere."""
    if not session_key or "\0" in session_key:
        return AnonymousUser()
    request = HttpRequest()
    request.session = _session_store(session_key)
    return auth.get_user(request)


def _session_store(session_key: str) -> Any:
    return import_module(settings.SESSION_ENGINE).SessionStore(session_key)


_stored_tokens: Snapshot[dict[int, GatewayToken]] = Snapshot(
    GatewayToken.objects.in_bulk, [GatewayToken]
)


def ended(held: Collection[Credential], now: datetime) -> set[Credential]:
    """Return those of the credentials that do not hold any more what they held."""
    return {credential for credential in held if not _is_in_force(credential, now)}


def _is_in_force(credential: Credential, now: datetime) -> bool:
    if credential.session_key:
        held = scopes_of_user(_user_of(credential.session_key))
        return bool(held) and _covers(held, credential)
    if credential.token_id is None:
        return True
    if _still_holds(_stored_tokens().get(credential.token_id), credential, now):
        return True
    # The snapshot may be older than the token, or than a change in its favour.
    stored = GatewayToken.objects.filter(pk=credential.token_id).first()
    return _still_holds(stored, credential, now)


def _still_holds(token: GatewayToken | None, credential: Credential, now: datetime) -> bool:
    return (
        token is not None
        and tokens.is_usable(token, now)
        and bool(token.scopes or token.agent_id)
        and (token.agent_id or "") == credential.agent_id
        and _covers(token.scopes, credential)
    )


def _covers(held: Collection[str], credential: Credential) -> bool:
    return all(scopes.includes(held, scope) for scope in credential.scopes)


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
