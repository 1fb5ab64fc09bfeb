"""`/healthz` and `/readyz`: for any Host, without a login, and why not."""

from __future__ import annotations

import time
from pathlib import Path

import httpx
import pytest
from django.db import connection
from django.db.migrations.recorder import MigrationRecorder
from django.test import Client

from hooks.models import HookPolicy
from tests.live import LiveGateway
from wake import status
from wake.heartbeats import pulse

HEADERS = ("Content-Security-Policy", "X-Content-Type-Options", "X-Frame-Options")


@pytest.fixture(autouse=True)
def _no_heartbeats_here() -> None:
    pulse.expect(False)


@pytest.mark.django_db
@pytest.mark.parametrize("path", ["/healthz", "/readyz"])
def test_a_probe_is_answered_for_any_host_and_with_the_headers_of_every_page(path: str) -> None:
    answer = Client().get(path, headers={"host": "10.9.8.7:8000"})
    assert (answer.status_code, answer.content) == (200, b"ok\n")
    assert answer["Content-Type"] == "text/plain; charset=utf-8"
    assert answer["Cache-Control"] == "no-store"
    other = Client().get("/admin/login/")
    assert {name: answer[name] for name in HEADERS[1:]} == {
        name: other[name] for name in HEADERS[1:]
    }
    assert "default-src 'none'" in answer["Content-Security-Policy"]
    assert not answer.cookies


def test_healthz_needs_no_database() -> None:
    # Without the mark, pytest-django lets nothing reach the database.
    assert Client().get("/healthz").status_code == 200


@pytest.mark.django_db
@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_other_methods_and_other_paths_are_no_probes(path: str) -> None:
    assert Client().head(path).status_code in (200, 401)
    for method in ("post", "put", "delete", "options"):
        answer = getattr(Client(), method)(path)
        assert (answer.status_code, answer["Allow"]) == (405, "GET, HEAD")
    for other in (f"{path}/", f"/x{path}", path.upper()):
        assert Client().get(other).status_code == 404


@pytest.mark.django_db
@pytest.mark.parametrize("path", ["/healthz", "/readyz", "/metrics"])
def test_no_base_path_of_hooks_hides_a_probe(path: str) -> None:
    HookPolicy.ensure()
    # As a row that was stored before the path was taken: the admin refuses it.
    HookPolicy.objects.update(base_path=path)
    assert Client().get(path).status_code in (200, 401)
    assert Client().get(path)["Content-Type"].startswith("text/plain")


@pytest.mark.django_db
def test_readyz_says_what_is_wrong_with_the_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    pulse.expect(True)
    answer = Client().get("/readyz")
    assert (answer.status_code, answer.content) == (
        503,
        b"the heartbeat loop has not begun yet\n",
    )
    pulse.beat()
    assert Client().get("/readyz").status_code == 200
    monkeypatch.setattr(pulse, "_last", time.monotonic() - 45)
    answer = Client().get("/readyz")
    assert answer.content == b"the heartbeat loop has not looked for work for 45 s\n"
    pulse.expect(False)


@pytest.mark.django_db(transaction=True)
def test_readyz_says_that_migrations_are_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(status, "_was_migrated", False)
    last = MigrationRecorder.Migration.objects.filter(app="wake").order_by("-name")[:1]
    name = last.get().name
    rename = MigrationRecorder.Migration.objects.filter(app="wake", name__in=[name, "x"]).update
    rename(name="x")
    try:
        answer = Client().get("/readyz")
        assert (answer.status_code, answer.content) == (503, b"the database is not migrated\n")
    finally:
        rename(name=name)
    assert Client().get("/readyz").status_code == 200


def test_a_gateway_that_lost_its_database_lives_and_is_not_ready(tmp_path: Path) -> None:
    if connection.vendor != "sqlite":
        pytest.skip("the file is taken away")
    with LiveGateway(tmp_path) as gateway:
        url = gateway.url
        deadline = time.monotonic() + 10
        while httpx.get(f"{url}/readyz").status_code != 200:
            assert time.monotonic() < deadline
            time.sleep(0.05)
        for path in ("live.sqlite3", "live.sqlite3-wal", "live.sqlite3-shm"):
            (tmp_path / path).unlink(missing_ok=True)
        (tmp_path / "live.sqlite3").mkdir()
        answer = httpx.get(f"{url}/readyz")
        assert (answer.status_code, answer.text) == (503, "the database does not answer\n")
        assert httpx.get(f"{url}/healthz").text == "ok\n"
        answer = httpx.get(f"{url}/metrics")
        assert (answer.status_code, answer.text) == (401, answer.text)
        token = {"Authorization": f"Bearer {gateway.gateway_token}"}
        answer = httpx.get(f"{url}/metrics", headers=token)
        assert (answer.status_code, answer.text) == (503, "the database does not answer\n")
