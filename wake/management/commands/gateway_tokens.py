"""`manage.py gateway_tokens`: list, create, rotate and revoke the WebSocket's tokens."""

from __future__ import annotations

import argparse
from datetime import datetime, timedelta
from typing import Any

from wake import tokens
from wake.gateway import example
from wake.management.tokens import TokensCommand
from wake.models import GatewayToken, OperatorScope


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
            "(default: all of them)",
        )

    def create_token(
        self, name: str, expires_at: datetime | None, options: dict[str, Any]
    ) -> tuple[GatewayToken, str]:
        scopes = options["scopes"] or OperatorScope.values
        return tokens.create_for_gateway(name, scopes=scopes, expires_at=expires_at)

    def rotate_token(
        self, name: str, expires_at: datetime | None, *, keep_old: timedelta, now: datetime
    ) -> tuple[GatewayToken, str]:
        return tokens.rotate_for_gateway(name, keep_old=keep_old, now=now, expires_at=expires_at)

    def opened(self, row: GatewayToken) -> str:
        return tokens.scopes_in_words(row.scopes)

    def example(self, row: GatewayToken, token: str) -> str:
        return example.command_line(row, token, "ws://127.0.0.1:8000")
