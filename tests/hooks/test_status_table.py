"""The table of statuses in the contract, line by line, over a real socket of a real process.

408 is in test_slow_bodies, where the time is shorter.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path

import httpx
import pytest
from django.conf import settings

from tests.live import LiveGateway

SETUP = """
from hooks.models import HookMapping, HookPolicy
HookMapping.objects.create(
    name="each", match_path="each", for_each="items", text_template="{{items[0]}}"
)
HookMapping.objects.create(
    name="keyed", match_path="keyed", session_key="hook:{{id}}", text_template="x"
)
"""


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    # Without heartbeats the database is busy with what is sent alone.
    with LiveGateway(tmp_path_factory.mktemp("table"), arguments=("--no-heartbeats",)) as gateway:
        gateway.manage("shell", "-c", SETUP)
        deadline = time.monotonic() + 1
        with sender(gateway) as client:
            while client.post("/hooks/keyed", json={}).status_code == 404:
                assert time.monotonic() < deadline
        yield gateway


def sender(gateway: LiveGateway, token: str | None = None) -> httpx.Client:
    headers = {"Authorization": f"Bearer {token or gateway.hook_token}"}
    return httpx.Client(base_url=gateway.url, headers=headers, timeout=40)


@pytest.fixture
def client(gateway: LiveGateway) -> Iterator[httpx.Client]:
    with sender(gateway) as client:
        yield client


def test_200_stored(gateway: LiveGateway, client: httpx.Client) -> None:
    before = gateway.events()
    receipt = client.post("/hooks/wake", json={"text": "hello"})
    assert (receipt.status_code, receipt.json()["ok"]) == (200, True)
    run = client.post("/hooks/agent", json={"message": "hello"})
    assert (run.status_code, set(run.json())) == (200, {"ok", "runId"})
    assert gateway.events() == before + 2


def test_204_nothing_to_do(client: httpx.Client) -> None:
    answer = client.post("/hooks/each", json={"items": []})
    assert (answer.status_code, answer.content) == (204, b"")


@pytest.mark.parametrize(
    ("path", "body", "error"),
    [
        ("/hooks/wake", b"{", "not valid JSON"),
        ("/hooks/wake", b'{"text": " "}', "text required"),
        ("/hooks/wake", b'{"text": "x", "sessionKey": "hook:a"}', "is not allowed: turn on"),
        ("/hooks/keyed", b'{"id": "a"}', "is not allowed: turn on"),
        ("/hooks/keyed", b"{}", "requires a value for its session key"),
        ("/hooks/wake", b'{"text": "x", "agentId": "nobody"}', 'unknown agent "nobody"'),
        ("/hooks/wake?token=x", b'{"text": "x"}', "a token in the URL is not accepted"),
        ("/hooks/agent", b'{"message": "x", "channel": "telegram"}', "channel is not supported"),
    ],
)
def test_400_refused(client: httpx.Client, path: str, body: bytes, error: str) -> None:
    answer = client.post(path, content=body)
    assert answer.status_code == 400
    assert answer.json() == {"ok": False, "error": answer.json()["error"]}
    assert error in answer.json()["error"]


@pytest.mark.parametrize("headers", [{}, {"Authorization": "Bearer wrong"}])
def test_401_no_or_a_wrong_credential(gateway: LiveGateway, headers: dict[str, str]) -> None:
    answer = httpx.post(f"{gateway.url}/hooks/wake", json={"text": "x"}, headers=headers)
    assert (answer.status_code, answer.text) == (401, "Unauthorized\n")
    assert answer.headers["content-type"].startswith("text/plain")


@pytest.mark.parametrize("path", ["/hooks/nowhere", "/hooks", "/hooks/", "/elsewhere"])
def test_404_no_such_path(client: httpx.Client, path: str) -> None:
    assert client.post(path, json={}).status_code == 404


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "OPTIONS", "HEAD"])
def test_405_not_post(client: httpx.Client, method: str) -> None:
    answer = client.request(method, "/hooks/wake")
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


@pytest.mark.parametrize("streamed", [False, True])
def test_413_a_body_of_ten_megabytes(client: httpx.Client, streamed: bool) -> None:
    body = b"x" * 10_000_000
    content = iter([body[n : n + 65_536] for n in range(0, len(body), 65_536)])
    answer = client.post("/hooks/wake", content=content if streamed else body)
    assert answer.status_code == 413
    assert "262144 bytes" in answer.json()["error"]


def test_429_after_twenty_wrong_credentials_until_a_right_one(
    gateway: LiveGateway, client: httpx.Client, tmp_path: Path
) -> None:
    assert client.post("/hooks/wake", json={"text": "a right one"}).status_code == 200
    with (
        LiveGateway(tmp_path, arguments=("--no-heartbeats",), beside=gateway) as second,
        sender(gateway, "wrong") as wrong,
        sender(second, "wrong") as wrong_at_second,
    ):
        either = (wrong, wrong_at_second)
        statuses = [either[n % 2].post("/hooks/wake").status_code for n in range(22)]
        refused = wrong.post("/hooks/wake")
        assert client.post("/hooks/wake", json={"text": "still served"}).status_code == 200
        after = wrong.post("/hooks/wake")
    assert statuses == [401] * 20 + [429] * 2
    assert refused.status_code == 429
    assert 0 < int(refused.headers["retry-after"]) <= 60
    assert refused.json()["ok"] is False
    assert after.status_code == 401


def test_503_not_able_to_store_now(gateway: LiveGateway, client: httpx.Client) -> None:
    with locked_database(gateway):
        answer = client.post("/hooks/wake", json={"text": "x"})
    assert (answer.status_code, answer.json()["ok"]) == (503, False)
    assert int(answer.headers["retry-after"]) > 0
    assert client.post("/hooks/wake", json={"text": "x"}).status_code == 200


def test_404_when_hooks_are_off(gateway: LiveGateway, client: httpx.Client) -> None:
    switch = "from hooks.models import HookPolicy; HookPolicy.objects.update(enabled=%s)"
    gateway.manage("shell", "-c", switch % False)
    try:
        deadline = time.monotonic() + 1
        while client.post("/hooks/wake", json={"text": "x"}).status_code != 404:
            assert time.monotonic() < deadline
    finally:
        gateway.manage("shell", "-c", switch % True)


@contextlib.contextmanager
def locked_database(gateway: LiveGateway) -> Iterator[None]:
    """Hold what every writer needs, as a program that backs the database up badly might."""
    if settings.DATABASES["default"]["ENGINE"].endswith("postgresql"):
        import psycopg

        with psycopg.connect(gateway.database_url) as connection:
            connection.execute("LOCK TABLE wake_systemevent")
            yield
        return
    import sqlite3

    path = gateway.database_url.removeprefix("sqlite:///")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as lock:
        lock.execute("BEGIN IMMEDIATE")
        yield
        lock.execute("ROLLBACK")
