"""The example client in the docs works as it stands."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.wake.gateway_server import TOKEN
from wake.models import Session, SystemEvent

EXAMPLE = Path(__file__).resolve().parents[2] / "docs" / "examples" / "websocket_client.py"


def example(url: str, token: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, EXAMPLE, *arguments],
        env={**os.environ, "OPENCLAW_GATEWAY_URL": url, "OPENCLAW_GATEWAY_TOKEN": token},
        capture_output=True,
        text=True,
        check=False,
        timeout=30,
    )


def test_it_wakes_a_session_and_prints_the_receipt(gateway_url: str) -> None:
    ended = example(gateway_url, TOKEN, "CI finished: 214 passed", "discord:channel:123")
    assert (ended.returncode, ended.stderr) == (0, "")
    assert str(SystemEvent.objects.get(text="CI finished: 214 passed").uid) in ended.stdout
    assert Session.objects.get().key == "agent:main:discord:channel:123"


def test_it_says_why_it_was_refused(untouched_gateway_url: str) -> None:
    ended = example(untouched_gateway_url, "wrong", "x", "y")
    assert ended.returncode == 1
    assert ended.stderr.startswith("unauthorized: gateway token mismatch")
