"""`manage.py heartbeats`: the heartbeat loop alone, for more processes and more machines."""

from __future__ import annotations

import asyncio
from typing import Any

from django.core.management.base import BaseCommand, CommandError
from django.db import DatabaseError, connection

from wake import status
from wake.heartbeats.worker import Worker
from wake.limits import raise_open_files_limit
from wake.management.stopping import stop_on_signals


class Command(BaseCommand):
    help = "Run heartbeats alone until SIGINT or SIGTERM; a second signal stops at once."

    def handle(self, **_: Any) -> None:
        _require_migrated_database()
        raise_open_files_limit()
        try:
            asyncio.run(self._serve())
        except asyncio.CancelledError:
            raise CommandError(
                "stopped at once; what was not given back is taken over when its lease runs out"
            ) from None

    async def _serve(self) -> None:
        """Serve until the first signal. The second one cancels what is still being ended."""
        heartbeats = Worker()
        stop_on_signals(heartbeats.stop)
        self.stdout.write("heartbeats ready")
        self.stdout.flush()
        await heartbeats.run()


def _require_migrated_database() -> None:
    try:
        is_migrated = status.is_migrated()
    except DatabaseError as error:
        raise CommandError(f"cannot use the database: {error}".strip()) from error
    if not is_migrated:
        raise CommandError("the database is not migrated; run manage.py migrate first")
    connection.close()
