"""Who sends a hook: a bearer token, looked up by its hash in the configuration's snapshot."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime
from typing import Final

from django.utils import timezone
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.request import Request

from hooks.configuration import HookConfiguration, TokenConfiguration, hooks
from hooks.models import HookToken
from wake import tokens
from wake.tokens import USE_NOTED_EVERY, digest

TOKEN_HEADER: Final = "X-OpenClaw-Token"  # noqa: S105 - the name of a header

# When this process last noted the use of a token, by its digest.
_noted: dict[str, datetime] = {}


class HookTokenAuthentication(BaseAuthentication):
    """`Authorization: Bearer TOKEN` or `X-OpenClaw-Token: TOKEN`; one that is right suffices.

    There is no user: `request.auth` is the `TokenConfiguration`. A request without a usable token
    is refused, and the answer does not say why.
    """

    def authenticate(self, request: Request) -> tuple[None, TokenConfiguration]:
        now = timezone.now()
        for shown in _shown_tokens(request):
            shown_digest = digest(shown)
            token = usable_token(hooks(), shown_digest, now)
            if token:
                _note_use(token, shown_digest, now)
                return None, token
        raise AuthenticationFailed

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


def usable_token(
    configuration: HookConfiguration, token_digest: str, now: datetime
) -> TokenConfiguration | None:
    """Return the token with this digest, or None when there is none or it has expired.

    Looking a hash up tells nothing about how much of a wrong token was right.
    """
    token = configuration.tokens.get(token_digest)
    if token is None or (token.expires_at is not None and token.expires_at <= now):
        return None
    return token


def _shown_tokens(request: Request) -> Iterator[str]:
    scheme, _, credential = request.headers.get("Authorization", "").strip().partition(" ")
    if scheme.lower() == "bearer" and credential.strip():
        yield credential.strip()
    if token := request.headers.get(TOKEN_HEADER, "").strip():
        yield token


def _note_use(token: TokenConfiguration, token_digest: str, now: datetime) -> None:
    """Store when the token was used: once a minute at most, and never at the request's cost."""
    noted = _noted.get(token_digest)
    if token.id is None or (noted is not None and now - noted < USE_NOTED_EVERY):
        return
    _noted[token_digest] = now
    tokens.note_use(HookToken, token.id, token.name, now)
