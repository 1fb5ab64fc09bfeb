"""Values as the database keeps them, for statements that no model writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
from django.db import connection


def moments() -> Callable[[datetime | None], Any]:
    """Return what makes aware times into what this database keeps: what a DateTimeField does."""
    return _in_utc_text if connection.vendor == "sqlite" else _unchanged


def _in_utc_text(moment: datetime | None) -> str | None:
    return None if moment is None else str(moment.astimezone(UTC).replace(tzinfo=None))


def _unchanged(moment: datetime | None) -> datetime | None:
    return moment


def moment_of(stored: datetime | str | None) -> datetime | None:
    """Return a stored time as an aware one.

    SQLite keeps UTC without saying so, and does not know that the result of a subquery is a time.
    """
    if isinstance(stored, str):
        stored = datetime.fromisoformat(stored)
    return stored.replace(tzinfo=UTC) if stored is not None and stored.tzinfo is None else stored


def uuid(value: UUID) -> UUID | str:
    """Return an id as this database keeps it: what a UUIDField does."""
    return value if connection.features.has_native_uuid_field else value.hex


def uuid_of(stored: UUID | str) -> UUID:
    """Return a stored id."""
    return stored if isinstance(stored, UUID) else UUID(stored)


def json_text(value: Any) -> str | None:
    """Return a value of a JSONField; None stays the database's null."""
    return None if value is None else msgspec.json.encode(value).decode()


def insert(table: str, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Insert rows of stored values, in their order."""
    statement = f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({marks(columns)})"  # noqa: S608
    with connection.cursor() as cursor:
        cursor.executemany(statement, list(rows))


def marks(values: Sequence[Any]) -> str:
    """Return a mark for each of the values, as a statement has them."""
    return ", ".join(["%s"] * len(values))
