"""Counts that are right: in their transaction, over processes and restarts, as Prometheus reads."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path

import httpx
import pytest
from django.contrib.auth.models import User
from django.db import DatabaseError, connection, connections, transaction
from django.test import Client
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.parser import text_string_to_metric_families
from pytest_django import DjangoAssertNumQueries, Settings

from tests.admin_browser import signed_in, viewing_user
from tests.live import LiveGateway
from tests.wake.gateway_server import connected
from wake import exposition, metrics, tokens
from wake.dispatch import WakeRequest, dispatch, dispatch_batch
from wake.errors import QueueFull, Refused
from wake.models import GatewaySettings, Session, Tally

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)

Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


def read(page: bytes | str) -> Samples:
    """Return the samples of a page by name and labels, read by Prometheus' own parser."""
    text = page if isinstance(page, str) else page.decode()
    families: Iterable[Family] = text_string_to_metric_families(text)
    return {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in families
        for sample in family.samples
    }


def sample(samples: Samples, name: str, **labels: str) -> float:
    return samples.get((f"openclaw_{name}", frozenset(labels.items())), 0.0)


@pytest.fixture(autouse=True)
def _nothing_noted() -> Iterator[None]:
    metrics._noted.clear()
    yield
    metrics._noted.clear()


# --- Counting -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("source", "door"),
    [
        ("cli", "cli"),
        ("ws", "ws"),
        ("hook:wake", "hook"),
        ("hook:" + "x" * 150, "hook"),
        ("turn", "turn"),
        ("agent:main", "agent"),
        ("", "other"),
        ("hooks", "other"),
        ('x",y="', "other"),
    ],
)
def test_every_source_has_one_of_few_doors(source: str, door: str) -> None:
    assert metrics.door(source) == door


@pytest.mark.django_db
def test_what_a_transaction_counts_is_one_statement(
    django_assert_num_queries: DjangoAssertNumQueries,
) -> None:
    counts = metrics.Counts()
    for number in range(32):
        counts.wake(f"hook:{number}", "queued")
        counts.run("http", "delivered")
        counts.done([NOW, NOW - timedelta(minutes=20)], "delivered", NOW)
    with django_assert_num_queries(1):
        counts.write()
    with django_assert_num_queries(0):  # nothing is counted twice
        counts.write()
    counts.wake("hook:1", "queued", 3)
    counts.write()
    samples = read(exposition.page(NOW))
    assert sample(samples, "wakes_total", door="hook", outcome="queued") == 35
    assert sample(samples, "runs_total", runner="http", status="delivered") == 32
    assert sample(samples, "wake_to_done_seconds_count", outcome="delivered") == 64
    assert sample(samples, "wake_to_done_seconds_sum", outcome="delivered") == 32 * 1200
    assert sample(samples, "wake_to_done_seconds_bucket", outcome="delivered", le="600.0") == 32


@pytest.mark.django_db
def test_what_is_undone_was_not_counted() -> None:
    counts = metrics.Counts()
    counts.wake("cli", "queued")
    with transaction.atomic():
        counts.write()
        transaction.set_rollback(True)
    assert not Tally.objects.exists()


def test_labels_are_the_metrics_own_and_hold_nothing_else() -> None:
    counts = metrics.Counts()
    with pytest.raises(ValueError, match="wakes has the labels"):
        counts.count(metrics.WAKES, door="cli")
    counts.run('a,b=c"\n' * 30, "")
    ((_, labels),) = counts._amounts
    assert metrics.parsed(labels) == {"runner": ("a_b_c__" * 30)[:40], "status": "unknown"}


@pytest.mark.django_db
@given(
    seconds=st.lists(
        st.floats(-10, 2000, allow_nan=False) | st.sampled_from(metrics.BUCKETS), min_size=1
    )
)
def test_a_histogram_says_how_many_took_at_most_so_long(seconds: list[float]) -> None:
    took = [timedelta(seconds=value) for value in seconds]
    with transaction.atomic():
        counts = metrics.Counts()
        counts.started([NOW - each for each in took], NOW)
        counts.write()
        samples = read(exposition.page(NOW))
        transaction.set_rollback(True)
    exact = [max(0.0, each.total_seconds()) for each in took]
    for limit in metrics.BUCKETS:
        expected = sum(value <= limit for value in exact)
        name = metrics.bucket_name(limit)
        assert sample(samples, "wake_to_run_seconds_bucket", le=name) == expected
    assert sample(samples, "wake_to_run_seconds_bucket", le="+Inf") == len(exact)
    assert sample(samples, "wake_to_run_seconds_count") == len(exact)
    assert sample(samples, "wake_to_run_seconds_sum") == pytest.approx(sum(exact))


@pytest.mark.django_db(transaction=True)
def test_many_threads_lose_no_count_and_do_not_wait_in_a_circle() -> None:
    failures: list[BaseException] = []

    def work(number: int) -> None:
        try:
            # At worst, all of them share the rows.
            metrics._own.shard = 3
            for turn in range(20):
                counts = metrics.Counts()
                for name in ("cli", "ws", "hook:a") if (number + turn) % 2 else ("hook:b", "cli"):
                    counts.wake(name, "queued")
                with transaction.atomic():
                    counts.write()
        except BaseException as error:
            failures.append(error)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=work, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not failures
    samples = read(exposition.page(NOW))
    for door, expected in {"cli": 120, "ws": 60, "hook": 120}.items():
        assert sample(samples, "wakes_total", door=door, outcome="queued") == expected
    assert Tally.objects.count() == 3


@pytest.mark.django_db(transaction=True)
def test_what_was_noted_stays_noted_until_it_is_written(settings: Settings) -> None:
    metrics.note_wake("hook:x", "refused", 2)
    table = connection.ops.quote_name(Tally._meta.db_table)
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {table} RENAME TO away")
    try:
        with pytest.raises(DatabaseError):
            metrics.write_noted()
    finally:
        with connection.cursor() as cursor:
            cursor.execute(f"ALTER TABLE away RENAME TO {table}")
    metrics.note_wake("hook:x", "refused")
    metrics.write_noted()
    metrics.write_noted()
    samples = read(exposition.page(NOW))
    assert sample(samples, "wakes_total", door="hook", outcome="refused") == 3


# --- Who may look -------------------------------------------------------------------------------


@pytest.mark.django_db
def test_who_may_look(settings: Settings) -> None:
    settings.OPENCLAW_GATEWAY_TOKEN = "of the environment"
    _, reader = tokens.create_for_gateway("reader", scopes=["operator.read"])
    _, writer = tokens.create_for_gateway("writer", scopes=["operator.write"])
    ended, gone = tokens.create_for_gateway("gone")
    tokens.revoke(type(ended).objects.filter(pk=ended.pk), NOW)

    def status_with(token: str) -> int:
        return Client().get("/metrics", headers={"authorization": token}).status_code

    for token in (reader, writer, "of the environment"):
        assert status_with(f"Bearer {token}") == 200
        assert status_with(f"bearer  {token} ") == 200
        assert status_with(f"Basic {token}") == 401
        assert status_with(token) == 401
    for token in (gone, "", "och_x", "\xff\x00", "x" * 5000):
        assert status_with(f"Bearer {token}") == 401

    assert signed_in(viewing_user()).get("/metrics").status_code == 200
    nobody = signed_in(User.objects.create_user("nobody"))
    assert nobody.get("/metrics").status_code == 401
    answer = Client().get("/metrics")
    assert answer["WWW-Authenticate"] == "Bearer"
    assert answer.content.decode() == (
        'unauthorized: send a gateway token that holds operator.read, as "Authorization: Bearer '
        'ocg_…", or sign in to the admin\n'
    )
    settings.METRICS_PUBLIC = True
    answer = Client().get("/metrics", headers={"host": "10.1.2.3:9"})
    assert answer.status_code == 200
    assert answer["Content-Type"] == "text/plain; version=0.0.4; charset=utf-8"


# --- In the core --------------------------------------------------------------------------------


@pytest.mark.django_db
def test_the_queue_in_numbers() -> None:
    for text in ("a", "a", "b"):
        dispatch(WakeRequest(text, "ws", session_key="x"))
    dispatch(WakeRequest("c", "ws", session_key="y"))
    Session.objects.filter(key="agent:main:y").update(
        held_until=NOW + timedelta(days=900), due_at=NOW + timedelta(days=900)
    )
    samples = read(exposition.page(NOW + timedelta(days=800)))
    assert sample(samples, "events", state="queued") == 3
    assert sample(samples, "events", state="dead") == 0
    assert sample(samples, "sessions", state="due") == 1
    assert sample(samples, "sessions", state="held") == 1
    assert sample(samples, "uptime_seconds") > 0
    assert any(name == "openclaw_build_info" for name, _ in samples)


@pytest.mark.django_db
def test_wakes_that_are_refused_are_noted_by_their_door() -> None:
    GatewaySettings.ensure()
    GatewaySettings.objects.update(max_queued_events=1)
    with pytest.raises(Refused):
        dispatch(WakeRequest(" ", "cli"))
    results = dispatch_batch([WakeRequest(text, "ws", session_key="x") for text in "ab"])
    assert isinstance(results[1], QueueFull)
    metrics.write_noted()
    samples = read(exposition.page(NOW))
    assert sample(samples, "wakes_total", door="cli", outcome="refused") == 1
    assert sample(samples, "wakes_total", door="ws", outcome="full") == 1
    assert sample(samples, "wakes_total", door="ws", outcome="queued") == 1


# --- A known run --------------------------------------------------------------------------------

# What the database says, by SQL, under the names of the samples and of their labels.
STORED = {
    ("wakes_total", "door", "outcome"): """
        SELECT CASE WHEN source LIKE 'hook:%' THEN 'hook' ELSE source END, 'queued', COUNT(*)
        FROM wake_systemevent GROUP BY 1""",
    ("runs_total", "runner", "status"): """
        SELECT runner, status, COUNT(*) FROM wake_heartbeat GROUP BY runner, status""",
    ("wake_to_done_seconds_count", "outcome"): """
        SELECT state, COUNT(*) FROM wake_systemevent
        WHERE state IN ('delivered', 'dead') GROUP BY state""",
    ("wake_to_run_seconds_count",): "SELECT COUNT(*) FROM wake_systemevent",
    ("events", "state"): """
        SELECT 'dead', COUNT(*) FROM wake_systemevent WHERE state = 'dead'
        UNION ALL SELECT 'queued', COUNT(*) FROM wake_systemevent WHERE state = 'queued'""",
}
ASK = f"""
import json
from django.db import connection
answers = []
with connection.cursor() as cursor:
    for statement in {list(STORED.values())!r}:
        cursor.execute(statement)
        answers.append([[*row[:-1], float(row[-1])] for row in cursor.fetchall()])
print(json.dumps(answers))
"""


def stored(gateway: LiveGateway) -> Samples:
    """Return what the database holds as the samples that it must have led to."""
    answers = json.loads(gateway.manage("shell", "-v0", "-c", ASK).stdout.splitlines()[-1])
    return {
        (f"openclaw_{name}", frozenset(zip(labels, row[:-1], strict=True))): row[-1]
        for (name, *labels), rows in zip(STORED, answers, strict=True)
        for row in rows
    }


def scraped(gateway: LiveGateway) -> Samples:
    token = {"Authorization": f"Bearer {gateway.gateway_token}"}
    answer = httpx.get(f"{gateway.url}/metrics", headers=token)
    assert answer.status_code == 200, answer.text
    return read(answer.text)


def scrape_until(gateway: LiveGateway, is_there: Callable[[Samples], bool]) -> Samples:
    deadline = time.monotonic() + 60
    while not is_there(samples := scraped(gateway)):
        assert time.monotonic() < deadline, samples
        time.sleep(0.1)
    return samples


def test_the_metrics_of_a_known_run_equal_what_the_database_says(tmp_path: Path) -> None:
    agents = {
        "main": ("--", "/bin/cat"),
        "quiet": ("--", "/bin/echo", "HEARTBEAT_OK"),
        "failing": ("--max-attempts", "1", "--", "/bin/sh", "-c", "exit 3"),
        "slow": ("--pause", "--max-attempts", "1", "--", "/bin/sleep", "60"),
    }
    with LiveGateway(tmp_path, environment={"HEARTBEAT_LEASE_SECONDS": "2"}) as gateway:
        for agent, options in agents.items():
            gateway.manage("agents", "set", agent, "--every", "off", *options)
        headers = {"Authorization": f"Bearer {gateway.hook_token}"}

        def hook(path: str, status: int, /, **body: object) -> None:
            answer = httpx.post(f"{gateway.url}/hooks/{path}", json=body, headers=headers)
            assert answer.status_code == status, answer.text

        for agent in ("main", "quiet", "failing"):
            gateway.manage("system_event", "by hand", "--agent", agent, "--session-key", "cli")
        gateway.manage("system_event", "nobody", "--agent", "nobody", check=False)
        with connected(gateway.ws_url, auth={"token": gateway.gateway_token}) as wire:
            for number in range(5):
                agent = ("main", "quiet", "failing")[number % 3]
                wire.payload("wake", {"mode": "now", "text": f"{number}", "agentId": agent})
            assert wire.error("wake", {"mode": "now", "text": "x", "agentId": "nobody"})
            # A session that does not run yet, so that the second one finds the first.
            for _ in range(2):
                wire.payload("wake", {"mode": "now", "text": "same", "agentId": "slow"})
        hook("wake", 200, text="a hook", agentId="quiet")
        for _ in range(3):
            hook("wake", 200, text="once", agentId="main", idempotencyKey="key")
        hook("agent", 200, message="a turn", agentId="failing")
        hook("wake", 400, text=" ")
        hook("nothing-there", 404)
        headers["Authorization"] = "Bearer och_wrong"
        hook("wake", 401, text="x")
        # What has no transaction is written every few seconds.
        unauthorized = {"door": "hook", "outcome": "unauthorized"}
        scrape_until(gateway, lambda found: sample(found, "wakes_total", **unauthorized) == 1)
        # A run that ends with its process, and that the next one finds lost.
        gateway.manage("agents", "set", "slow", "--resume")
        scrape_until(gateway, lambda found: sample(found, "sessions", state="running") == 1)
        gateway.kill()
        gateway.start()
        open_work = [("events", "queued"), ("sessions", "running")]
        samples = scrape_until(
            gateway,
            lambda found: not any(sample(found, name, state=state) for name, state in open_work),
        )
        expected = stored(gateway)

    families = {name for name, _ in expected}
    told = {
        ("hook", "replayed"): 2,
        ("hook", "refused"): 2,
        ("hook", "unauthorized"): 1,
        ("ws", "refused"): 1,
        ("ws", "coalesced"): 1,
        ("cli", "refused"): 1,
    }
    expected |= {
        ("openclaw_wakes_total", frozenset({("door", door), ("outcome", outcome)})): count
        for (door, outcome), count in told.items()
    }
    assert {key: value for key, value in samples.items() if key[0] in families} == expected
    statuses = {dict(labels).get("status") for _, labels in expected}
    assert {"delivered", "quiet", "failed", "lost"} <= statuses
