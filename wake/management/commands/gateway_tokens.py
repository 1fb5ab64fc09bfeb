"""`manage.py gateway_tokens`: list, create, rotate and revoke the WebSocket's tokens."""

from __future__ import annotations

import argparse
from datetime import datetime, timedelta
from typing import Any

from django.core.management.base import CommandError

from wake import tokens
from wake.gateway import example
from wake.management.terminal import one_line, text
from wake.management.tokens import TokensCommand
from wake.models import Agent, GatewayToken, OperatorScope


class Command(TokensCommand[GatewayToken]):
    help = "List the gateway tokens, or create, rotate or revoke one."
    model = GatewayToken
    environment_token = "OPENCLAW_GATEWAY_TOKEN"  # noqa: S105 - the name of a setting
    verb = "holds"
    everything = tokens.EVERY_SCOPE
    no_example = "No line to try it: it may only read, and no command of manage.py does only that."

    def add_what_it_opens(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument(
            "--scope",
            choices=OperatorScope.values,
            action="append",
            dest="scopes",
            help="the token holds this scope and no other; may be given more than once "
            "(default: all of them; none with --agent)",
        )
        parser.add_argument(
            "--agent",
            type=text,
            metavar="ID",
            help="the token is for programs that take this agent's heartbeats (runner inbox)",
        )

    def create_token(
        self, name: str, expires_at: datetime | None, options: dict[str, Any]
    ) -> tuple[GatewayToken, str]:
        agent_id: str | None = options["agent"]
        if agent_id is not None:
            agent_id = agent_id.strip().lower()
            if not Agent.objects.filter(pk=agent_id).exists():
                raise CommandError(one_line(f'unknown agent "{agent_id}"'))
        scopes = options["scopes"] or ([] if agent_id else OperatorScope.values)
        return tokens.create_for_gateway(
            name, scopes=scopes, agent_id=agent_id, expires_at=expires_at
        )

    def rotate_token(
        self, name: str, expires_at: datetime | None, *, keep_old: timedelta, now: datetime
    ) -> tuple[GatewayToken, str]:
        return tokens.rotate_for_gateway(name, keep_old=keep_old, now=now, expires_at=expires_at)

    def opened(self, row: GatewayToken) -> str:
        return tokens.held_in_words(row)

    def example(self, row: GatewayToken, token: str) -> str:
        return example.command_line(row, token, "ws://127.0.0.1:8000")
