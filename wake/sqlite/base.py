"""SQLite lets one write at a time, and who finds it busy sleeps and asks again, ever more seldom.

Within a process that is worse than it need be: of two threads that write in turns, one sleeps up to
a tenth of a second while the database is long free. So here a transaction first waits for those of
this process; SQLite's own way is left for other processes.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from typing import Any, Final

from django.db import OperationalError
from django.db.backends.sqlite3 import base

# By file. A connection is used by one thread at a time, and has one transaction at a time.
_writers: Final[defaultdict[str, threading.Lock]] = defaultdict(threading.Lock)

DEFAULT_TIMEOUT_SECONDS: Final = 5.0  # sqlite3's own


class DatabaseWrapper(base.DatabaseWrapper):
    """Django's, with a lock around each transaction."""

    _held: threading.Lock | None = None

    def _start_transaction_under_autocommit(self) -> None:
        lock = _writers[str(self.settings_dict["NAME"])]
        timeout = self.settings_dict["OPTIONS"].get("timeout", DEFAULT_TIMEOUT_SECONDS)
        if not lock.acquire(timeout=timeout):
            raise OperationalError("database is locked")
        self._held = lock
        try:
            super()._start_transaction_under_autocommit()  # type: ignore[misc] # not in the stubs
        except BaseException:
            self._let_go()
            raise

    def _commit(self) -> None:
        # A commit that fails is followed by a rollback.
        super()._commit()  # type: ignore[misc]
        self._let_go()

    def _rollback(self) -> None:
        try:
            super()._rollback()  # type: ignore[misc]
        finally:
            self._let_go()

    def _close(self) -> Any:
        try:
            return super()._close()  # type: ignore[misc]
        finally:
            self._let_go()

    def _let_go(self) -> None:
        held, self._held = self._held, None
        if held is not None:
            held.release()
