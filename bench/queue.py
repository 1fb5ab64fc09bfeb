"""What it costs to store an event and to hand one over, however many are queued already.

    python -m bench queue [--cases 1000/100,100000/10000,1000000/100000,…]

A case is EVENTS/SESSIONS. Its tables are filled directly; then, in turns with the other cases, so
that whatever else the machine does meets all of them alike, these are timed, and the medians kept:

* `queue.enqueue` of one event, and of 32 of different sessions, in one transaction;
* what the heartbeat loop does for one session: `queue.next_due`, `queue.claim`, `queue.settle`.

A claim takes up to 200 events. Its cost is compared with the smallest case whose sessions hold as
many. Runs on SQLite, or on the PostgreSQL server that DATABASE_URL names.
"""

from __future__ import annotations

import argparse
import random
import secrets
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from datetime import datetime, timedelta
from pathlib import Path
from statistics import median
from typing import Any

import django
from django.db import connection, transaction
from django.db.models import Model
from django.utils import timezone
from uuid_utils.compat import uuid7

from bench import machine
from bench.report import Report

HELP = "cost of storing and of claiming, by how much is queued"
CASES = "1000/100,100000/10000,1000000/100000,20000/100,1000000/5000,1000000/100"
AIM = 1.3
MANY = 32
FILL_ROWS = 10_000
NO_LIMIT = 1_000_000_000


@dataclass
class Case:
    """So many events in so many sessions, its database, and what was timed, in seconds."""

    events: int
    sessions: int
    database: str = ""
    one: list[float] = field(default_factory=list)
    many: list[float] = field(default_factory=list)
    claimed: list[float] = field(default_factory=list)

    def __str__(self) -> str:
        return f"{self.events:,} in {self.sessions:,}"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--cases", type=parse_cases, default=parse_cases(CASES))
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--each", type=int, default=20, help="calls of each kind in a round")


def parse_cases(written: str) -> list[Case]:
    """Read EVENTS/SESSIONS,… into cases."""
    pairs = (case.split("/") for case in written.split(","))
    cases = [Case(int(events), int(sessions)) for events, sessions in pairs]
    if any(not MANY <= case.sessions <= case.events for case in cases):
        raise ValueError(f"at least {MANY} sessions, and an event for each")
    return cases


def run(options: argparse.Namespace, directory: Path) -> Report:
    return measure(directory, options.cases, rounds=options.rounds, each=options.each)


def measure(directory: Path, cases: Sequence[Case], *, rounds: int, each: int) -> Report:
    """Fill a database for each case, time them in turns, and compare."""
    django.setup()
    report = Report("queue", machine.describe(directory))
    report.notes.append(f"database: {connection.vendor}")
    with ExitStack() as stack:
        for number, case in enumerate(cases):
            case.database = stack.enter_context(_database(directory, number))
            with _on(case.database):
                _fill(case)
        for _ in range(rounds):
            for case in cases:
                with _on(case.database):
                    _time(case, each)
    for case in cases:
        alike = min(
            (other for other in cases if _held(other) == _held(case)), key=lambda c: c.events
        )
        smallest = min(cases, key=lambda other: other.events)
        for name, samples, first in (
            ("enqueue 1", case.one, smallest.one),
            (f"enqueue {MANY}", case.many, smallest.many),
            (f"claim and settle {_held(case)}", case.claimed, alike.claimed),
        ):
            report.add(f"{case}: {name}", median(samples) * 1000, "ms")
            if samples is not first:
                report.ratio(
                    f"{case}: {name}", [median(samples) / median(first)], AIM, better="less"
                )
    return report


def _held(case: Case) -> int:
    """Return how many events a claim takes."""
    return min(200, case.events // case.sessions)


# --- Databases ----------------------------------------------------------------------------------


@contextmanager
def _database(directory: Path, number: int) -> Iterator[str]:
    """Make a database and give its name."""
    if connection.vendor == "sqlite":
        yield str(directory / f"queue-{number}.sqlite3")
        return
    name = f"bench_{secrets.token_hex(6)}"
    with _on("postgres"), connection.cursor() as cursor:
        cursor.execute(f'CREATE DATABASE "{name}"')
    try:
        yield name
    finally:
        with _on("postgres"), connection.cursor() as cursor:
            cursor.execute(f'DROP DATABASE "{name}" WITH (FORCE)')


@contextmanager
def _on(database: str) -> Iterator[None]:
    """Let Django's connection be one to that database."""
    before = connection.settings_dict["NAME"]
    connection.close()
    connection.settings_dict["NAME"] = database
    try:
        yield
    finally:
        connection.close()
        connection.settings_dict["NAME"] = before


def _fill(case: Case) -> None:
    """Queue the case's events, each session's as if they had come one after the other."""
    from django.core.management import call_command

    from wake.models import DueReason, GatewaySettings, Session, SystemEvent

    call_command("migrate", verbosity=0, interactive=False)
    agent = GatewaySettings.ensure().default_agent
    now = timezone.now()
    each = case.events // case.sessions
    session = Session(
        agent=agent,
        key="",
        queued=each,
        due_at=now,
        due_reason=DueReason.WAKE,
        last_event_at=now,
        created_at=now,
    )
    _insert(session, ({"key": _key(number)} for number in range(case.sessions)))
    ids = list(Session.objects.order_by("pk").values_list("pk", flat=True))
    event = SystemEvent(
        uid=uuid7(), session_id=ids[0], text="", source="hook:bench", external=True, created_at=now
    )
    _insert(
        event,
        (
            {"uid": uuid7(), "session": ids[number % len(ids)], "text": f"event {number}"}
            for number in range(each * case.sessions)
        ),
    )
    if connection.vendor == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("ANALYZE")  # it does so by itself before long; SQLite never does


def _insert(example: Model, changes: Iterator[dict[str, Any]]) -> None:
    """Insert rows like the example, each with its changes: field names with values."""
    fields = [
        named
        for named in example._meta.local_concrete_fields
        if not named.generated and not (named.primary_key and example.pk is None)
    ]
    usual = {
        named.name: named.get_db_prep_save(getattr(example, named.attname), connection)
        for named in fields
    }
    prepare = {named.name: named.get_db_prep_save for named in fields}
    quote = connection.ops.quote_name
    columns = ", ".join(quote(str(named.column)) for named in fields)
    places = ", ".join("%s" for _ in fields)
    statement = f"INSERT INTO {quote(example._meta.db_table)} ({columns}) VALUES ({places})"  # noqa: S608
    rows: list[list[Any]] = []

    def flush() -> None:
        with transaction.atomic(), connection.cursor() as cursor:
            cursor.executemany(statement, rows)
        rows.clear()

    for change in changes:
        row = usual | {name: prepare[name](value, connection) for name, value in change.items()}
        rows.append(list(row.values()))
        if len(rows) == FILL_ROWS:
            flush()
    flush()


def _key(number: int) -> str:
    return f"agent:main:hook:bench:{number}"


# --- Timing -------------------------------------------------------------------------------------


def _time(case: Case, each: int) -> None:
    from wake import queue
    from wake.models import DueReason, HeartbeatStatus, RunnerKind
    from wake.session_keys import SessionKey

    def entries(count: int) -> list[queue.Entry]:
        at_once = queue.Due(timezone.now(), DueReason.WAKE)
        return [
            queue.Entry(
                SessionKey("main", _key(number)), secrets.token_hex(16), "hook:bench", True, at_once
            )
            for number in random.sample(range(case.sessions), count)
        ]

    def enqueue(count: int) -> Callable[[datetime], None]:
        stored = entries(count)

        def call(now: datetime) -> None:
            queue.enqueue(stored, now=now, max_queued=NO_LIMIT)

        return call

    terms = {"main": queue.Terms(running=0, most=1, runner=RunnerKind.NONE)}

    def claim(now: datetime) -> None:
        assert queue.next_due(queue.first_due(terms))
        claims = queue.claim(
            terms,
            limit=1,
            owner="bench",
            now=now,
            lease=timedelta(minutes=1),
        )
        queue.settle(claims[0], HeartbeatStatus.DELIVERED, now=now)

    connection.ensure_connection()
    for number in range(each + 1):
        one = _seconds(enqueue(1))
        many = _seconds(enqueue(MANY))
        claimed = _seconds(claim)
        if number:  # the first of each is for what a new connection reads once
            case.one.append(one)
            case.many.append(many)
            case.claimed.append(claimed)


def _seconds(call: Callable[[datetime], None]) -> float:
    now = timezone.now()
    began = time.perf_counter()
    call(now)
    return time.perf_counter() - began
