"""What `manage.py check --deploy` says about the hook policy."""

from __future__ import annotations

from typing import Any

from django.core.checks import CheckMessage, Tags, Warning, register  # noqa: A004
from django.db import DatabaseError

from hooks.configuration import hooks


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
