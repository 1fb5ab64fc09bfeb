"""`manage.py gateway`: the first start, a second one, and the end."""

from __future__ import annotations

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from tests.live import ROOT, LiveGateway

# As if the process was killed between the last migration and what comes after it.
CUT_SHORT = """
from hooks.models import HookPolicy
from wake.models import Agent, GatewaySettings, Session
for model in (HookPolicy, GatewaySettings, Session, Agent): model.objects.all().delete()
"""
COUNT = """
from hooks.models import HookPolicy
from wake.models import Agent, GatewaySettings
for model in (HookPolicy, GatewaySettings, Agent): print(model.objects.count())
"""


def test_the_first_start_shows_its_secrets_once_and_logs_none(tmp_path: Path) -> None:
    with LiveGateway(tmp_path) as gateway:
        secrets = [gateway.gateway_token, gateway.hook_token, gateway.admin_password]
        assert all(secret in "".join(gateway.output) for secret in secrets)
        assert gateway.stop() == 0
        gateway.output.clear()
        gateway.start()
        shown = "".join(gateway.output)
        assert shown == f"ready {gateway.url}\n"
        assert not any(secret in gateway.log() for secret in secrets)
        listed = gateway.manage("hook_tokens").stdout
        assert gateway.hook_token not in listed
        assert gateway.hook_token[:12] in listed


def test_a_start_makes_the_rows_that_are_always_there_where_a_migration_was_cut_short(
    tmp_path: Path,
) -> None:
    with LiveGateway(tmp_path) as gateway:
        gateway.stop()
        gateway.manage("shell", "-v0", "-c", CUT_SHORT)
        gateway.start()
        assert gateway.manage("shell", "-v0", "-c", COUNT).stdout.split() == ["1", "1", "1"]


def test_a_start_migrates_a_database_of_an_older_version(tmp_path: Path) -> None:
    with LiveGateway(tmp_path) as gateway:
        gateway.stop()
        gateway.manage("migrate", "-v0", "wake", "0004")
        gateway.start()
        assert "[ ]" not in gateway.manage("showmigrations").stdout


def test_tokens_of_the_environment_take_the_place_of_made_ones(tmp_path: Path) -> None:
    given = {"OPENCLAW_GATEWAY_TOKEN": "given-g", "OPENCLAW_HOOKS_TOKEN": "given-h"}
    with LiveGateway(tmp_path, environment=given) as gateway:
        shown = "".join(gateway.output)
        assert "token" not in shown
        assert "admin password" in shown
        sent = gateway.manage("system_event", "x", "--url", gateway.ws_url, "--json")
        assert '"ok": true' in sent.stdout


def test_three_first_starts_at_once_make_one_database(tmp_path: Path) -> None:
    gateways = [LiveGateway(tmp_path) for _ in range(3)]
    for gateway in gateways[1:]:
        gateway.environment["DATABASE_URL"] = gateways[0].environment["DATABASE_URL"]
    try:
        with ThreadPoolExecutor() as pool:
            list(pool.map(lambda gateway: gateway.start(), gateways))
        shown = [line for gateway in gateways for line in gateway.output]
        assert sum("admin password" in line for line in shown) == 1
        assert sum("hook token" in line for line in shown) == 1
    finally:
        for gateway in gateways:
            gateway.stop()
        for gateway in gateways:
            gateway.drop_database()


def test_a_second_start_on_the_same_port_ends_with_one_line(tmp_path: Path) -> None:
    with LiveGateway(tmp_path) as gateway:
        second = gateway.manage("gateway", "--port", str(gateway.port), check=False)
    assert second.returncode == 1
    assert second.stderr.startswith("CommandError: cannot listen on 127.0.0.1 port ")
    assert second.stderr.count("\n") == 1


@pytest.mark.parametrize(
    ("environment", "reason"),
    [
        ({"DATABASE_URL": "sqlite:///x.sqlite3"}, "needs PostgreSQL"),
        ({"DATABASE_URL": "postgres://nobody@127.0.0.1:1/x", "REDIS_URL": ""}, "needs Redis"),
    ],
)
def test_more_workers_need_postgresql_and_redis(
    tmp_path: Path, environment: dict[str, str], reason: str
) -> None:
    refused = subprocess.run(
        [sys.executable, ROOT / "manage.py", "gateway", "--workers", "2"],
        env={"PATH": "", "SECRET_KEY": "x", **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert reason in refused.stderr
    assert refused.stderr.count("\n") == 1
