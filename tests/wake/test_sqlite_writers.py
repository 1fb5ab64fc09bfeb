"""On SQLite the threads of a process write one after the other, without sleeping in between."""

from __future__ import annotations

import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from django.core.exceptions import ValidationError
from django.db import OperationalError, connection, connections, transaction

from wake.models import Agent

pytestmark = [
    pytest.mark.django_db(transaction=True),
    pytest.mark.skipif(connection.vendor != "sqlite", reason="PostgreSQL locks rows"),
]


def write(agent_id: str) -> float:
    """Write in a transaction of another thread; return when it was committed."""
    try:
        with transaction.atomic():
            Agent.objects.filter(pk=agent_id).update(name=agent_id)
        return time.monotonic()
    finally:
        connections.close_all()


def test_who_waits_writes_as_soon_as_the_other_one_has_committed() -> None:
    waited: list[float] = []
    with ThreadPoolExecutor(1) as other:
        for _ in range(5):
            with transaction.atomic():
                Agent.objects.create(id=f"a{len(waited)}")
                written = other.submit(write, "main")
                time.sleep(0.4)  # by now SQLite would sleep for a tenth of a second at a time
            committed = time.monotonic()
            waited.append(written.result() - committed)
    assert statistics.median(waited) < 0.02, waited


def test_a_transaction_that_fails_lets_the_next_one_write() -> None:
    with pytest.raises(ValidationError), transaction.atomic():
        Agent(id="a name with blanks").full_clean()
    with ThreadPoolExecutor(1) as other:
        assert other.submit(write, "main").result(5)


def test_a_connection_that_is_closed_in_a_transaction_lets_others_write() -> None:
    def leave() -> None:
        with transaction.atomic():
            Agent.objects.create(id="ops")
            connections.close_all()

    with ThreadPoolExecutor(1) as other:
        other.submit(leave).result(5)
        assert other.submit(write, "main").result(5)


def test_who_waits_too_long_is_told_that_the_database_is_locked(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert connection.settings_dict["ENGINE"] == "wake.sqlite"
    begun, done = threading.Event(), threading.Event()

    def hold() -> None:
        with transaction.atomic():
            begun.set()
            done.wait(10)
        connections.close_all()

    with ThreadPoolExecutor(1) as other:
        holding = other.submit(hold)
        begun.wait(10)
        monkeypatch.setitem(connection.settings_dict["OPTIONS"], "timeout", 0.1)
        with pytest.raises(OperationalError, match="database is locked"), transaction.atomic():
            pass
        done.set()
        holding.result(10)
    with transaction.atomic():
        Agent.objects.create(id="ops")
