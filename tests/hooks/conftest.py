"""What the tests of the HTTP door share: a token, and a way to send."""

from __future__ import annotations

import json
from typing import Any, Protocol, cast

import pytest
from django.http import HttpResponse
from django.test import Client

from hooks import tokens
from hooks.models import AllowedSessionPrefix, HookPolicy
from wake.models import Heartbeat, Session, SystemEvent


class Send(Protocol):
    def __call__(
        self,
        path: str = ...,
        body: Any = ...,
        *,
        token: str | None = ...,
        method: str = ...,
        content_type: str = ...,
        headers: dict[str, str] | None = ...,
    ) -> HttpResponse: ...


@pytest.fixture
def hook_token(db: None) -> str:
    """A hook token that works."""
    return tokens.create("tests")[1]


@pytest.fixture
def send(client: Client, hook_token: str) -> Send:
    """Send a request with the right token; a body that is not bytes is sent as JSON."""

    def send(
        path: str = "/hooks/wake",
        body: Any = b"",
        *,
        token: str | None = hook_token,
        method: str = "POST",
        content_type: str = "application/json",
        headers: dict[str, str] | None = None,
    ) -> HttpResponse:
        credential = {} if token is None else {"Authorization": f"Bearer {token}"}
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        response = client.generic(
            method, path, data, content_type, headers={**credential, **(headers or {})}
        )
        return cast("HttpResponse", response)

    return send


def set_policy(**values: Any) -> None:
    """Change the hook policy."""
    policy = HookPolicy.ensure()
    for name, value in values.items():
        setattr(policy, name, value)
    policy.save()


def allow_keys(*prefixes: str) -> None:
    """Let requests choose their session keys, below these prefixes if there are any."""
    set_policy(allow_request_session_key=True)
    for prefix in prefixes:
        AllowedSessionPrefix.objects.create(prefix=prefix)


def rows() -> tuple[int, int, int]:
    """Return how many sessions, events and heartbeats are stored."""
    return Session.objects.count(), SystemEvent.objects.count(), Heartbeat.objects.count()


def error_of(response: HttpResponse) -> str:
    """Return the error text of a refusal, which has exactly two fields."""
    answer = json.loads(response.content)
    assert answer == {"ok": False, "error": answer["error"]}
    return str(answer["error"])
