"""Who sends a hook: a bearer token, or the signature of a mapping on the path."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import datetime
from functools import partial

from django.utils import timezone
from rest_framework.authentication import BaseAuthentication
from rest_framework.exceptions import AuthenticationFailed
from rest_framework.request import Request

from hooks import credentials
from hooks.bodies import read_body
from hooks.configuration import HookConfiguration, hooks
from hooks.credentials import Credential
from hooks.mapping import on_path
from hooks.models import HookToken
from wake import tokens
from wake.tokens import USE_NOTED_EVERY

# When this process last noted the use of a token, by its id.
_noted: dict[int, datetime] = {}


class HookAuthentication(BaseAuthentication):
    """A hook token in `Authorization` or `X-OpenClaw-Token`, or a right signature.

    There is no user: `request.auth` is the `Credential`. A request without one is refused, and the
    answer does not say why. The body is read for a signature only, and never parsed here.
    """

    def authenticate(self, request: Request) -> tuple[None, Credential]:
        snapshot = hooks()
        credential = credential_of(
            snapshot,
            request.parser_context["kwargs"]["path"],
            lower_case_headers(request),
            partial(read_body, request, snapshot.max_body_bytes),
            timezone.now(),
        )
        if credential is None:
            raise AuthenticationFailed
        return None, credential

    def authenticate_header(self, request: Request) -> str:
        return "Bearer"


def credential_of(
    snapshot: HookConfiguration,
    path: str,
    headers: Mapping[str, str],
    read: Callable[[], bytes],
    now: datetime,
) -> Credential | None:
    """Return the right credential that a request at a hook's path shows, or None.

    `headers` are by lower-case name; `read` returns the body. Raises what `read` raises.
    """
    mappings = on_path(snapshot.mappings, path)
    return credentials.find(snapshot, path, mappings, headers, read, now)


def lower_case_headers(request: Request) -> dict[str, str]:
    """Return all headers of a request by lower-case name."""
    return {name.lower(): value for name, value in request.headers.items()}


def is_use_noted(credential: Credential, now: datetime) -> bool:
    """Whether there is nothing to note of a credential's use: this process did within a minute."""
    if credential.token_id is None:
        return True
    noted = _noted.get(credential.token_id)
    return noted is not None and now - noted < USE_NOTED_EVERY


def note_use(credential: Credential, now: datetime) -> None:
    """Store when a token was used, once a minute at most."""
    token_id = credential.token_id
    if token_id is None or is_use_noted(credential, now):
        return
    _noted[token_id] = now
    tokens.note_use(HookToken, token_id, now)
