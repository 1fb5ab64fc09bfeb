"""What `manage.py check --deploy` says about the hook policy and the hook tokens."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from django.conf import settings
from django.core.checks import CheckMessage, Tags, Warning, register  # noqa: A004
from django.db import DatabaseError
from django.utils import timezone

from hooks.configuration import ENVIRONMENT_TOKEN, hooks
from hooks.models import HookToken
from wake.checks import old_tokens
from wake.models import GatewayToken, HashedToken
from wake.tokens import digest, is_usable


@register(Tags.security, deploy=True)
def check_policy(**_: Any) -> list[CheckMessage]:
    """Report a policy under which whoever holds a hook token reaches every session."""
    try:
        policy = hooks()
    except DatabaseError:
        return []  # not migrated yet, or away: nothing is served either
    if not policy.enabled or not policy.allow_request_session_key or policy.prefixes:
        return []
    return [
        Warning(
            "Hook requests may choose any session: allow_request_session_key is on in the hook "
            "policy and no allowed session prefix is listed.",
            hint="List a prefix such as hook: in the hook policy, or turn the setting off.",
            id="hooks.W001",
        )
    ]


@register(Tags.security, deploy=True)
def check_shared_tokens(**_: Any) -> list[CheckMessage]:
    """Report a token that opens hooks and the WebSocket: senders of hooks would hold all scopes."""
    try:
        opens_hooks = _by_digest(
            HookToken.objects.all(), settings.OPENCLAW_HOOKS_TOKEN, ENVIRONMENT_TOKEN
        )
        opens_gateway = _by_digest(
            GatewayToken.objects.all(), settings.OPENCLAW_GATEWAY_TOKEN, "OPENCLAW_GATEWAY_TOKEN"
        )
    except DatabaseError:
        return []
    return [
        Warning(
            f"Whoever may send hooks may do everything over the WebSocket: the hook token "
            f"{opens_hooks[shared]} is the gateway token {opens_gateway[shared]}.",
            hint="Make a hook token of its own (manage.py hook_tokens create NAME), or change "
            "OPENCLAW_HOOKS_TOKEN or OPENCLAW_GATEWAY_TOKEN.",
            id="hooks.W002",
        )
        for shared in sorted(opens_hooks.keys() & opens_gateway.keys())
    ]


def _by_digest(stored: Iterable[HashedToken], of_environment: str, variable: str) -> dict[str, str]:
    """Return the names of the valid tokens by digest."""
    now = timezone.now()
    names = {token.digest: f'"{token.name}"' for token in stored if is_usable(token, now)}
    if of_environment:
        names[digest(of_environment)] = variable
    return names


@register(Tags.security, deploy=True)
def check_hook_tokens(**_: Any) -> list[CheckMessage]:
    """Report hook tokens that have been in use for long."""
    hint = "Replace it with manage.py hook_tokens rotate NAME, and give the sender the new one."
    return old_tokens(HookToken, "hook token", hint, "hooks.W003")
