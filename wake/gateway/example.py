"""A line to try a gateway token with."""

from __future__ import annotations

import shlex

from wake.gateway import scopes
from wake.models import GatewayToken


def command_line(row: GatewayToken, token: str, url: str) -> str:
    """Return a command line that tries a gateway token at `url`, or none: it may not send events.

    One that is bound to an agent takes its heartbeats, with a program that says what it was told.
    The token is no argument, which other users of the machine could see.
    """
    variable = f"OPENCLAW_GATEWAY_TOKEN={shlex.quote(token)}"
    if row.agent_id:
        return (
            f"{variable} manage.py agent_client --url {shlex.quote(url)} "
            f"--agent {row.agent_id} -- cat"
        )
    if not scopes.includes(row.scopes, scopes.WRITE):
        return ""
    return f'{variable} manage.py system_event "Hello" --url {shlex.quote(url)}'
