"""`manage.py prune`: remove what is old."""

from __future__ import annotations

import argparse
import contextlib
import signal
import threading
from collections.abc import Iterator
from types import FrameType
from typing import Any

from django.core.management.base import BaseCommand, CommandError, CommandParser
from django.db import DatabaseError
from django.utils import timezone

from hooks import pruning
from wake.pruning import BATCH_ROWS, Kind, delete_in_batches

_BAR_WIDTH = 30


class Command(BaseCommand):
    """Prints a line for each kind of rows. Exit status 1 with one line when it was cut short."""

    help = "Remove old deliveries, idempotency keys, settled events, heartbeats and idle sessions."
    requires_system_checks = ()

    def add_arguments(self, parser: CommandParser) -> None:
        parser.add_argument("--dry-run", action="store_true", help="only say what would go")
        parser.add_argument(
            "--days",
            type=_days,
            metavar="N",
            help="keep deliveries and what is settled for N days, in place of the settings",
        )
        parser.add_argument(
            "--batch",
            type=_batch,
            default=BATCH_ROWS,
            metavar="N",
            help=f"how many rows a transaction removes ({BATCH_ROWS})",
        )

    def handle(self, *, dry_run: bool, days: int | None, batch: int, **_: Any) -> None:
        try:
            with _until_interrupted() as stopped:
                for kind in pruning.kinds(timezone.now(), days):
                    if dry_run:
                        self.stdout.write(f"{kind.name}: {kind.rows.count()} would go")
                    else:
                        self._prune(kind, batch, stopped)
                    if stopped.is_set():
                        raise CommandError("stopped; the next prune goes on from here")
        except DatabaseError as error:
            raise CommandError(f"database: {error} (manage.py migrate?)") from error
        if dry_run:
            self.stdout.write("Heartbeats and sessions that become free by that would go as well.")

    def _prune(self, kind: Kind, batch: int, stopped: threading.Event) -> None:
        total = kind.rows.count() if self.stderr.isatty() else 0
        deleted = 0
        try:
            for count in delete_in_batches(kind, batch=batch, pause=stopped.wait):
                deleted += count
                self._show(kind.name, deleted, total)
                if stopped.is_set():
                    break
        finally:
            self._show("", 0, 0)
            self.stdout.write(f"{kind.name}: {deleted} gone")

    def _show(self, name: str, deleted: int, total: int) -> None:
        """Draw the progress over the last one on a terminal; without a name, take it away."""
        if not self.stderr.isatty():
            return
        filled = _BAR_WIDTH * deleted // max(deleted, total, 1)
        bar = f"{name} [{'#' * filled:<{_BAR_WIDTH}}] {deleted} of {total}" if name else ""
        self.stderr.write(f"\r\x1b[K{bar}", style_func=str, ending="")
        self.stderr.flush()


@contextlib.contextmanager
def _until_interrupted() -> Iterator[threading.Event]:
    """Yield an event that the first SIGINT or SIGTERM sets, so that the batch under way is ended.

    The second one ends the process at once.
    """
    stopped = threading.Event()

    def stop(number: int, _: FrameType | None) -> None:
        stopped.set()
        signal.signal(number, signal.SIG_DFL)

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield stopped
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _days(text: str) -> int:
    return _number(text, 3660)


def _batch(text: str) -> int:
    return _number(text, 10_000)


def _number(text: str, most: int) -> int:
    if not text.isdecimal() or not 1 <= int(text[:10]) <= most:
        raise argparse.ArgumentTypeError(f"{text!a} is not a number from 1 to {most}")
    return int(text)
