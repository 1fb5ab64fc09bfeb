"""`manage.py agent_client`: run a program for each heartbeat of an agent of a remote gateway.

Exit status: 0 stopped, 1 refused, or stopped at once by a second signal, 2 wrong usage.
"""

from __future__ import annotations

import argparse
import asyncio
import os
from collections.abc import Sequence
from typing import Any, Final

from django.core.management.base import BaseCommand, CommandError, CommandParser

from wake.gateway.agent_client import AgentClient, Refused
from wake.heartbeats.runners.inbox import MAX_CAPACITY
from wake.management.stopping import stop_on_signals
from wake.management.terminal import one_line, text

WRONG_USAGE: Final = 2


class Command(BaseCommand):
    help = (
        "Run a program for each heartbeat of an agent, on any machine that can reach the gateway. "
        "It needs no database."
    )
    requires_system_checks = []
    # What stands behind `--`; see the command `agents`.
    stealth_options = ("program",)
    _program: Sequence[str] = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.usage = "manage.py agent_client --url URL --agent ID [--capacity N] -- PROGRAM ARGS…"
        parser.epilog = (
            "PROGRAM gets the prompt on standard input, and what it prints is the reply; it runs "
            "without a shell. The first SIGINT or SIGTERM ends the programs under way and gives "
            "their heartbeats back; a second one stops at once."
        )
        parser.add_argument(
            "--url", help="the gateway, ws://HOST:PORT; OPENCLAW_GATEWAY_URL is the same"
        )
        parser.add_argument(
            "--token", help="the gateway's token; better, set OPENCLAW_GATEWAY_TOKEN"
        )
        parser.add_argument(
            "--agent", type=text, required=True, metavar="ID", help="whose heartbeats to take"
        )
        parser.add_argument(
            "--capacity",
            type=_capacity,
            default=1,
            metavar="N",
            help="how many programs run at a time (1)",
        )

    def run_from_argv(self, argv: list[str]) -> None:
        if "--" in argv:
            place = argv.index("--")
            argv, self._program = argv[:place], argv[place + 1 :]
        super().run_from_argv(argv)

    def handle(
        self, *, url: str | None, token: str | None, agent: str, capacity: int, **options: Any
    ) -> None:
        url = url or os.environ.get("OPENCLAW_GATEWAY_URL", "")
        token = token or os.environ.get("OPENCLAW_GATEWAY_TOKEN", "")
        program: Sequence[str] = options.get("program") or self._program
        if not program:
            raise CommandError("give the program behind --", returncode=WRONG_USAGE)
        if not url:
            raise CommandError("give --url or OPENCLAW_GATEWAY_URL", returncode=WRONG_USAGE)
        if not token:
            raise CommandError("give OPENCLAW_GATEWAY_TOKEN or --token", returncode=WRONG_USAGE)
        try:
            asyncio.run(self._serve(url, token, agent, program, capacity))
        except Refused as error:
            raise CommandError(one_line(str(error))) from error
        except asyncio.CancelledError:
            raise CommandError("stopped at once; the gateway takes back what was running") from None

    async def _serve(
        self, url: str, token: str, agent: str, program: Sequence[str], capacity: int
    ) -> None:
        """Serve until the first signal. The second one cancels what is still being ended."""
        client = AgentClient(
            url,
            token,
            agent.strip().lower(),
            program,
            capacity=capacity,
            report=lambda line: self.stderr.write(one_line(line)),
            ready=self._ready,
        )
        stop_on_signals(client.stop)
        await client.run()

    def _ready(self) -> None:
        self.stdout.write("agent client ready")
        self.stdout.flush()


def _capacity(written: str) -> int:
    try:
        capacity = int(written)
    except ValueError:
        capacity = 0
    if not 1 <= capacity <= MAX_CAPACITY:
        raise argparse.ArgumentTypeError(f"give a number from 1 to {MAX_CAPACITY}")
    return capacity
