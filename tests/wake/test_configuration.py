"""The snapshot of the configuration: how soon a change is in force."""

from __future__ import annotations

import asyncio
import itertools
import threading
import time
from contextlib import nullcontext
from datetime import timedelta
from typing import Any

import pytest
from asgiref.sync import sync_to_async
from django.core.exceptions import ValidationError
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from pytest_django import DjangoAssertNumQueries

from hooks import configuration as hooks_configuration
from hooks.models import AllowedSessionPrefix, HookPolicy
from wake import configuration
from wake.configuration import MAX_AGE_SECONDS, Snapshot
from wake.gateway import credentials
from wake.models import Agent, GatewaySettings, RunnerKind


@pytest.mark.django_db
def test_a_held_snapshot_costs_no_query(
    django_assert_num_queries: DjangoAssertNumQueries,
) -> None:
    configuration.gateway()
    with django_assert_num_queries(0):
        assert configuration.gateway().default_agent == "main"


@pytest.mark.django_db(transaction=True)
def test_a_change_is_in_force_at_once_in_the_process_that_made_it() -> None:
    assert "ops" not in configuration.gateway().agents
    agent = Agent.objects.create(id="ops", heartbeat_every=timedelta(0), command=["a", "b"])
    assert configuration.gateway().agents["ops"].command == ("a", "b")
    with transaction.atomic():
        agent.delete()
    assert "ops" not in configuration.gateway().agents


@pytest.mark.django_db
def test_a_change_of_another_process_is_in_force_within_a_second() -> None:
    configuration.gateway()
    GatewaySettings.objects.update(main_key="other")  # no signal: as if elsewhere
    began = time.monotonic()
    while configuration.gateway().main_key != "other":
        assert time.monotonic() - began < 1
        time.sleep(0.01)
    assert time.monotonic() - began <= MAX_AGE_SECONDS + 0.3


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("what", ["gateway", "hooks"])
def test_what_is_read_was_so_at_one_moment(what: str) -> None:
    """Two rows that always change together are never seen apart."""
    GatewaySettings.ensure()
    HookPolicy.ensure()
    AllowedSessionPrefix.objects.create(prefix="a")
    read_so_often, is_over = 200, threading.Event()

    def change_to(value: str) -> None:
        with transaction.atomic():
            GatewaySettings.objects.update(main_key=value)
            Agent.objects.update(name=value)
            HookPolicy.objects.update(default_session_key=value)
            AllowedSessionPrefix.objects.update(prefix=value)

    def change() -> None:
        for value in itertools.cycle(["b", "a"]):
            if is_over.is_set():
                break
            change_to(value)
        connection.close()

    def gateway_values() -> tuple[str, str]:
        read = configuration.read()
        return read.main_key, read.agents["main"].name

    def hooks_values() -> tuple[str, str]:
        read = hooks_configuration.read()
        return read.default_session_key, read.prefixes[0]

    values = {"gateway": gateway_values, "hooks": hooks_values}[what]
    change_to("a")
    changing = threading.Thread(target=change)
    changing.start()
    seen = {values() for _ in range(read_so_often)}
    is_over.set()
    changing.join()
    assert seen == {("a", "a"), ("b", "b")}


def test_what_was_read_before_a_change_is_not_held_after_it() -> None:
    """A slow reader on another thread must not bring the old value back."""
    reading, changed = threading.Event(), threading.Event()
    values = iter(["old", "new"])

    def read() -> str:
        value = next(values)
        if value == "old":
            reading.set()
            assert changed.wait(5)
        return value

    snapshot = Snapshot(read, max_age=60)
    slow = threading.Thread(target=snapshot.refresh)
    slow.start()
    assert reading.wait(5)
    snapshot._drop()  # what `forget` does; it needs no database here
    changed.set()
    slow.join()
    assert snapshot() == "new"


def test_a_snapshot_is_read_again_only_when_it_is_old() -> None:
    reads: list[int] = []

    def read() -> int:
        reads.append(len(reads))
        return reads[-1]

    snapshot = Snapshot(read, max_age=60)
    assert [snapshot(), snapshot()] == [0, 0]
    old = Snapshot(read, max_age=-1)
    assert [old(), old()] == [1, 2]


@pytest.mark.django_db
@pytest.mark.parametrize(
    "snapshot",
    [
        pytest.param(configuration.gateway, id="gateway"),
        pytest.param(hooks_configuration.hooks, id="hooks"),
        pytest.param(credentials._stored_tokens, id="tokens"),
    ],
)
def test_a_snapshot_names_every_table_that_it_reads(snapshot: Snapshot[Any]) -> None:
    """What changes in another one would be seen seconds later."""
    GatewaySettings.ensure()
    HookPolicy.ensure()
    with CaptureQueriesContext(connection) as read:
        snapshot.refresh()
    stands_in = {
        table
        for table in connection.introspection.table_names()
        if any(f'"{table}"' in query["sql"] for query in read.captured_queries)
    }
    assert stands_in == {table._meta.db_table for table in snapshot.tables}


@pytest.mark.django_db
def test_what_has_not_changed_is_read_again_only_after_a_while(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    reads: list[str] = []

    def read() -> str:
        reads.append(GatewaySettings.ensure().main_key)
        return reads[-1]

    snapshot = Snapshot(read, [GatewaySettings])
    try:
        GatewaySettings.ensure()
        for _ in range(5):
            snapshot.freshen()
        assert reads == ["main"]
        GatewaySettings.objects.update(main_key="other")  # no signal: as if elsewhere
        for _ in range(5):
            snapshot.freshen()
        assert reads == ["main", "other"]
        monkeypatch.setattr(configuration, "MAX_CONFIRMED_SECONDS", 0)
        snapshot.freshen()
        assert reads == ["main", "other", "other"]
    finally:
        configuration._snapshots.remove(snapshot)


@pytest.mark.django_db
def test_a_value_that_is_changed_back_elsewhere_is_seen_so() -> None:
    """The rows are again as they were when they were last looked at, but not when last read."""
    snapshot = Snapshot(lambda: GatewaySettings.ensure().main_key, [GatewaySettings])
    try:
        snapshot.freshen()
        GatewaySettings.objects.update(main_key="other")
        assert snapshot.refresh() == "other"  # as this process does when it has changed it
        GatewaySettings.objects.update(main_key="main")
        snapshot.freshen()
        assert snapshot() == "main"
    finally:
        configuration._snapshots.remove(snapshot)


@pytest.mark.django_db
def test_the_first_read_makes_the_default_agent() -> None:
    GatewaySettings.objects.all().delete()
    Agent.objects.all().delete()
    snapshot = configuration.read()
    assert (snapshot.default_agent, list(snapshot.agents)) == ("main", ["main"])
    assert snapshot.agents["main"].heartbeat_every == timedelta(minutes=30)
    assert not snapshot.agents["main"].runs


@pytest.mark.parametrize(
    ("fields", "runs"),
    [
        ({"runner": "command"}, True),
        ({"runner": "none"}, False),
        ({"runner": "command", "paused": True}, False),
        ({"runner": "command", "enabled": False}, False),
    ],
)
def test_which_agents_run(fields: dict[str, object], runs: bool) -> None:
    fields["runner"] = RunnerKind(str(fields["runner"]))
    assert configuration.AgentConfiguration("x", **fields).runs is runs  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"id": "Ops"}, "id"),
        ({"id": "a" * 65}, "id"),
        ({"id": "ops\n"}, "id"),
        ({"runner": "http"}, "url"),
        ({"runner": "command"}, "runner"),
        ({"heartbeat_every": timedelta(seconds=-1)}, "heartbeat_every"),
        ({"timeout_seconds": 0}, "timeout_seconds"),
        ({"max_attempts": 0}, "max_attempts"),
    ],
)
@pytest.mark.django_db
def test_an_agent_that_makes_no_sense_is_refused(fields: dict[str, object], named: str) -> None:
    with pytest.raises(ValidationError) as refused:
        Agent(**{"id": "ops", **fields}).full_clean()
    assert named in refused.value.message_dict


@pytest.mark.django_db
def test_secrets_are_encrypted_at_rest_and_not_shown() -> None:
    from django.db import connection

    Agent.objects.create(
        id="ops", runner="http", url="http://x.test", signing_secret="whsec_geheim"
    )
    with connection.cursor() as cursor:
        cursor.execute("SELECT signing_secret FROM wake_agent WHERE id = 'ops'")
        (stored,) = cursor.fetchone()
    assert stored
    assert "geheim" not in stored
    agent = configuration.read().agents["ops"]
    assert agent.signing_secret == "whsec_geheim"
    assert "geheim" not in repr(agent)


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("is_in_transaction", [False, True])
async def test_a_change_is_in_force_at_once_on_an_event_loop_too(is_in_transaction: bool) -> None:
    """A server's event loop reads nothing: what it finds there must be what was just stored."""

    def change(name: str) -> None:
        with transaction.atomic() if is_in_transaction else nullcontext():
            stored = GatewaySettings.ensure()
            stored.main_key = name
            stored.save()

    fresh = configuration.keep_fresh()
    await asyncio.to_thread(fresh.__enter__)
    try:
        for number in range(20):
            await sync_to_async(change)(f"key{number}")
            assert configuration.gateway().main_key == f"key{number}"
    finally:
        await asyncio.to_thread(fresh.__exit__, None, None, None)


@pytest.mark.django_db(transaction=True)
def test_whatever_goes_wrong_in_a_read_the_values_are_kept_fresh_afterwards(
    caplog: pytest.LogCaptureFixture,
) -> None:
    faults = iter([False, True])
    failed, read_again = threading.Event(), threading.Event()

    def read() -> str:
        if next(faults, False):
            failed.set()
            raise ValueError("a row that nobody understands")
        if failed.is_set():
            read_again.set()
        return "value"

    snapshot = Snapshot(read, max_age=60)
    try:
        with configuration.keep_fresh():
            for event in (failed, read_again):
                snapshot._drop()
                assert event.wait(5)
    finally:
        configuration._snapshots.remove(snapshot)
    assert "a row that nobody understands" in caplog.text
