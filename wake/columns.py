"""Values as the database keeps them, for statements that no model writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from functools import cache, lru_cache
from itertools import chain
from typing import Any, Final, TypeVar
from uuid import UUID

import msgspec
from django.db import DEFAULT_DB_ALIAS, connection, connections

T = TypeVar("T")


@cache
def is_sqlite() -> bool:
    """Whether the database is SQLite; else it is PostgreSQL. Django takes its time to say."""
    return connection.vendor == "sqlite"


def moments() -> Callable[[datetime | None], Any]:
    """Return what makes aware times into what this database keeps: what a DateTimeField does."""
    return _in_utc_text if is_sqlite() else _unchanged


@lru_cache(maxsize=256)  # one moment is written many times in a transaction
def _in_utc_text(moment: datetime | None) -> str | None:
    if moment is None:
        return None
    utc = moment if moment.tzinfo is UTC else moment.astimezone(UTC)
    return utc.isoformat(" ")[:_WITHOUT_OFFSET]


_WITHOUT_OFFSET: Final = -len("+00:00")


def _unchanged(value: T) -> T:
    return value


def moment_of(stored: datetime | str | None) -> datetime | None:
    """Return a stored time as an aware one.

    SQLite keeps UTC without saying so, and does not know that the result of a subquery is a time.
    """
    if isinstance(stored, str):
        stored = datetime.fromisoformat(stored)
    return stored.replace(tzinfo=UTC) if stored is not None and stored.tzinfo is None else stored


def uuids() -> Callable[[UUID], Any]:
    """Return what makes ids into what this database keeps: what a UUIDField does."""
    return _in_hex if is_sqlite() else _unchanged


def _in_hex(value: UUID) -> str:
    return f"{value.int:032x}"


def flags() -> Callable[[bool], Any]:
    """Return what makes truth values into what this database keeps: what a BooleanField does."""
    return int if is_sqlite() else _unchanged


def uuid_of(stored: UUID | str) -> UUID:
    """Return a stored id."""
    return stored if isinstance(stored, UUID) else UUID(stored)


def json_text(value: Any) -> str | None:
    """Return a value of a JSONField; None stays the database's null."""
    return None if value is None else msgspec.json.encode(value).decode()


# So many rows go into one statement, or half as many, a quarter, …: each number is another
# statement to prepare. On SQLite each step of one lets other threads run, and waits until it may go
# on: a hundred rows in one step are a hundred times less waiting.
ROWS_AT_ONCE: Final = 128


def select(columns: str, rest: str, parameters: Sequence[Any]) -> list[Sequence[Any]]:
    """Return the rows of `SELECT columns rest`, all at once: on SQLite, in one step.

    There truth values are 0 and 1, times are text: see `moment_of` and `uuid_of`.
    """
    statement = f"SELECT {columns} {rest}"
    if is_sqlite():
        names = ", ".join(name.strip().rpartition(".")[2] for name in columns.split(","))
        statement = f"SELECT json_group_array(json_array({names})) FROM ({statement})"  # noqa: S608
    rows = fetch(statement, parameters)
    return msgspec.json.decode(rows[0][0]) if is_sqlite() else rows


def insert(table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Insert rows of stored values, in their order."""
    head = f"INSERT INTO {table} ({', '.join(columns)}) VALUES "  # noqa: S608
    for part in _parts(rows):
        execute(head + _row_marks(len(columns), len(part)), list(chain.from_iterable(part)))


def update(table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Set columns of rows: each is its id and then the values, as they are stored."""
    if not is_sqlite():
        sets = ", ".join(f"{column} = %s" for column in columns)
        with connection.cursor() as cursor:
            cursor.executemany(
                f"UPDATE {table} SET {sets} WHERE id = %s",  # noqa: S608
                [(*values, pk) for pk, *values in rows],
            )
        return
    sets = ", ".join(f"{column} = v.column{place}" for place, column in enumerate(columns, 2))
    for part in _parts(rows):
        values = _row_marks(len(columns) + 1, len(part))
        execute(
            f"UPDATE {table} SET {sets} FROM (VALUES {values}) AS v "  # noqa: S608
            f"WHERE {table}.id = v.column1",
            list(chain.from_iterable(part)),
        )


def _parts(rows: Sequence[T]) -> Iterator[Sequence[T]]:
    start, size = 0, ROWS_AT_ONCE
    while start < len(rows):
        while size > len(rows) - start:
            size //= 2
        yield rows[start : start + size]
        start += size


def padded(values: Sequence[T]) -> Sequence[T]:
    """Return values, at least one, for an `IN`: the last one again and again up to a power of two.

    So that the same few statements do for any number of values.
    """
    return [*values, *[values[-1]] * ((1 << (len(values) - 1).bit_length()) - len(values))]


@lru_cache(maxsize=256)
def _row_marks(columns: int, rows: int) -> str:
    row = f"({', '.join(['%s'] * columns)})"
    return ", ".join([row] * rows)


def delete(table: str, column: str, values: Sequence[Any]) -> None:
    """Delete the rows whose column is one of the values."""
    execute(f"DELETE FROM {table} WHERE {column} IN ({marks(values)})", values)  # noqa: S608


def fetch(statement: str, parameters: Sequence[Any]) -> list[Sequence[Any]]:
    """Return the rows of a statement."""
    with _run(statement, parameters) as cursor:
        rows: list[Sequence[Any]] = cursor.fetchall()
        return rows


def stream(statement: str, parameters: Sequence[Any], *, at_once: int) -> Iterator[Sequence[Any]]:
    """Yield the rows of a statement, read a few at a time."""
    with _run(statement, parameters) as cursor:
        while rows := cursor.fetchmany(at_once):
            yield from rows


def execute(statement: str, parameters: Sequence[Any]) -> int:
    """Run a statement, and return how many rows it changed."""
    with _run(statement, parameters) as cursor:
        return int(cursor.rowcount)


@contextmanager
def _run(statement: str, parameters: Sequence[Any]) -> Iterator[Any]:
    """Run a statement and give its cursor.

    On SQLite past Django's, which takes longer than most statements; but not where somebody listens
    to what is executed, nor before there is a connection.
    """
    database: Any = connections[DEFAULT_DB_ALIAS]
    is_short_way_open = (
        is_sqlite()
        and database.connection is not None
        and not database.execute_wrappers
        and not database.queries_logged
    )
    if is_short_way_open:
        with database.wrap_database_errors:
            yield database.connection.execute(_with_question_marks(statement), parameters)
        return
    with database.cursor() as cursor:
        cursor.execute(statement, parameters)
        yield cursor


@lru_cache(maxsize=256)
def _with_question_marks(statement: str) -> str:
    return statement.replace("%s", "?")


def marks(values: Sequence[Any]) -> str:
    """Return a mark for each of the values, as a statement has them."""
    return ", ".join(["%s"] * len(values))
