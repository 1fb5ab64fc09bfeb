"""Values as the database keeps them, for statements that no model writes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from functools import lru_cache
from itertools import chain
from typing import Any, Final, TypeVar
from uuid import UUID

import msgspec
from django.db import connection

T = TypeVar("T")


def moments() -> Callable[[datetime | None], Any]:
    """Return what makes aware times into what this database keeps: what a DateTimeField does."""
    return _in_utc_text if connection.vendor == "sqlite" else _unchanged


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
    return _unchanged if connection.features.has_native_uuid_field else _in_hex


def _in_hex(value: UUID) -> str:
    return f"{value.int:032x}"


def uuid_of(stored: UUID | str) -> UUID:
    """Return a stored id."""
    return stored if isinstance(stored, UUID) else UUID(stored)


def json_text(value: Any) -> str | None:
    """Return a value of a JSONField; None stays the database's null."""
    return None if value is None else msgspec.json.encode(value).decode()


# So many rows go into one statement. On SQLite each step of a statement lets other threads run, and
# waits until it may go on: a hundred rows in one step are a hundred times less waiting.
ROWS_AT_ONCE: Final = 128


def select(columns: str, rest: str, parameters: Sequence[Any]) -> list[Sequence[Any]]:
    """Return the rows of `SELECT columns rest`, all at once: on SQLite, in one step.

    There truth values are 0 and 1, times are text: see `moment_of` and `uuid_of`.
    """
    statement = f"SELECT {columns} {rest}"
    if connection.vendor == "sqlite":
        names = ", ".join(name.strip().rpartition(".")[2] for name in columns.split(","))
        statement = f"SELECT json_group_array(json_array({names})) FROM ({statement})"  # noqa: S608
    with connection.cursor() as cursor:
        cursor.execute(statement, parameters)
        rows: list[Sequence[Any]] = cursor.fetchall()
    return msgspec.json.decode(rows[0][0]) if connection.vendor == "sqlite" else rows


def insert(table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Insert rows of stored values, in their order."""
    head = f"INSERT INTO {table} ({', '.join(columns)}) VALUES "  # noqa: S608
    for part in _parts(rows):
        _execute(head + _row_marks(len(columns), len(part)), part)


def update(table: str, columns: Sequence[str], rows: Sequence[Sequence[Any]]) -> None:
    """Set columns of rows: each is its id and then the values, as they are stored."""
    if connection.vendor != "sqlite":
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
        _execute(
            f"UPDATE {table} SET {sets} FROM (VALUES {values}) AS v "  # noqa: S608
            f"WHERE {table}.id = v.column1",
            part,
        )


def _parts(rows: Sequence[Sequence[Any]]) -> Iterator[Sequence[Sequence[Any]]]:
    return (rows[start : start + ROWS_AT_ONCE] for start in range(0, len(rows), ROWS_AT_ONCE))


@lru_cache(maxsize=1024)
def _row_marks(columns: int, rows: int) -> str:
    row = f"({', '.join(['%s'] * columns)})"
    return ", ".join([row] * rows)


def _execute(statement: str, rows: Sequence[Sequence[Any]]) -> None:
    with connection.cursor() as cursor:
        cursor.execute(statement, list(chain.from_iterable(rows)))


def delete(table: str, column: str, values: Sequence[Any]) -> None:
    """Delete the rows whose column is one of the values."""
    with connection.cursor() as cursor:
        cursor.execute(f"DELETE FROM {table} WHERE {column} IN ({marks(values)})", values)  # noqa: S608


def marks(values: Sequence[Any]) -> str:
    """Return a mark for each of the values, as a statement has them."""
    return ", ".join(["%s"] * len(values))
