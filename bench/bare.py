"""What the gateway is compared with: a server that only answers, a database that only stores.

    python -m bench.bare

serves the first one on a free port until SIGTERM, and says `ready URL` first.
"""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Awaitable, Callable
from contextlib import closing
from pathlib import Path
from typing import Any, Final

import msgspec
from uuid_utils.compat import uuid7

from bench.serving import serve

ANSWER: Final = msgspec.json.encode(
    {
        "ok": True,
        "mode": "now",
        "eventOutcome": "queued",
        "sessionKey": "agent:main:hook:bench:0",
        "eventId": str(uuid7()),
    }
)
HEADERS: Final = [
    (b"content-type", b"application/json"),
    (b"content-length", str(len(ANSWER)).encode()),
]


async def application(
    scope: dict[str, Any],
    receive: Callable[[], Awaitable[dict[str, Any]]],
    send: Callable[[dict[str, Any]], Awaitable[None]],
) -> None:
    """Read the body, decode it, and answer as a wake is answered."""
    body, more = b"", True
    while more:
        event = await receive()
        body += event.get("body", b"")
        more = event.get("more_body", False)
    msgspec.json.decode(body)
    await send({"type": "http.response.start", "status": 200, "headers": HEADERS})
    await send({"type": "http.response.body", "body": ANSWER})


def sqlite_rows(path: Path, rows_each: int, seconds: float) -> float:
    """Return how many rows a second SQLite stores with one commit for `rows_each` of them.

    Set up as the gateway's database is: a commit is on the disk before it returns.
    """
    stored = 0
    with closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA journal_mode=WAL")
        database.execute("PRAGMA synchronous=FULL")
        database.execute(
            "CREATE TABLE IF NOT EXISTS event "
            "(id INTEGER PRIMARY KEY, uid TEXT UNIQUE, session INTEGER, text TEXT, at TEXT)"
        )
        began = time.monotonic()
        while (spent := time.monotonic() - began) < seconds:
            rows = [
                (uuid7().hex, row % 50, f"bench {row:010}", "2026-01-01 00:00:00.000000")
                for row in range(stored, stored + rows_each)
            ]
            database.execute("BEGIN IMMEDIATE")
            database.executemany("INSERT INTO event (uid,session,text,at) VALUES (?,?,?,?)", rows)
            database.execute("COMMIT")
            stored += rows_each
    return stored / spent


if __name__ == "__main__":
    serve(application)
