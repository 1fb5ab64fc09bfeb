"""`manage.py prune`: what is old goes, what still matters stays, and nobody is held up."""

from __future__ import annotations

import os
import pty
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from io import StringIO
from pathlib import Path

import pytest
from django.core.management import call_command
from django.db import connection, connections
from django.utils import timezone
from uuid_utils.compat import uuid7

from hooks import pruning as hooks_pruning
from hooks.management.commands.prune import Command
from hooks.models import DeliveryOutcome, FailedCredentials, HookDelivery, IdempotencyKey
from tests.claims import terms
from tests.hooks.conftest import rows, set_policy
from tests.live import ROOT
from wake import pruning, queue, upkeep
from wake.models import (
    AgentTurn,
    DueReason,
    EventState,
    GatewaySettings,
    Heartbeat,
    HeartbeatStatus,
    Session,
    SystemEvent,
)
from wake.queue import Claim, Due, Entry
from wake.session_keys import SessionKey

pytestmark = pytest.mark.django_db

DAY = timedelta(days=1)
LEASE = timedelta(seconds=15)
KEY = SessionKey("main", "agent:main:hook:a")


@pytest.fixture(autouse=True)
def _settings(db: None) -> None:
    """The settings as they are out of the box: 90 days."""
    GatewaySettings.ensure()


def ago(days: float) -> datetime:
    return timezone.now() - timedelta(days=days)


def hand_in(at: datetime, key: SessionKey = KEY, *, turn: queue.Turn | None = None) -> None:
    entry = Entry(key, f"x {uuid7()}", "cli", False, Due(at, DueReason.WAKE), turn=turn)
    queue.enqueue([entry], now=at, max_queued=10_000)
    # Made by the clock of this machine, whatever the time that is passed in.
    Session.objects.filter(key=key.key).update(created_at=at)


def claimed(at: datetime) -> Claim:
    (claim,) = queue.claim(terms("main"), limit=1, owner="test", now=at, lease=LEASE)
    return claim


def delivered(at: datetime, key: SessionKey = KEY, *, turn: queue.Turn | None = None) -> None:
    hand_in(at, key, turn=turn)
    queue.settle(claimed(at), HeartbeatStatus.DELIVERED, now=at, reply="done")


def dead(at: datetime, key: SessionKey = KEY) -> None:
    """Store a dead letter: its first attempt failed, and so did the second one, for good."""
    hand_in(at, key)
    queue.fail(claimed(at), "first", now=at, max_attempts=2)
    again = at + timedelta(minutes=1)
    queue.fail(claimed(again), "no disk", now=again, max_attempts=2)


def store_delivery(at: datetime) -> HookDelivery:
    return HookDelivery.objects.create(
        uid=uuid7(),
        received_at=at,
        milliseconds=1,
        client="192.0.2.1",
        credential="token tests",
        path="wake",
        status=200,
        outcome=DeliveryOutcome.QUEUED,
    )


def prune(*arguments: str) -> dict[str, int]:
    """Run the command and return the numbers that it prints."""
    output = StringIO()
    call_command("prune", *arguments, stdout=output)
    lines = [line.split(": ") for line in output.getvalue().splitlines() if ": " in line]
    return {name: int(count.split()[0]) for name, count in lines}


def test_what_was_settled_long_ago_goes_with_its_heartbeat_and_its_empty_session() -> None:
    delivered(ago(91))
    assert prune() == {
        "deliveries": 0,
        "idempotency keys": 0,
        "failed credentials": 0,
        "events": 1,
        "heartbeats": 1,
        "sessions": 1,
    }
    assert rows() == (0, 0, 0)


def test_what_was_settled_lately_stays() -> None:
    delivered(ago(89))
    prune()
    assert rows() == (1, 1, 1)


def test_the_gateway_settings_say_how_long() -> None:
    GatewaySettings.objects.update(keep_settled_days=10)
    delivered(ago(11), SessionKey("main", "agent:main:old"))
    delivered(ago(9))
    prune()
    assert list(Session.objects.values_list("key", flat=True)) == [KEY.key]


def test_days_on_the_command_line_come_before_the_settings() -> None:
    store_delivery(ago(6))
    delivered(ago(6), SessionKey("main", "agent:main:old"))
    store_delivery(ago(4))
    delivered(ago(4))
    pruned = prune("--days", "5")
    assert (pruned["deliveries"], pruned["events"], pruned["sessions"]) == (1, 1, 1)
    assert HookDelivery.objects.count() == 1
    assert rows() == (1, 1, 1)


def test_queued_events_stay_however_old() -> None:
    hand_in(ago(1000))
    prune()
    assert rows() == (1, 1, 0)


def test_a_dead_letter_stays_with_the_heartbeat_that_tells_why() -> None:
    dead(ago(1000))
    assert Heartbeat.objects.count() == 2
    prune()
    event = SystemEvent.objects.select_related("heartbeat").get()
    assert event.heartbeat
    assert (event.state, event.heartbeat.error) == (EventState.DEAD, "no disk")
    assert rows() == (1, 1, 1)


def test_a_discarded_event_stays_for_as_long_after_it_was_discarded() -> None:
    dead(ago(1000))
    queue.discard(SystemEvent.objects.values_list("pk", flat=True), now=ago(89))
    prune()
    assert rows() == (1, 1, 1)
    SystemEvent.objects.update(settled_at=ago(91))
    prune()
    assert rows() == (0, 0, 0)


def test_a_heartbeat_that_runs_and_its_session_stay() -> None:
    hand_in(ago(200))
    claimed(ago(199))
    prune()
    assert rows() == (1, 1, 1)


def test_a_session_that_is_due_stays() -> None:
    delivered(ago(200))
    queue.wake_sessions(Session.objects.values_list("pk", flat=True), now=ago(100))
    prune()
    assert rows() == (1, 0, 0)


def test_a_turn_stays_until_its_note_is_written() -> None:
    turn = queue.Turn("summary")
    delivered(ago(200), turn=turn)
    prune()
    assert AgentTurn.objects.count() == 1
    AgentTurn.objects.update(noted_at=ago(200))
    prune()
    assert AgentTurn.objects.count() == 0
    assert rows() == (0, 0, 0)


def test_a_session_that_went_is_made_again_by_the_next_wake() -> None:
    delivered(ago(200))
    prune()
    hand_in(timezone.now())
    assert Session.objects.get().queued == 1


def test_a_session_that_gets_a_wake_meanwhile_stays() -> None:
    session = Session.objects.create(agent_id="main", key=KEY.key)
    Session.objects.update(created_at=ago(200))
    *_, sessions = pruning.kinds(timezone.now())
    assert list(sessions.rows) == [session]

    hand_in(timezone.now())
    assert pruning._delete(sessions.rows, [session.pk]) == 0
    assert rows() == (1, 1, 0)


def test_a_row_from_a_clock_that_ran_ahead_holds_nothing_up() -> None:
    hand_in(timezone.now() + 30 * DAY, SessionKey("main", "agent:main:ahead"))
    delivered(ago(91))
    assert prune()["events"] == 1


def test_deliveries_go_by_age() -> None:
    set_policy(keep_deliveries_days=10)
    old = store_delivery(ago(11))
    kept = store_delivery(ago(9))
    HookDelivery.objects.filter(pk=kept.pk).update(replay_of=old)
    assert prune()["deliveries"] == 1
    assert HookDelivery.objects.get().replay_of is None


@pytest.mark.parametrize("count", [1, 3, 5, 6])
def test_of_more_deliveries_than_allowed_the_oldest_go(count: int) -> None:
    set_policy(keep_deliveries_count=count)
    stored = [store_delivery(ago(0.5) + timedelta(seconds=second)) for second in range(5)]
    assert prune()["deliveries"] == max(5 - count, 0)
    kept = HookDelivery.objects.order_by("received_at")
    assert list(kept) == stored[-count:]


def test_deliveries_from_a_clock_that_ran_ahead_take_no_place() -> None:
    set_policy(keep_deliveries_count=3)
    ages = (-365, -364, -363, 0.1, 0.2)
    for age in reversed(ages):
        store_delivery(ago(age))
    assert prune()["deliveries"] == 0


def test_idempotency_keys_go_after_a_day_and_failed_credentials_after_a_minute() -> None:
    now = timezone.now()
    for name, age in (("old", timedelta(hours=24)), ("new", timedelta(hours=23))):
        IdempotencyKey.objects.create(digest=name, created_at=now - age)
    for name, seconds in (("192.0.2.1", 61), ("192.0.2.2", 30)):
        FailedCredentials.objects.create(client=name, updated_at=now - timedelta(seconds=seconds))
    pruned = prune()
    assert (pruned["idempotency keys"], pruned["failed credentials"]) == (1, 1)
    assert IdempotencyKey.objects.get().digest == "new"
    assert FailedCredentials.objects.get().client == "192.0.2.2"


def test_a_dry_run_tells_and_deletes_nothing() -> None:
    delivered(ago(200))
    store_delivery(ago(200))
    told = prune("--dry-run")
    assert (told["deliveries"], told["events"]) == (1, 1)
    assert HookDelivery.objects.count() == 1
    assert rows() == (1, 1, 1)


def test_each_batch_is_committed_by_itself_and_the_rest_is_left_to_others_meanwhile() -> None:
    for _ in range(5):
        store_delivery(ago(200))
    deliveries = next(iter(hooks_pruning.kinds(timezone.now())))
    pauses: list[float] = []
    batches = pruning.delete_in_batches(deliveries, batch=2, pause=pauses.append)
    left = [(deleted, HookDelivery.objects.count()) for deleted in batches]
    assert left == [(2, 3), (2, 1), (1, 0)]
    assert len(pauses) == 3
    assert all(pause > 0 for pause in pauses)


@pytest.mark.django_db(transaction=True)
def test_two_at_a_time_share_the_work() -> None:
    for _ in range(60):
        store_delivery(ago(200))
    together = threading.Barrier(2)

    def prune_here() -> int:
        deliveries = next(iter(hooks_pruning.kinds(timezone.now())))
        together.wait()
        try:
            return sum(pruning.delete_in_batches(deliveries, batch=5))
        finally:
            connections.close_all()

    with ThreadPoolExecutor(2) as threads:
        counts = [threads.submit(prune_here) for _ in range(2)]
        assert sum(count.result() for count in counts) == 60
    assert HookDelivery.objects.count() == 0


# --- The command as a process -------------------------------------------------------------------


def database_url() -> str:
    """Return where the tests' own database is, for another process."""
    name = connection.settings_dict["NAME"]
    if connection.vendor == "sqlite":
        return f"sqlite:///{name}"
    user, password, host, port = (
        connection.settings_dict[key] for key in ("USER", "PASSWORD", "HOST", "PORT")
    )
    return f"postgres://{user}:{password}@{host or 'localhost'}:{port or 5432}/{name}"


def start(*arguments: str, stderr: int, url: str) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(ROOT / "manage.py"), "prune", *arguments],
        env={**os.environ, "DATABASE_URL": url},
        stdout=subprocess.PIPE,
        stderr=stderr,
        text=True,
    )


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_it_can_be_interrupted_and_says_how_far_it_came(number: signal.Signals) -> None:
    HookDelivery.objects.bulk_create(
        [
            HookDelivery(uid=uuid7(), received_at=ago(200), milliseconds=1, status=200)
            for _ in range(3000)
        ]
    )
    process = start("--batch", "1", stderr=subprocess.PIPE, url=database_url())
    deadline = time.monotonic() + 30
    while HookDelivery.objects.count() > 2990:
        assert time.monotonic() < deadline
        time.sleep(0.02)
    process.send_signal(number)
    output, error = process.communicate(timeout=30)

    left = HookDelivery.objects.count()
    assert left > 0
    assert output == f"deliveries: {3000 - left} gone\n"
    assert error == "CommandError: stopped; the next prune goes on from here\n"
    assert process.returncode == 1


@pytest.mark.django_db(transaction=True)
def test_on_a_terminal_it_draws_its_progress() -> None:
    for _ in range(3):
        store_delivery(ago(200))
    ours, theirs = pty.openpty()
    process = start("--batch", "2", stderr=theirs, url=database_url())
    output, _ = process.communicate(timeout=30)
    os.close(theirs)
    drawn = os.read(ours, 10_000).decode()
    os.close(ours)

    assert f"deliveries [{'#' * 20}{' ' * 10}] 2 of 3" in drawn
    assert f"deliveries [{'#' * 30}] 3 of 3" in drawn
    assert drawn.endswith("\x1b[K")
    assert "deliveries: 3 gone\n" in output
    assert process.returncode == 0


def test_a_database_that_is_not_migrated_ends_with_status_1(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path / 'empty.sqlite3'}"
    process = start(stderr=subprocess.PIPE, url=url)
    _, error = process.communicate(timeout=30)
    assert process.returncode == 1
    assert error.startswith("CommandError: database: ")
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    "arguments",
    [["--days", "0"], ["--days", "4000"], ["--days", "x"], ["--batch", "0"], ["--nonsense"]],
)
def test_wrong_usage_ends_with_status_2(arguments: list[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        Command().run_from_argv(["manage.py", "prune", *arguments])
    assert ended.value.code == 2


# --- The server does it by itself ---------------------------------------------------------------


def test_a_server_process_prunes_every_hour() -> None:
    assert upkeep._chores["prune"].every == timedelta(hours=1)


@pytest.mark.django_db(transaction=True)
def test_the_server_prunes_until_it_is_stopped() -> None:
    for _ in range(pruning.BATCH_ROWS + 1):
        store_delivery(ago(200))
    stopped = threading.Event()
    stopped.set()
    hooks_pruning.prune(stopped)
    assert HookDelivery.objects.count() == 1
    hooks_pruning.prune(threading.Event())
    assert HookDelivery.objects.count() == 0


@pytest.fixture
def _no_chores() -> Iterator[None]:
    kept = dict(upkeep._chores)
    upkeep._chores.clear()
    yield
    upkeep._chores.clear()
    upkeep._chores.update(kept)


@pytest.mark.usefixtures("_no_chores")
def test_upkeep_goes_on_after_a_chore_that_fails() -> None:
    third_time = threading.Event()
    times: list[float] = []

    def fail(_: threading.Event) -> None:
        times.append(time.monotonic())
        if len(times) == 3:
            third_time.set()
        raise RuntimeError("a defect")

    upkeep.register("fail", timedelta(milliseconds=50), fail)
    with upkeep.keep_up():
        assert third_time.wait(5)
    assert times[2] - times[0] >= 0.1


@pytest.mark.usefixtures("_no_chores")
def test_upkeep_ends_with_the_server_in_the_middle_of_a_chore() -> None:
    begun, ended = threading.Event(), threading.Event()

    def wait(stopped: threading.Event) -> None:
        begun.set()
        stopped.wait()
        ended.set()

    upkeep.register("wait", timedelta(milliseconds=50), wait)
    with upkeep.keep_up():
        assert begun.wait(5)
        assert not ended.is_set()
    assert ended.is_set()
