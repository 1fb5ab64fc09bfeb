"""What takes long to import, or much memory, is imported by whoever needs it, not at a start."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from tests.live import ROOT

# Nobody needs these before the first request that does.
LATE = {
    "cryptography.hazmat.primitives.ciphers",
    "drf_spectacular.views",
    "aiohttp",
    "hooks.openclaw_import",
    "json5",
    "prometheus_client",
}
# A command that stores one event has no server, and shows no page.
OF_SERVERS = {"rest_framework.views", "unfold.admin", "uvicorn", "wake.gateway.hub"}


def imported(modules: str) -> set[str]:
    """Return what is imported when Django is set up and then these modules."""
    script = (
        "import django, json, sys\n"
        "django.setup()\n"
        f"import {modules}\n"
        "print(json.dumps(list(sys.modules)))"
    )
    shown = subprocess.run(
        [sys.executable, "-c", script],
        env={
            "DJANGO_SETTINGS_MODULE": "openclaw_site.settings",
            "SECRET_KEY": "only-for-tests",
            "DATABASE_URL": "sqlite:///never-opened.sqlite3",
        },
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    return set(json.loads(shown.stdout))


@pytest.mark.parametrize(
    ("modules", "late"),
    [
        ("openclaw_site.asgi, openclaw_site.urls, wake.management.commands.gateway", LATE),
        (
            "wake.management.commands.system_event, wake.dispatch",
            LATE | OF_SERVERS,
        ),
    ],
    ids=["gateway", "system_event"],
)
def test_what_is_seldom_needed_is_not_imported(modules: str, late: set[str]) -> None:
    assert not imported(modules) & late


def test_the_modules_that_are_looked_for_are_called_so() -> None:
    """Else the test above would find none of them whatever is imported."""
    names = LATE | OF_SERVERS
    assert imported(", ".join(sorted(names))) >= names
