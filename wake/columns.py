"""Statements that no model writes: how they are run, and values as the database keeps them."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime
from functools import cache, lru_cache
from itertools import chain
from typing import TYPE_CHECKING, Any, Final, TypeVar
from uuid import UUID

import msgspec
from django.apps import apps
from django.db import DEFAULT_DB_ALIAS, DatabaseError, connection, connections, transaction
from django.db.models import Model

if TYPE_CHECKING:
    from wake.pipeline import Pipeline

T = TypeVar("T")


@cache
def is_sqlite() -> bool:
    """Whether the database is SQLite; else it is PostgreSQL. Django takes its time to say."""
    return connection.vendor == "sqlite"


def moments() -> Callable[[datetime | None], Any]:
    """Return what makes aware times into what this database keeps: what a DateTimeField does."""
    return _in_utc_text if is_sqlite() else _unchanged


def _in_utc_text(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    utc = moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    written: str = msgspec.to_builtins(utc)  # as `isoformat` does, which takes four times as long
    return f"{written[:_DAY]} {written[_DAY + 1 : -1]}"


_DAY: Final = len("2026-01-31")


def _unchanged(value: T) -> T:
    return value


def moment_of(stored: datetime | str | None) -> datetime | None:
    """Return a stored time as an aware one.

    SQLite keeps UTC without saying so, and does not know that the result of a subquery is a time.
    """
    moment = datetime.fromisoformat(stored) if isinstance(stored, str) else stored
    return moment.replace(tzinfo=UTC) if moment is not None and moment.tzinfo is None else moment


def uuids() -> Callable[[UUID], Any]:
    """Return what makes ids into what this database keeps: what a UUIDField does."""
    return _in_hex if is_sqlite() else _unchanged


def _in_hex(value: UUID) -> str:
    return value.int.to_bytes(16).hex()


def flags() -> Callable[[bool], Any]:
    """Return what makes truth values into what this database keeps: what a BooleanField does."""
    return int if is_sqlite() else _unchanged


def uuid_of(stored: UUID | str) -> UUID:
    """Return a stored id."""
    return stored if isinstance(stored, UUID) else UUID(stored)


def json_of(value: Any) -> str | None:
    """Return the value of a JSONField as it is stored; None stays the null."""
    return None if value is None else msgspec.json.encode(value).decode()


def blobs() -> Callable[[bytes | None], Any]:
    """Return what makes bytes into what `insert` takes."""
    return _unchanged if is_sqlite() else _in_hex_text


def _in_hex_text(value: bytes | None) -> str | None:
    return None if value is None else f"\\x{value.hex()}"


# On SQLite each step of a statement lets other threads run, and waits until it may go on: a hundred
# rows in one step are a hundred times less waiting. So many rows go into one statement, or half as
# many, a quarter, …: each number is another statement to prepare.
ROWS_AT_ONCE: Final = 128
# What SQLite is to do with the rows before one that does not fit: leave them, since the transaction
# is undone. To be able to take back one statement alone it first copies every page that this
# changes, and from 64 KiB on it writes the copies to a file.
_OR: Final = "OR FAIL"


def select(columns: str, rest: str, parameters: Sequence[Any]) -> list[Sequence[Any]]:
    """Return the rows of `SELECT columns rest`, all at once, as one value of JSON.

    On SQLite that is one step instead of many; what PostgreSQL sends is read value by value, which
    takes ten times as long. Times and ids are text (`moment_of`, `uuid_of`), on SQLite truth values
    are 0 and 1.
    """
    names = ", ".join(name.strip().rpartition(".")[2] for name in columns.split(","))
    statement = f"SELECT {_list_of(names)} FROM (SELECT {columns} {rest}) AS found"  # noqa: S608
    ((found,),) = fetch(statement, parameters)
    return msgspec.json.decode(found) if found else []


def all_of(tables: Sequence[type[Model]]) -> list[str]:
    """Return all that is in tables, none of it bytes: the same as long as nothing changes there."""
    looks = ", ".join(
        f"(SELECT {_list_of(_names(table))} FROM {table._meta.db_table})"  # noqa: S608
        for table in tables
    )
    ((*found,),) = fetch(f"SELECT {looks}", [])
    return [text or "" for text in found]


def _names(table: type[Model]) -> str:
    return ", ".join(str(field.column) for field in table._meta.local_concrete_fields)


def _list_of(columns: str) -> str:
    row = _array_of(columns)
    return f"json_group_array({row})" if is_sqlite() else f"json_agg({row})::text"


def json_array(columns: str) -> str:
    """Return what makes a JSON array of columns in a statement, as text."""
    return _array_of(columns) if is_sqlite() else f"{_array_of(columns)}::text"


def _array_of(columns: str) -> str:
    return f"json_array({columns})" if is_sqlite() else f"json_build_array({columns})"


def fetch_json(statement: str, parameters: Sequence[Any]) -> list[Any]:
    """Return the values that a statement finds, which are JSON as text; without nulls."""
    return [msgspec.json.decode(row[0]) for row in fetch(statement, parameters) if row[0]]


def insert(
    table: str,
    columns: Sequence[str],
    rows: Sequence[Sequence[Any]],
    same: Sequence[tuple[str, Any]] = (),
) -> None:
    """Insert rows of stored values, in their order.

    `same` are further columns and the value of each in all rows: a text, a number, a truth value,
    an object or None. It is written into the statement, and so is none that came from outside.
    Only in a transaction that ends undone where this raises: some rows may be there.
    """
    if not rows:
        return
    names = ", ".join([*columns, *(name for name, _ in same)])
    if not is_sqlite():
        values = ", ".join([*columns, *(_literal(value) for _, value in same)])
        execute(
            f"INSERT INTO {table} ({names}) SELECT {values} FROM {_rows_of(table, tuple(columns))}",  # noqa: S608
            [_as_array(column) for column in zip(*rows, strict=True)],
        )
        return
    head = f"INSERT {_OR} INTO {table} ({names}) VALUES "  # noqa: S608
    literals = tuple(_literal(value) for _, value in same)
    for part in _parts(rows):
        marks = _row_marks(len(columns), len(part), literals)
        execute(head + marks, list(chain.from_iterable(part)))


def update(table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Set columns of rows: each is its id and then the values, as they are stored.

    Only in a transaction that ends undone where this raises: some rows may be changed.
    """
    if not rows:
        return
    if not is_sqlite():
        sets = ", ".join(f"{column} = v.{column}" for column in columns)
        execute(
            f"UPDATE {table} SET {sets} FROM {_rows_of(table, ('id', *columns))} "  # noqa: S608
            f"WHERE {table}.id = v.id",
            [_as_array(column) for column in zip(*rows, strict=True)],
        )
        return
    sets = ", ".join(f"{column} = v.column{place}" for place, column in enumerate(columns, 2))
    for part in _parts(rows):
        values = _row_marks(len(columns) + 1, len(part))
        execute(
            f"UPDATE {_OR} {table} SET {sets} FROM (VALUES {values}) AS v "  # noqa: S608
            f"WHERE {table}.id = v.column1",
            list(chain.from_iterable(part)),
        )


@cache
def _rows_of(table: str, columns: tuple[str, ...]) -> str:
    """Return what a statement of PostgreSQL reads like a table, `v`: an array for each column.

    So the same statement does for any number of rows, and is prepared once. To take JSON apart
    takes the server twice as long.
    """
    (model,) = (model for model in apps.get_models() if model._meta.db_table == table)
    kinds = {field.column: field.db_type(connection) for field in model._meta.concrete_fields}
    # Without its length: a value that is too long is refused, and not cut.
    arrays = ", ".join(f"%s::{str(kinds[column]).partition('(')[0]}[]" for column in columns)
    return f"unnest({arrays}) AS v ({', '.join(columns)})"


def _literal(value: Any) -> str:
    if isinstance(value, dict):
        return _literal(msgspec.json.encode(value).decode())
    if isinstance(value, str):
        return f"'{value}'"
    return "NULL" if value is None else str(value).lower()


def _parts(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    start, size = 0, ROWS_AT_ONCE
    while start < len(rows):
        while size > len(rows) - start:
            size //= 2
        yield rows[start : start + size]
        start += size


def any_of(column: str, values: Sequence[Any]) -> tuple[str, list[Any]]:
    """Return the condition that a column is one of the values, at least one, and its parameters.

    The same few statements do for any number of values: on PostgreSQL they are one parameter, on
    SQLite the last one comes again and again up to a power of two.
    """
    if not is_sqlite():
        return f"{column} = ANY (%s)", [_as_array(values)]
    padding = (1 << (len(values) - 1).bit_length()) - len(values)
    padded = [*values, *[values[-1]] * padding]
    return f"{column} IN ({', '.join(['%s'] * len(padded))})", padded


def _as_array(values: Sequence[Any]) -> str:
    """Return what PostgreSQL reads as an array. psycopg's own way takes ten times as long."""
    written = msgspec.json.encode(values).decode()
    # JSON writes values as an array does, but for characters that have names of their own there.
    if "\\" in written and "\\" in written.replace("\\\\", "").replace('\\"', ""):
        written = f"[{','.join(map(_as_element, values))}]"
    return f"{{{written[1:-1]}}}"


def _as_element(value: Any) -> str:
    if not isinstance(value, str):
        return msgspec.json.encode(value).decode()
    return '"' + value.replace("\\", "\\\\").replace('"', '\\"') + '"'


@lru_cache(maxsize=256)
def _row_marks(columns: int, rows: int, literals: tuple[str, ...] = ()) -> str:
    row = f"({', '.join([*['%s'] * columns, *literals])})"
    return ", ".join([row] * rows)


def delete(table: str, column: str, values: Sequence[Any]) -> None:
    """Delete the rows whose column is one of the values, at least one."""
    condition, parameters = any_of(column, values)
    execute(f"DELETE FROM {table} WHERE {condition}", parameters)  # noqa: S608


def fetch(statement: str, parameters: Sequence[Any]) -> list[Sequence[Any]]:
    """Return the rows of a statement."""
    database = _database()
    with database.wrap_database_errors:
        if pipeline := _pipeline():
            return pipeline.fetch(statement, parameters)
        rows: list[Sequence[Any]] = _run(database, statement, parameters).fetchall()
        return rows


def stream(statement: str, parameters: Sequence[Any], *, at_once: int) -> Iterator[Sequence[Any]]:
    """Yield the rows of a statement, read a few at a time."""
    database = _database()
    with database.wrap_database_errors:
        cursor = _run(database, statement, parameters)
        while rows := cursor.fetchmany(at_once):
            yield from rows


def execute(statement: str, parameters: Sequence[Any]) -> None:
    """Run a statement."""
    if (gathered := getattr(_gathering, "statements", None)) is not None:
        gathered.append((statement, parameters))
        return
    database = _database()
    with database.wrap_database_errors:
        if pipeline := _pipeline():
            pipeline.send(statement, parameters)
        else:
            _run(database, statement, parameters)


# What a thread's `as_one` has gathered.
_gathering = threading.local()


@contextmanager
def as_one() -> Iterator[None]:
    """Let what is executed within go to PostgreSQL as one statement, at the end.

    To send one, take it apart and answer it costs there as much as what most of them do. They take
    place in no order, and none sees what another writes: no two are about the same rows. Whoever
    reads what they wrote calls `send_gathered` first. At most one is a SELECT. Within another one
    it is a part of that.
    """
    if is_sqlite() or getattr(_gathering, "statements", None) is not None:
        yield
        return
    _gathering.statements = []
    try:
        yield
        send_gathered()
    finally:
        _gathering.statements = None


def send_gathered() -> None:
    """Send what has been gathered within `as_one` up to now."""
    gathered = getattr(_gathering, "statements", None)
    if gathered:
        _gathering.statements = None
        execute(_joined(tuple(statement for statement, _ in gathered)), _in_order(gathered))
        _gathering.statements = []


def _is_select(statement: str) -> bool:
    return statement.startswith("SELECT")


def _in_order(gathered: Sequence[tuple[str, Sequence[Any]]]) -> list[Any]:
    ordered = sorted(gathered, key=lambda step: _is_select(step[0]))
    return list(chain.from_iterable(parameters for _, parameters in ordered))


@lru_cache(maxsize=256)
def _joined(statements: tuple[str, ...]) -> str:
    """Return one statement that does what these do: what writes as parts of a SELECT."""
    if len(statements) == 1:
        return statements[0]
    writing = [statement for statement in statements if not _is_select(statement)]
    parts = ", ".join(f"step{place} AS ({text})" for place, text in enumerate(writing))
    return f"WITH {parts} {next(filter(_is_select, statements), 'SELECT')}"


# By thread, the connection on which PostgreSQL finds rows by indexes alone.
_by_index = threading.local()


def find_by_index() -> None:
    """Have PostgreSQL read no table whole on this thread's connection, from now on.

    For a thread that runs pipelined transactions and little else: each of them says so by itself
    otherwise, which is one statement more. Where the database is away, they go on doing that.
    """
    database = _database()
    if is_sqlite() or database.in_atomic_block:
        return
    if database.connection is not None and _is_by_index(database):
        return
    with suppress(DatabaseError), database.cursor() as cursor:
        cursor.execute(f"SET {_NO_TABLE_WHOLE}")
        _by_index.connection = database.connection


_NO_TABLE_WHOLE: Final = "enable_seqscan = off"


def _is_by_index(database: Any) -> bool:
    return getattr(_by_index, "connection", None) is database.connection


@contextmanager
def pipelined_transaction() -> Iterator[None]:
    """A transaction whose statements go to the server together, where nobody reads a result.

    So they wait for its answer once, here or where a result is read, and there they fail; COMMIT
    goes with the last ones. They are prepared, and each finds its rows by an index: the server is
    not to read a table whole because that was small when the plan was made. (Elsewhere it makes a
    plan each time.) Within another transaction it is a part of that. What Django itself sends
    meanwhile waits for what was sent before.
    """
    with transaction.atomic():
        database = _database()
        # Within another one it is watched by that one's wrapper, and so are all Django's cursors.
        if is_sqlite() or not _is_used_directly(database):
            yield
            return
        is_outermost = len(database.atomic_blocks) == 1
        from wake.pipeline import Pipeline

        pipeline = Pipeline(database.connection)

        def leave_first(execute: Callable[..., Any], *args: Any) -> Any:
            pipeline.leave()
            return execute(*args)

        with database.wrap_database_errors:
            _pipelines.of_thread = pipeline
            try:
                with database.execute_wrapper(leave_first):
                    if not _is_by_index(database):
                        execute(f"SET LOCAL {_NO_TABLE_WHOLE}", [])
                    yield
                if is_outermost and not database.needs_rollback:
                    pipeline.send("COMMIT", ())  # Django's own finds nothing left to do
                pipeline.leave()
            finally:
                _pipelines.of_thread = None
                pipeline.abandon()


# A thread's pipeline, while it has one.
_pipelines = threading.local()


def _pipeline() -> Pipeline | None:
    return getattr(_pipelines, "of_thread", None)


def _database() -> Any:
    return connections[DEFAULT_DB_ALIAS]


def _run(database: Any, statement: str, parameters: Sequence[Any]) -> Any:
    """Run a statement and return its cursor.

    Past Django's, which takes longer than most statements, and on PostgreSQL writes the parameters
    into them, so that none is known there; but not where somebody listens to what is executed, nor
    before there is a connection.
    """
    if not _is_used_directly(database):
        cursor = database.cursor()
        cursor.execute(statement, parameters)
        return cursor
    if is_sqlite():
        return database.connection.execute(_with_question_marks(statement), parameters)
    return _plain_cursor()(database.connection).execute(statement, parameters, prepare=False)


def _is_used_directly(database: Any) -> bool:
    is_watched = database.execute_wrappers or database.queries_logged
    return database.connection is not None and not is_watched


@cache
def _plain_cursor() -> Any:
    import psycopg

    return psycopg.Cursor


@lru_cache(maxsize=256)
def _with_question_marks(statement: str) -> str:
    return statement.replace("%s", "?")
