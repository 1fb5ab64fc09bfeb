"""Wrong credentials: 20 within 60 seconds are answered with 401, further ones must wait."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta

import httpx
import pytest
from django.db import connection, transaction
from django.test.utils import CaptureQueriesContext
from hypothesis import given
from hypothesis import strategies as st

from hooks.models import FailedCredentials
from hooks.throttling import (
    FAILURES,
    WINDOW_SECONDS,
    clear,
    client_of,
    count,
    note_failure,
    prune,
    throttled_as,
)
from tests.live import LiveGateway

NOW = datetime(2026, 11, 22, 12, 0, tzinfo=UTC)
CLIENT = "203.0.113.7"


def seconds(amount: float) -> timedelta:
    return timedelta(seconds=amount)


def fail(client: str, times: int, now: datetime = NOW) -> list[int | None]:
    """Note so many failures at one time and return their answers."""
    return [note_failure(client, now) for _ in range(times)]


# --- The count, without a database ---------------------------------------------------------------

GAPS = st.one_of(st.just(0.0), st.floats(0, 5), st.floats(50, 70))


@given(st.lists(GAPS, max_size=120))
def test_a_failure_counts_unless_20_counted_in_the_60_seconds_before(gaps: list[float]) -> None:
    now, remembered, counted = NOW.timestamp(), list[float](), list[float]()
    for gap in gaps:
        now += gap
        recent = [time for time in counted if time > now - WINDOW_SECONDS]
        remembered, wait = count(remembered, now)
        assert (wait is None) == (len(recent) < FAILURES)
        if wait is None:
            counted.append(now)
        assert len(remembered) <= FAILURES


@given(st.lists(st.floats(-59.9, 0), min_size=20, max_size=20))
def test_the_wait_is_the_whole_seconds_until_a_failure_counts_again(ages: list[float]) -> None:
    now = NOW.timestamp()
    remembered, wait = count([now + age for age in ages], now)
    assert wait
    assert 1 <= wait <= WINDOW_SECONDS
    assert count(remembered, now + wait)[1] is None
    if wait > 1:
        assert count(remembered, now + wait - 1)[1] == 1


@given(st.lists(st.floats(-1e9, 1e9), max_size=80))
def test_nobody_waits_longer_than_60_seconds_whatever_the_clock_does(jumps: list[float]) -> None:
    now, remembered = NOW.timestamp(), list[float]()
    for jump in jumps:
        for _ in range(FAILURES):
            remembered, wait = count(remembered, now)
            if wait is not None:
                assert 1 <= wait <= WINDOW_SECONDS
                assert count(remembered, now + wait)[1] is None
        now += jump


# --- Who is counted ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("client", "counted_as"),
    [
        ("203.0.113.7", "203.0.113.7"),
        ("::ffff:203.0.113.7", "203.0.113.7"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:DB8:1:2::", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("fe80::1%eth0", "fe80::/64"),
        ("::1", "::/64"),
        ("unknown", "unknown"),
        ("203.0.113.7.example", "203.0.113.7.example"),
    ],
)
def test_an_ipv4_address_or_an_ipv6_network_is_counted(client: str, counted_as: str) -> None:
    assert throttled_as(client) == counted_as
    assert throttled_as(counted_as) == counted_as


@given(st.one_of(st.text(), st.ip_addresses().map(str)))
def test_any_address_can_be_counted(address: str) -> None:
    client = client_of({"REMOTE_ADDR": address})
    assert len(client) <= 64
    assert 0 < len(throttled_as(client)) <= 64


def test_a_client_without_an_address_is_unknown_whatever_its_headers_say() -> None:
    headers = {"HTTP_X_FORWARDED_FOR": "1.2.3.4", "HTTP_X_REAL_IP": "1.2.3.4"}
    assert client_of(headers) == "unknown"
    assert client_of({**headers, "REMOTE_ADDR": CLIENT}) == CLIENT


# --- In the database -----------------------------------------------------------------------------


@pytest.mark.django_db
def test_the_21st_failure_within_a_minute_must_wait() -> None:
    for place in range(FAILURES):
        assert note_failure(CLIENT, NOW + seconds(place)) is None
    assert note_failure(CLIENT, NOW + seconds(20)) == 40
    assert note_failure(CLIENT, NOW + seconds(59.5)) == 1
    # One place becomes free with each second.
    assert fail(CLIENT, 2, NOW + seconds(60)) == [None, 1]


@pytest.mark.django_db
def test_each_client_is_counted_alone() -> None:
    fail(CLIENT, FAILURES)
    assert note_failure("203.0.113.8", NOW) is None
    fail("2001:db8::1", FAILURES)
    assert note_failure("2001:db8::ffff:1", NOW) == 60
    assert note_failure("2001:db8:0:1::1", NOW) is None


@pytest.mark.django_db
def test_a_flood_writes_nothing_and_takes_no_lock() -> None:
    fail(CLIENT, FAILURES)
    with CaptureQueriesContext(
        connection,
    ) as queries:
        assert fail(CLIENT, 5, NOW + seconds(1)) == [59] * 5
    assert len(queries) == 5
    assert all(query["sql"].startswith("SELECT") for query in queries)
    assert not any("FOR UPDATE" in query["sql"] for query in queries)


@pytest.mark.django_db
def test_a_clock_that_is_set_back_stops_nobody_for_longer_than_a_minute() -> None:
    fail(CLIENT, FAILURES, NOW + timedelta(hours=1))
    assert note_failure(CLIENT, NOW) == 60
    assert note_failure(CLIENT, NOW + seconds(30)) == 30
    assert note_failure(CLIENT, NOW + seconds(60)) is None


@pytest.mark.django_db
def test_a_right_credential_clears_the_count_with_one_statement() -> None:
    fail("2001:db8::1", FAILURES)
    fail(CLIENT, FAILURES)
    with transaction.atomic(), CaptureQueriesContext(connection) as queries:
        clear(["2001:db8::2"])
    assert [query["sql"].split()[0] for query in queries] == ["DELETE"]
    assert fail("2001:db8::1", FAILURES + 1) == [*[None] * FAILURES, 60]
    assert note_failure(CLIENT, NOW) == 60


@pytest.mark.django_db
def test_what_is_older_than_a_minute_goes_when_another_client_fails() -> None:
    fail("a", 1, NOW - seconds(60))
    fail("b", FAILURES, NOW - seconds(59))
    fail("c", 1)
    assert {row.client for row in FailedCredentials.objects.all()} == {"b", "c"}
    assert prune(NOW + seconds(1)) == 1
    assert prune(NOW + seconds(60)) == 1
    assert not FailedCredentials.objects.exists()


@pytest.fixture
def broken_table(transactional_db: None) -> Iterator[None]:
    """The table of failures cannot be used."""
    table = FailedCredentials._meta.db_table
    with connection.cursor() as cursor:
        cursor.execute(f"ALTER TABLE {table} RENAME TO moved_away")
        yield
        cursor.execute(f"ALTER TABLE moved_away RENAME TO {table}")


@pytest.mark.usefixtures("broken_table")
def test_a_database_that_cannot_count_says_so_in_the_log_alone(
    caplog: pytest.LogCaptureFixture,
) -> None:
    assert note_failure(CLIENT, NOW) is None
    assert f"a wrong credential from {CLIENT} is not counted" in caplog.text


@pytest.mark.django_db(transaction=True)
@pytest.mark.parametrize("counted_before", [0, 15])
def test_failures_at_the_same_time_are_each_counted(counted_before: int) -> None:
    fail(CLIENT, counted_before)
    together = threading.Barrier(8)

    def fail_often(_: int) -> list[int | None]:
        try:
            together.wait(10)
            return fail(CLIENT, 5)
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as threads:
        answers = [answer for some in threads.map(fail_often, range(8)) for answer in some]
    assert answers.count(None) == FAILURES - counted_before
    assert set(answers) == {None, 60}


@pytest.mark.django_db(transaction=True)
def test_failures_and_right_credentials_at_the_same_time_do_not_hinder_each_other(
    caplog: pytest.LogCaptureFixture,
) -> None:
    def repeat(number: int) -> None:
        try:
            for step in range(25):
                if number % 2:
                    note_failure(CLIENT, NOW + seconds(step))
                else:
                    clear([CLIENT])
        finally:
            connection.close()

    with ThreadPoolExecutor(4) as threads:
        list(threads.map(repeat, range(4)))
    assert caplog.text == ""


# --- At the door ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """A gateway that believes two proxies."""
    trusted = {"TRUSTED_PROXIES": "127.0.0.1,10.0.0.0/8"}
    with LiveGateway(tmp_path_factory.mktemp("gateway"), environment=trusted) as gateway:
        yield gateway


def knock(
    gateway: LiveGateway, *forwarded_for: str, right: bool = False, source: str = "127.0.0.1"
) -> list[int]:
    """Send a wake for each X-Forwarded-For, from one address, and return the answers' statuses."""
    token = gateway.hook_token if right else "wrong"
    transport = httpx.HTTPTransport(local_address=source)
    headers = {"Authorization": f"Bearer {token}"}
    with httpx.Client(base_url=gateway.url, headers=headers, transport=transport) as client:
        answers = [
            client.post("/hooks/wake", json={"text": "x"}, headers={"X-Forwarded-For": value})
            for value in forwarded_for
        ]
    for answer in answers:
        if answer.status_code == 429:
            assert 1 <= int(answer.headers["Retry-After"]) <= WINDOW_SECONDS
            assert answer.json() == {"ok": False, "error": answer.json()["error"]}
    return [answer.status_code for answer in answers]


REFUSED = [*[401] * FAILURES, 429]


def test_a_right_credential_is_served_and_clears_the_count(gateway: LiveGateway) -> None:
    client = "198.51.100.1"
    assert knock(gateway, *[client] * 21) == REFUSED
    assert knock(gateway, client, right=True) == [200]
    assert knock(gateway, *[client] * 21) == REFUSED


def test_two_clients_behind_the_proxy_are_counted_apart(gateway: LiveGateway) -> None:
    assert knock(gateway, *["198.51.100.2"] * 21) == REFUSED
    assert knock(gateway, "198.51.100.3") == [401]


def test_what_a_client_writes_before_the_proxy_is_not_believed(gateway: LiveGateway) -> None:
    written = [f"192.0.2.{number}, 198.51.100.4, 10.1.2.3" for number in range(21)]
    assert knock(gateway, *written) == REFUSED
    assert knock(gateway, "192.0.2.1", "198.51.100.4") == [401, 429]


def test_a_client_that_is_no_proxy_cannot_name_another_address(gateway: LiveGateway) -> None:
    written = [f"198.51.100.{100 + number}" for number in range(21)]
    assert knock(gateway, *written, source="127.0.0.2") == REFUSED
    assert knock(gateway, written[0]) == [401]
