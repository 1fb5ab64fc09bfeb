"""`manage.py system_event`: hand one event in, to this gateway's database or to a remote gateway.

Exit status: 0 stored, 1 refused or failed with one line on standard error, 2 wrong usage.
"""

from __future__ import annotations

import json
import os
import sys
from contextlib import suppress
from typing import Any, Final

from django.core.management.base import BaseCommand, CommandError, CommandParser

from wake.management.terminal import one_line, printable

# What is not needed by every call is imported where it is: the command is to start fast.

SOURCE: Final = "cli"
MODES: Final = ("now", "next-heartbeat")
STANDARD_INPUT: Final = "-"
# Set for an agent's program: what it sends from within its run is the run's.
RUN_VARIABLE: Final = "OPENCLAW_RUN_ID"
MAX_STANDARD_INPUT_BYTES: Final = 1024 * 1024


class Command(BaseCommand):
    help = "Queue an event for an agent's session, and wake it."
    requires_system_checks = []

    def add_arguments(self, parser: CommandParser) -> None:
        self._parser = parser
        parser.add_argument(
            "positional_text",
            nargs="?",
            metavar="TEXT",
            help="the event; - reads it from standard input",
        )
        parser.add_argument("--text", metavar="TEXT", help="the event, as an option")
        parser.add_argument(
            "--session-key",
            metavar="KEY",
            help="the session, for example discord:channel:123; without one the default agent's "
            "main session",
        )
        parser.add_argument("--agent", metavar="ID", help="the agent; else the default one")
        parser.add_argument("--mode", choices=MODES, default="next-heartbeat")
        parser.add_argument(
            "--url",
            help="a remote gateway, ws://HOST:PORT; OPENCLAW_GATEWAY_URL is the same",
        )
        parser.add_argument(
            "--token", help="the remote gateway's token; better, set OPENCLAW_GATEWAY_TOKEN"
        )
        parser.add_argument("--json", action="store_true", help="print the receipt as JSON")

    def handle(
        self,
        *,
        positional_text: str | None,
        text: str | None,
        session_key: str | None,
        agent: str | None,
        mode: str,
        url: str | None,
        token: str | None,
        json: bool,
        **_: Any,
    ) -> None:
        written = [given for given in (positional_text, text) if given is not None]
        if len(written) != 1:
            self._parser.error("give the text once: as TEXT or as --text TEXT")
        url = url or os.environ.get("OPENCLAW_GATEWAY_URL")
        if token and not url:
            self._parser.error("--token is for a remote gateway: give --url too")
        event = _text(written[0])
        if url:
            token = token or os.environ.get("OPENCLAW_GATEWAY_TOKEN", "")
            receipt = _send(url, token, event, session_key, agent, mode)
        else:
            receipt = _store(event, session_key, agent, mode)
        self._print(printable(_as_json(receipt) if json else _as_line(receipt)))

    def _print(self, line: str) -> None:
        """Print the receipt. The event is stored: that nobody reads the line is no failure."""
        try:
            self.stdout.write(line)
            self.stdout.flush()
        except (OSError, ValueError, AttributeError):  # the last: there is no standard output
            # Else the interpreter tries once more at its end, and complains.
            sys.stdout = open(os.devnull, "w")  # noqa: SIM115


def _text(written: str) -> str:
    """Return the event's text. Raises CommandError when it can not be one."""
    from wake.dispatch import clean_text
    from wake.errors import TextError

    if written == STANDARD_INPUT:
        try:
            written = sys.stdin.buffer.read(MAX_STANDARD_INPUT_BYTES).decode()
        except UnicodeDecodeError as error:
            raise CommandError("standard input is not UTF-8") from error
    try:
        return clean_text(written)
    except TextError as error:
        raise CommandError(one_line(str(error))) from error


def _store(text: str, session_key: str | None, agent: str | None, mode: str) -> Any:
    from django.db import DatabaseError

    from wake import metrics
    from wake.dispatch import Mode, WakeRequest, dispatch, parse_run_id
    from wake.errors import StorageUnavailable, WakeError

    try:
        run_id = parse_run_id(os.environ.get(RUN_VARIABLE))
        request = WakeRequest(text, SOURCE, Mode(mode), session_key, agent, run_id=run_id)
        return dispatch(request).as_json()
    except StorageUnavailable as error:
        raise CommandError(one_line(f"{error}: {_storage_problem(error.__cause__)}")) from error
    except WakeError as error:
        with suppress(DatabaseError):
            metrics.write_noted()  # else it ends with this process
        raise CommandError(one_line(str(error))) from error


def _storage_problem(cause: BaseException | None) -> str:
    from django.db import DatabaseError, connection

    from wake.models import SystemEvent

    try:
        is_migrated = SystemEvent._meta.db_table in connection.introspection.table_names()
    except DatabaseError:
        is_migrated = True  # not known: it cannot be read at all
    return str(cause) if is_migrated else "the database has no tables yet; run manage.py migrate"


def _send(
    url: str, token: str, text: str, session_key: str | None, agent: str | None, mode: str
) -> Any:
    from wake.gateway.client import GatewayClientError, connect

    params = {"mode": mode, "text": text}
    # The protocol takes no empty key; on the command line a blank one means none.
    if session_key and session_key.strip():
        params["sessionKey"] = session_key
    if agent and agent.strip():
        params["agentId"] = agent
    if run_id := os.environ.get(RUN_VARIABLE):
        params["runId"] = run_id
    try:
        with connect(url, token, scopes=("operator.write",)) as gateway:
            receipt = gateway.call("wake", params)
    except GatewayClientError as error:
        raise CommandError(one_line(str(error))) from error
    if isinstance(receipt, dict) and receipt.get("ok") is False:
        raise CommandError(one_line(str(receipt.get("error") or "the gateway refused")))
    return receipt


def _as_json(receipt: Any) -> str:
    return json.dumps(receipt)


def _as_line(receipt: Any) -> str:
    """Return a receipt in words. OpenClaw's own says no more than that all is well."""
    if not isinstance(receipt, dict) or "sessionKey" not in receipt:
        return "accepted"
    outcome, event_id = receipt.get("eventOutcome", "accepted"), receipt.get("eventId", "")
    return f"{outcome} {event_id} for {receipt['sessionKey']} ({receipt.get('mode')})"
