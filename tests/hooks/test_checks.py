"""`manage.py check --deploy` reports what is unsafe, and nothing of a site that is set up right."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core import checks
from django.utils import timezone
from pytest_django import Settings

from hooks import tokens as hook_tokens
from hooks.models import HookToken
from openclaw_site.secret_key import read_or_create_secret_key
from tests.live import ROOT
from wake import tokens
from wake.models import GatewayToken, HashedToken

PRODUCTION: dict[str, Any] = {
    "DEBUG": False,
    "SECRET_KEY": "".join(chr(33 + number) for number in range(60)),
    "TRUSTED_PROXIES": ["127.0.0.1"],
    "SESSION_COOKIE_SECURE": True,
    "CSRF_COOKIE_SECURE": True,
    "OPENCLAW_HOOKS_TOKEN": "",
    "OPENCLAW_GATEWAY_TOKEN": "",
}


@pytest.fixture(autouse=True)
def _production(db: None, settings: Settings) -> None:
    for name, value in PRODUCTION.items():
        setattr(settings, name, value)


def reported() -> dict[str, checks.CheckMessage]:
    """Return what is said and not silenced, by its id."""
    messages = checks.run_checks(include_deployment_checks=True)
    return {message.id or "": message for message in messages if not message.is_silenced()}


def gateway_token(name: str = "node") -> tuple[GatewayToken, str]:
    return tokens.create(GatewayToken, name, prefix="ocg_")


def test_a_site_that_is_set_up_right_has_nothing_to_report() -> None:
    hook_tokens.create("ci")
    gateway_token()
    assert reported() == {}


def test_the_production_example_has_no_issues(tmp_path: Path) -> None:
    """With the environment that docs/operations.md shows, in a process of its own."""
    operations = (ROOT / "docs" / "operations.md").read_text()
    shown = re.search(r"```sh\n# /etc/openclaw-wake-gateway\.env.*?\n(.*?)```", operations, re.S)
    assert shown
    production = dict(line.split("=", 1) for line in shown[1].splitlines())
    environment = {
        **os.environ,
        **production,
        "DATABASE_URL": f"sqlite:///{tmp_path / 'db.sqlite3'}",
        "SECRET_KEY": read_or_create_secret_key(tmp_path / ".secret_key"),
    }

    def manage(*arguments: str) -> str:
        command = [sys.executable, str(ROOT / "manage.py"), *arguments]
        ended = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        return ended.stdout + ended.stderr

    assert "no issues" in manage("check", "--deploy")  # also before the first start
    manage("migrate", "-v0")
    assert "no issues" in manage("check", "--deploy", "--fail-level", "WARNING")


@pytest.mark.parametrize("hook_token_is", ["stored", "in the environment"])
@pytest.mark.parametrize("gateway_token_is", ["stored", "in the environment"])
def test_a_hook_token_that_is_a_gateway_token_is_reported(
    settings: Settings, hook_token_is: str, gateway_token_is: str
) -> None:
    _, token = gateway_token()
    if gateway_token_is == "in the environment":
        GatewayToken.objects.all().delete()
        settings.OPENCLAW_GATEWAY_TOKEN = token
    if hook_token_is == "in the environment":
        settings.OPENCLAW_HOOKS_TOKEN = token
    else:
        HookToken.objects.create(name="ci", digest=tokens.digest(token), hint="")

    assert set(reported()) == {"hooks.W002"}
    text = reported()["hooks.W002"].msg
    assert ('"ci"' if hook_token_is == "stored" else "OPENCLAW_HOOKS_TOKEN") in text
    assert ('"node"' if gateway_token_is == "stored" else "OPENCLAW_GATEWAY_TOKEN") in text
    assert token not in text


@pytest.mark.parametrize("field", ["revoked_at", "expires_at"])
def test_a_token_that_no_longer_works_is_not_reported(settings: Settings, field: str) -> None:
    row, settings.OPENCLAW_HOOKS_TOKEN = gateway_token()
    long_ago = timezone.now() - timedelta(days=400)
    GatewayToken.objects.filter(pk=row.pk).update(created_at=long_ago, **{field: timezone.now()})
    assert reported() == {}


@pytest.mark.parametrize(("days", "is_reported"), [(364, False), (366, True)])
@pytest.mark.parametrize(
    ("kind", "reported_as"), [("hook", "hooks.W003"), ("gateway", "wake.W001")]
)
def test_tokens_older_than_a_year_are_reported(
    kind: str, reported_as: str, days: int, is_reported: bool
) -> None:
    row: HashedToken = (hook_tokens.create("node") if kind == "hook" else gateway_token())[0]
    type(row)._default_manager.update(created_at=timezone.now() - timedelta(days=days))

    assert set(reported()) == ({reported_as} if is_reported else set())
    assert not is_reported or '"node"' in reported()[reported_as].msg


@pytest.mark.parametrize(
    ("name", "value", "reported_as"),
    [
        ("DEBUG", True, "security.W018"),
        ("SECRET_KEY", "short", "security.W009"),
        ("SECRET_KEY", "django-insecure-" + PRODUCTION["SECRET_KEY"], "security.W009"),
        ("SESSION_COOKIE_SECURE", False, "wake.W002"),
        ("CSRF_COOKIE_SECURE", False, "wake.W002"),
        ("TRUSTED_PROXIES", [], "wake.W003"),
        ("TRUSTED_PROXIES", ["127.0.0.1", "*"], "wake.W004"),
        ("TRUSTED_PROXIES", ["::/0"], "wake.W004"),
        ("TRUSTED_PROXIES", ["127.0.0.1", "nginx"], "wake.W005"),
        ("TRUSTED_PROXIES", ["10.0.0.7/8"], "wake.W005"),
    ],
)
def test_an_unsafe_setting_is_reported_once(
    settings: Settings, name: str, value: Any, reported_as: str
) -> None:
    setattr(settings, name, value)
    assert set(reported()) == {reported_as}
    assert reported_as.startswith("security") or "TRUSTED_PROXIES" in (
        reported()[reported_as].hint or ""
    )


def test_a_secret_key_that_was_made_at_the_first_start_is_good(
    settings: Settings, tmp_path: Path
) -> None:
    settings.SECRET_KEY = read_or_create_secret_key(tmp_path / ".secret_key")
    assert reported() == {}
