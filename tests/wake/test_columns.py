"""Rows written without models are what models read, whatever is in them; on PostgreSQL also in a
pipeline."""

from __future__ import annotations

import os
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.db import DatabaseError, DataError, IntegrityError, connection, transaction
from django.test.utils import CaptureQueriesContext
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hooks.models import HookDelivery
from wake import columns
from wake.models import Session, SystemEvent
from wake.rows import lock_sessions
from wake.session_keys import SessionKey

pytestmark = pytest.mark.django_db(transaction=True)

EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
# What PostgreSQL keeps in no text; whoever writes has seen to it.
texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=20)
json = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | texts,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
    max_leaves=5,
)
moments = st.integers(0, 2**52).map(lambda us: EPOCH + timedelta(microseconds=us))
deliveries = st.fixed_dictionaries(
    {
        "received_at": moments,
        "milliseconds": st.floats(0, 1e6),
        "client": texts,
        "error": texts,
        "answer": json,
        "headers": st.dictionaries(texts, texts, max_size=3),
        "has_body": st.booleans(),
        "body": st.none() | st.binary(max_size=20),
    }
)
A_DELIVERY = {
    "received_at": EPOCH,
    "milliseconds": 1.5,
    "client": "127.0.0.1",
    "error": "",
    "answer": None,
    "headers": {},
    "has_body": False,
    "body": None,
}
ALWAYS = {
    "credential": "",
    "path": "wake",
    "mapping_name": "",
    "status": 200,
    "outcome": "queued",
    "idempotency_key": "",
}


def stored(delivery: dict[str, Any]) -> dict[str, Any]:
    """Return a delivery as `insert` takes it."""
    return {
        **delivery,
        "received_at": columns.moments()(delivery["received_at"]),
        "answer": columns.json_of(delivery["answer"]),
        "headers": columns.json_of(delivery["headers"]),
        "query": columns.json_of({}),
        "has_body": columns.flags()(delivery["has_body"]),
        "body": columns.blobs()(delivery["body"]),
    }


@pytest.mark.parametrize("is_pipelined", [False, True])
@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(rows=st.lists(deliveries, min_size=1, max_size=5))
def test_a_model_reads_what_was_inserted(is_pipelined: bool, rows: list[dict[str, Any]]) -> None:
    uids = [uuid4() for _ in rows]
    made = [
        {"uid": columns.uuids()(uid), **stored(row), **ALWAYS}
        for uid, row in zip(uids, rows, strict=True)
    ]
    names = tuple(made[0])
    with columns.pipelined_transaction() if is_pipelined else transaction.atomic():
        insert(names, made)
    found = {delivery.uid: delivery for delivery in HookDelivery.objects.filter(uid__in=uids)}
    for uid, row in zip(uids, rows, strict=True):
        delivery = found[uid]
        body = None if delivery.body is None else bytes(delivery.body)
        assert {name: getattr(delivery, name) for name in row} | {"body": body} == row
    assert sorted(uids, key=lambda uid: found[uid].pk) == uids, "in their order"


def insert(names: tuple[str, ...], made: list[dict[str, Any]]) -> None:
    columns.insert(
        HookDelivery._meta.db_table, names, [[row[name] for name in names] for row in made]
    )


def test_a_value_that_is_too_long_is_refused_and_not_cut() -> None:
    if columns.is_sqlite():
        pytest.skip("SQLite has no longest text")
    row = {"uid": columns.uuids()(uuid4()), **stored(A_DELIVERY), **ALWAYS, "path": "x" * 501}
    with pytest.raises(DataError), transaction.atomic():
        insert(tuple(row), [row])


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_columns_that_are_the_same_in_all_rows(is_pipelined: bool) -> None:
    uids = [uuid4() for _ in range(3)]
    own = {"uid", "milliseconds", "received_at"}
    same = {
        **{
            name: value
            for name, value in {**stored(A_DELIVERY), **ALWAYS}.items()
            if name not in own
        },
        "answer": {"ok": True, "of": [1, None]},
        "error": "",
        "headers": {},
        "query": {},
        "mapping_id": None,
        "body": None,
        "has_body": False,
    }
    moment = columns.moments()(datetime(2026, 1, 2, tzinfo=UTC))
    rows = [(columns.uuids()(uid), number + 0.5, moment) for number, uid in enumerate(uids)]
    with columns.pipelined_transaction() if is_pipelined else transaction.atomic():
        names = ("uid", "milliseconds", "received_at")
        columns.insert(HookDelivery._meta.db_table, names, rows, tuple(same.items()))
    found = HookDelivery.objects.filter(uid__in=uids).order_by("pk")
    assert [(row.uid, row.milliseconds) for row in found] == list(
        zip(uids, [0.5, 1.5, 2.5], strict=True)
    )
    for row in found:
        assert (row.answer, row.headers, row.query) == ({"ok": True, "of": [1, None]}, {}, {})
        assert (row.error, row.mapping_id, row.body, row.has_body) == ("", None, None, False)
        assert (row.status, row.outcome) == (ALWAYS["status"], ALWAYS["outcome"])


def test_an_update_sets_what_it_says_of_the_rows_that_it_says() -> None:
    sessions = [Session.objects.create(agent_id="main", key=f"agent:main:{n}") for n in range(3)]
    token, now = UUID(int=5), datetime(2026, 1, 2, 3, 4, 5, 678901, UTC)
    changed = [
        (session.pk, columns.uuids()(token), columns.moments()(now), "me")
        for session in sessions[:2]
    ]
    columns.update(Session._meta.db_table, ("lease_token", "lease_until", "lease_owner"), changed)
    found = Session.objects.order_by("pk").values_list("lease_token", "lease_until", "lease_owner")
    assert list(found) == [(token, now, "me")] * 2 + [(None, None, "")]


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(
    key=texts.filter(bool),
    due_at=moments,
    held_until=st.none() | moments,
    lease_token=st.none() | st.uuids(),
    batch_through=st.none() | st.integers(0, 2**53),
)
def test_a_session_is_read_as_its_model_wrote_it(
    key: str,
    due_at: datetime,
    held_until: datetime | None,
    lease_token: UUID | None,
    batch_through: int | None,
) -> None:
    Session.objects.all().delete()
    written = Session.objects.create(
        agent_id="main",
        key=key,
        due_at=due_at,
        held_until=held_until,
        lease_token=lease_token,
        lease_until=due_at if lease_token else None,
        batch_through=batch_through,
    )
    with transaction.atomic():
        (row,) = lock_sessions([SessionKey("main", key)]).values()
    fields = ("pk", "key", "queued", "due_at", "held_until", "lease_token", "batch_through")
    assert [getattr(row, name) for name in fields] == [getattr(written, name) for name in fields]


def spilled() -> int:
    """Return how many temporary files SQLite has open in this process."""
    return sum("/etilqs_" in os.path.realpath(link) for link in Path("/proc/self/fd").iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="open files are looked up in /proc")
def test_many_rows_on_many_pages_go_to_no_temporary_file() -> None:
    sessions = [Session.objects.create(agent_id="main", key=f"agent:main:{n}") for n in range(60)]
    now = columns.moments()(datetime(2026, 1, 2, tzinfo=UTC))
    events = {
        "session_id": 0,
        "text": "x" * 1500,
        "source": "cli",
        "external": columns.flags()(False),
        "state": "queued",
        "created_at": now,
    }

    def rows() -> list[list[Any]]:
        own = [(columns.uuids()(uuid4()), session.pk) for session in sessions]
        return [[uid, *({**events, "session_id": pk}.values())] for uid, pk in own]

    with transaction.atomic():
        columns.insert(SystemEvent._meta.db_table, ("uid", *events), rows())
        columns.insert(SystemEvent._meta.db_table, ("uid", *events), rows())
        keys = [(pk, "y" * 1500) for pk in SystemEvent.objects.values_list("pk", flat=True)]
        columns.update(SystemEvent._meta.db_table, ("text",), keys)
        assert spilled() == 0
    assert set(SystemEvent.objects.values_list("text", flat=True)) == {"y" * 1500}


def test_of_rows_that_one_does_not_fit_none_is_stored() -> None:
    uids = [columns.uuids()(uid) for uid in (UUID(int=1), UUID(int=2), UUID(int=1))]
    made = [{"uid": uid, **stored(A_DELIVERY), **ALWAYS} for uid in uids]
    with pytest.raises(IntegrityError), transaction.atomic():
        insert(tuple(made[0]), made)
    assert not HookDelivery.objects.exists()


@pytest.mark.parametrize("is_read", [False, True])
def test_a_failure_in_a_pipeline_is_a_database_error_and_undoes_all(is_read: bool) -> None:
    row = {"uid": columns.uuids()(uuid4()), **ALWAYS}  # columns are missing that may not be null

    def store() -> None:
        with columns.pipelined_transaction():
            Session.objects.create(agent_id="main", key="agent:main:a")
            insert(tuple(row), [row])
            if is_read:
                lock_sessions([SessionKey("main", "agent:main:a")])

    with pytest.raises(DatabaseError):
        store()
    assert not Session.objects.exists()
    assert not HookDelivery.objects.exists()
    assert not connection.in_atomic_block
    Session.objects.create(agent_id="main", key="agent:main:a")  # the connection is as good as new


def test_what_is_sent_after_a_failure_is_not_taken_for_done() -> None:
    row = {"uid": columns.uuids()(uuid4()), **ALWAYS}  # columns are missing that may not be null
    connection.ensure_connection()

    def store() -> None:
        with columns.pipelined_transaction():
            with suppress(DatabaseError):
                insert(tuple(row), [row])
                columns.fetch("SELECT 1", [])
            columns.fetch("SELECT 1", [])

    if columns.is_sqlite():
        store()
    else:
        with pytest.raises(DatabaseError):
            store()
    assert columns.fetch("SELECT 1", []) == [(1,)]


def test_a_server_that_goes_away_in_a_pipeline_is_a_database_error() -> None:
    if columns.is_sqlite():
        pytest.skip("SQLite has no server")
    connection.ensure_connection()
    other = connection.copy()

    def store() -> None:
        with columns.pipelined_transaction():
            ((pid,),) = columns.fetch("SELECT pg_backend_pid()", [])
            with other.cursor() as cursor:
                cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [pid])
            columns.execute("SELECT 1", [])
            columns.fetch("SELECT 1", [])

    try:
        with pytest.raises(DatabaseError):
            store()
    finally:
        other.close()
    connection.close_if_unusable_or_obsolete()
    with columns.pipelined_transaction():
        Session.objects.create(agent_id="main", key="agent:main:a")
    assert Session.objects.count() == 1


def test_more_than_a_socket_holds_goes_through_a_pipeline_in_both_directions() -> None:
    connection.ensure_connection()
    text = "x" * 30_000_000
    with columns.pipelined_transaction():
        for _ in range(2):
            columns.execute("SELECT %s || ''", [text])
        given = columns.fetch("SELECT %s || ''", [text])
    assert given == [(text,)]


def test_what_django_asks_within_a_pipeline_sees_what_was_sent() -> None:
    row = {"uid": columns.uuids()(uuid4()), **stored(A_DELIVERY), **ALWAYS}
    connection.ensure_connection()
    with columns.pipelined_transaction():
        for number in range(3):
            row["uid"] = columns.uuids()(UUID(int=number + 1))
            insert(tuple(row), [row])
            assert HookDelivery.objects.count() == number + 1
            Session.objects.create(agent_id="main", key=f"agent:main:{number}")
            ((sessions,),) = columns.fetch("SELECT count(*) FROM wake_session", [])
            assert sessions == number + 1
    assert (HookDelivery.objects.count(), Session.objects.count()) == (3, 3)


def test_a_pipeline_within_another_and_what_is_read_by_and_by_see_what_was_sent() -> None:
    row = {"uid": columns.uuids()(uuid4()), **stored(A_DELIVERY), **ALWAYS}
    connection.ensure_connection()
    with columns.pipelined_transaction():
        insert(tuple(row), [row])
        counted = columns.stream("SELECT count(*) FROM hooks_hookdelivery", [], at_once=1)
        assert list(counted) == [(1,)]
        with columns.pipelined_transaction():
            row["uid"] = columns.uuids()(uuid4())
            insert(tuple(row), [row])
        assert columns.fetch("SELECT count(*) FROM hooks_hookdelivery", []) == [(2,)]
    assert HookDelivery.objects.count() == 2


def test_a_transaction_that_is_to_be_undone_is_not_committed_in_a_pipeline() -> None:
    row = {"uid": columns.uuids()(uuid4()), **stored(A_DELIVERY), **ALWAYS}
    connection.ensure_connection()
    outer, inner = columns.pipelined_transaction(), transaction.atomic(savepoint=False)
    with outer, suppress(RuntimeError), inner:
        insert(tuple(row), [row])
        raise RuntimeError
    assert not HookDelivery.objects.exists()


def test_what_a_commit_refuses_is_undone() -> None:
    row = {"uid": columns.uuids()(uuid4()), **stored(A_DELIVERY), **ALWAYS, "mapping_id": 999}

    def store() -> None:
        with columns.pipelined_transaction():
            insert(tuple(row), [row])

    connection.ensure_connection()
    with pytest.raises(IntegrityError):
        store()
    assert not HookDelivery.objects.exists()


def test_a_pipelined_transaction_within_another_ends_with_that() -> None:
    row = {"uid": columns.uuids()(uuid4()), **stored(A_DELIVERY), **ALWAYS}

    def store(error: Exception | None) -> None:
        with transaction.atomic():
            with columns.pipelined_transaction():
                insert(tuple(row), [row])
            Session.objects.create(agent_id="main", key="agent:main:a")
            assert HookDelivery.objects.count() == 1
            if error:
                raise error

    connection.ensure_connection()
    with pytest.raises(RuntimeError):
        store(RuntimeError())
    assert not HookDelivery.objects.exists()
    store(None)
    assert (HookDelivery.objects.count(), Session.objects.count()) == (1, 1)


def write_as_one(session: Session, names: tuple[str, ...], row: dict[str, Any]) -> None:
    with columns.as_one():
        insert(names, [row])
        columns.update(Session._meta.db_table, ("own_runs",), [(session.pk, 7)])
        columns.execute("SELECT count(*) FROM wake_session WHERE id = %s", [session.pk])
        columns.delete(Session._meta.db_table, "key", ["agent:main:gone"])


@pytest.mark.parametrize("is_pipelined", [False, True])
def test_what_goes_as_one_is_all_done(is_pipelined: bool) -> None:
    session = Session.objects.create(agent_id="main", key="agent:main:a")
    Session.objects.create(agent_id="main", key="agent:main:gone")
    row = {"uid": columns.uuids()(uuid4()), **stored(A_DELIVERY), **ALWAYS}
    with columns.pipelined_transaction() if is_pipelined else transaction.atomic():
        write_as_one(session, tuple(row), row)
    assert list(Session.objects.values_list("pk", "own_runs")) == [(session.pk, 7)]
    assert HookDelivery.objects.count() == 1


def test_what_goes_as_one_is_one_statement_to_postgresql() -> None:
    session = Session.objects.create(agent_id="main", key="agent:main:a")
    row = {"uid": columns.uuids()(uuid4()), **stored(A_DELIVERY), **ALWAYS}
    with CaptureQueriesContext(connection) as captured:
        write_as_one(session, tuple(row), row)
    assert len(captured) == (1 if connection.vendor == "postgresql" else 4)


def test_what_goes_as_one_within_another_goes_with_that() -> None:
    session = Session.objects.create(agent_id="main", key="agent:main:a")
    row = {"uid": columns.uuids()(uuid4()), **stored(A_DELIVERY), **ALWAYS}
    with CaptureQueriesContext(connection) as captured, columns.as_one():
        columns.update(Session._meta.db_table, ("queued",), [(session.pk, 0)])
        write_as_one(session, tuple(row), row)
    assert len(captured) == (1 if connection.vendor == "postgresql" else 5)
    session.refresh_from_db()
    assert session.own_runs == 7


def test_what_is_gathered_can_be_sent_to_be_read() -> None:
    session = Session.objects.create(agent_id="main", key="agent:main:a")
    with transaction.atomic(), columns.as_one():
        columns.update(Session._meta.db_table, ("own_runs",), [(session.pk, 7)])
        columns.send_gathered()
        session.refresh_from_db()
        assert session.own_runs == 7
        columns.update(Session._meta.db_table, ("own_runs",), [(session.pk, 8)])
    session.refresh_from_db()
    assert session.own_runs == 8


def test_one_failure_of_what_goes_as_one_undoes_all_of_it() -> None:
    session = Session.objects.create(agent_id="main", key="agent:main:a")
    row = {"uid": columns.uuids()(uuid4()), **ALWAYS}  # columns are missing that may not be null
    with pytest.raises(DatabaseError), transaction.atomic():
        write_as_one(session, tuple(row), row)
    session.refresh_from_db()
    assert session.own_runs == 0


def test_what_failed_on_the_way_to_go_as_one_does_not_go_with_the_next() -> None:
    session = Session.objects.create(agent_id="main", key="agent:main:a")
    with pytest.raises(RuntimeError), columns.as_one():
        raise RuntimeError
    columns.update(Session._meta.db_table, ("own_runs",), [(session.pk, 7)])
    session.refresh_from_db()
    assert session.own_runs == 7


def test_what_is_prepared_reads_no_table_whole() -> None:
    if connection.vendor != "postgresql":
        pytest.skip("SQLite plans by rules, not by the size of tables: set DATABASE_URL")
    connection.close()
    connection.ensure_connection()
    keys = [SessionKey("main", f"agent:main:{n}") for n in range(3)]
    for _ in range(10):
        lock_sessions(keys[:1])
        with columns.pipelined_transaction():
            lock_sessions(keys)
    with connection.cursor() as cursor:
        cursor.execute("SELECT name, statement FROM pg_prepared_statements")
        (name,) = (name for name, statement in cursor.fetchall() if "FOR UPDATE" in statement)
        cursor.execute(f"EXPLAIN EXECUTE {name} ('{{main}}', '{{agent:main:1}}')")
        plan = "\n".join(row[0] for row in cursor.fetchall())
        cursor.execute("SHOW enable_seqscan")
        assert cursor.fetchone() == ("on",)
    assert "Seq Scan" not in plan
    assert "session_agent_key_unique" in plan


@settings(deadline=None)
@given(
    values=st.lists(
        st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")), min_size=1
    )
)
def test_any_of_finds_what_is_among_the_values(values: list[str]) -> None:
    column = "CAST(%s AS text)"
    condition, parameters = columns.any_of(column, values)
    for sought in (values[-1], values[0] + "x"):
        found = columns.fetch(f"SELECT 1 WHERE {condition}", [sought, *parameters])
        assert bool(found) == (sought in values)


def test_a_thread_may_find_by_index_alone_and_no_other_does() -> None:
    if connection.vendor != "postgresql":
        pytest.skip("SQLite plans by rules, not by the size of tables: set DATABASE_URL")

    def reads_tables_whole() -> bool:
        return columns.fetch("SHOW enable_seqscan", []) == [("on",)]

    def on_a_thread() -> list[bool]:
        seen = []
        for _ in range(2):  # the second time on another connection
            connection.ensure_connection()
            for _ in range(2):
                with columns.pipelined_transaction():
                    seen.append(reads_tables_whole())
                seen.append(reads_tables_whole())
                columns.find_by_index()
            connection.close()
        return seen

    with ThreadPoolExecutor(1) as thread:
        assert thread.submit(on_a_thread).result() == [False, True, False, False] * 2
    assert reads_tables_whole()
