"""Statements that go to PostgreSQL together, and are prepared: libpq's pipeline mode.

psycopg has it too, with a cursor for each statement and a generator for each wait: that takes more
than twice as long as all the rest. So here its connection is used directly. Needs psycopg; imported
where the database is PostgreSQL.
"""

from __future__ import annotations

import select
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from itertools import count
from typing import Any, Final
from weakref import WeakKeyDictionary

import psycopg
from psycopg.adapt import PyFormat, Transformer
from psycopg.errors import PipelineAborted, error_from_result
from psycopg.pq import ExecStatus, TransactionStatus
from psycopg.pq.abc import PGresult

# A statement, and the types of its parameters.
_Kind = tuple[str, tuple[int, ...]]

# The statements that are prepared on a connection, by their names there. A name is given once.
_prepared: Final[WeakKeyDictionary[psycopg.Connection[Any], dict[_Kind, bytes]]] = (
    WeakKeyDictionary()
)
_numbers: Final = count()

_FINE: Final = (ExecStatus.COMMAND_OK, ExecStatus.TUPLES_OK)


class Pipeline:
    """What is sent to the server together, on one connection and by one thread.

    A failure is raised where a result is read, or by `leave`: psycopg's errors. What was sent after
    what failed is not done.
    """

    def __init__(self, connection: psycopg.Connection[Any]) -> None:
        self._connection = connection
        self._pg = connection.pgconn
        self._names = _prepared.setdefault(connection, {})
        # The results that are not read yet: of what was prepared, or of what was done (None).
        self._expected: deque[_Kind | None] = deque()
        self._is_entered = False
        self._poll = select.poll()

    def send(self, statement: str, parameters: Sequence[Any]) -> None:
        """Have a statement done, with %s for each parameter. It may be sent later."""
        self._enter()
        transformer = Transformer(self._connection)
        values = transformer.dump_sequence(parameters, [PyFormat.AUTO] * len(parameters))
        kind = statement, transformer.types or ()
        name = self._names.get(kind)
        if name is None:
            name = self._names[kind] = b"wake_%d" % next(_numbers)
            self._pg.send_prepare(name, _with_numbers(statement), kind[1])
            self._expected.append(kind)
        self._pg.send_query_prepared(name, values, transformer.formats)
        self._expected.append(None)

    def fetch(self, statement: str, parameters: Sequence[Any]) -> list[Sequence[Any]]:
        """Return the rows of a statement, once all before it is done, too."""
        self.send(statement, parameters)
        self._pg.send_flush_request()
        result = self._results()
        transformer = Transformer(self._connection)
        transformer.set_pgresult(result)
        return transformer.load_rows(0, result.ntuples if result else 0, tuple)

    def leave(self) -> None:
        """Have all done that was sent, and let the connection be used otherwise."""
        if not self._is_entered:
            return
        self._is_entered = False
        self._pg.pipeline_sync()
        try:
            self._results()
        finally:
            self._next_result()  # that of the synchronization
            self._pg.exit_pipeline_mode()

    def abandon(self) -> None:
        """Let the connection be used otherwise, whatever became of what was sent."""
        with suppress(psycopg.Error):
            self.leave()

    def _enter(self) -> None:
        if self._is_entered:
            return
        self._poll.register(self._pg.socket, select.POLLIN)
        self._pg.enter_pipeline_mode()
        self._is_entered = True
        if (
            self._pg.transaction_status == TransactionStatus.IDLE
            and not self._connection.autocommit
        ):
            self.send("BEGIN", ())

    def _results(self) -> PGresult | None:
        """Read all results that are expected, raise the first failure, and return the last one."""
        self._flush()
        result = failed = None
        while self._expected:
            prepared = self._expected.popleft()
            result = self._next_result()
            self._next_result()  # None: its end
            if result and result.status not in _FINE:
                failed = failed or result
                if prepared:
                    self._names.pop(prepared, None)
        if failed and failed.status == ExecStatus.PIPELINE_ABORTED:
            raise PipelineAborted("not done, because what was sent before it failed")
        if failed:
            raise error_from_result(failed)
        return result

    def _next_result(self) -> PGresult | None:
        while self._pg.is_busy():
            self._poll.poll()
            self._pg.consume_input()
        return self._pg.get_result()

    def _flush(self) -> None:
        """Send all, and take what comes meanwhile: who does not read is not read from."""
        while self._pg.flush():
            self._poll.modify(self._pg.socket, select.POLLIN | select.POLLOUT)
            self._poll.poll()
            self._pg.consume_input()
        self._poll.modify(self._pg.socket, select.POLLIN)


@lru_cache(maxsize=256)
def _with_numbers(statement: str) -> bytes:
    """Return a statement with its parameters as PostgreSQL writes them: $1, $2, …"""
    first, *rest = statement.split("%s")
    return (first + "".join(f"${number}{part}" for number, part in enumerate(rest, 1))).encode()
