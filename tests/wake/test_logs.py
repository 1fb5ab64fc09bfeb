"""Log lines: JSON on request, with ids, and never with what was said or a secret above debug."""

from __future__ import annotations

import contextlib
import json
import logging
import re
import time
from collections.abc import Iterator
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.db import DatabaseError
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import WebSocketException

from tests.live import LiveGateway
from tests.wake.gateway_server import Wire, connect_params, connected
from wake.errors import LeaseLost, WakeError
from wake.logs import FIELDS, JsonFormatter, LineFormatter
from wake.signing import new_signing_secret

SECRET = "it quotes: the event text"


@pytest.fixture(autouse=True)
def _at_info() -> Iterator[None]:
    root = logging.getLogger()
    level = root.level
    root.setLevel(logging.INFO)
    yield
    root.setLevel(level)


def record(message: Any, *arguments: object, **extra: object) -> logging.LogRecord:
    made = logging.LogRecord("wake.x", logging.WARNING, __file__, 1, message, arguments, None)
    made.__dict__.update(extra)
    return made


def written(made: logging.LogRecord) -> dict[str, str]:
    line = JsonFormatter().format(made)
    assert line.isascii()
    assert len(line.splitlines()) == 1
    parsed: dict[str, str] = json.loads(line)
    return parsed


def raised(error: Exception, cause: Exception | None = None) -> Exception:
    try:
        raise error from cause
    except Exception as caught:
        return caught


@given(st.text(), st.text())
def test_every_line_is_one_json_object(text: str, name: str) -> None:
    line = written(record("%s\n%s", text, name, run_id=name, other=object()))
    assert line["message"] == f"{text}\n{name}"
    assert line["run_id"] == name
    assert "other" not in line


def test_the_fields_of_a_line() -> None:
    ids = {name: f"the {name}" for name in FIELDS}
    line = written(record("run %s", 7, **ids))
    assert datetime.fromisoformat(line.pop("time")).utcoffset() is not None
    assert line == {"level": "WARNING", "logger": "wake.x", "message": "run 7", **ids}
    assert "exception" not in line


@pytest.mark.parametrize(
    ("error", "shown"),
    [
        (LeaseLost("run 7 lost its lease"), "run 7 lost its lease"),
        (DatabaseError("no row\nDETAIL: Failing row contains (" + SECRET), "no row"),
        (ConnectionRefusedError(111, "refused"), "[Errno 111] refused"),
        (ValueError(SECRET), "ValueError"),
        (KeyError(SECRET), "KeyError"),
        (UnicodeEncodeError("utf-8", SECRET, 0, 1, "x"), "UnicodeEncodeError"),
        (DatabaseError(), "DatabaseError"),
    ],
)
def test_an_exception_says_what_cannot_quote_anybody(error: Exception, shown: str) -> None:
    assert written(record("it failed: %s", error))["message"] == f"it failed: {shown}"
    assert written(record(error))["message"] == shown
    line = LineFormatter().format(record("it failed: %s", error))
    assert line.endswith(f" WARNING wake.x: it failed: {shown}")


@pytest.mark.parametrize("formatter", [LineFormatter(), JsonFormatter()])
def test_a_traceback_shows_where_and_what_kind_but_not_what_was_said(
    formatter: logging.Formatter,
) -> None:
    group = ExceptionGroup(SECRET, [raised(KeyError(SECRET))])
    error = raised(RuntimeError(SECRET), raised(WakeError("said on purpose"), raised(group)))
    try:
        try:
            raise ValueError(SECRET)
        except ValueError:
            raise OSError(5, "on the way") from error
    except OSError as last:
        caught = last
    made = record("it failed", exc_info=(type(caught), caught, caught.__traceback__))
    text = formatter.format(made)
    assert SECRET not in text
    for expected in ("KeyError", "ExceptionGroup", "WakeError: said on purpose", "RuntimeError",
                     "OSError: [Errno 5] on the way", "test_logs.py"):  # fmt: skip
        assert expected in text
    # Nor is it left in the record, for the next handler to find.
    assert made.exc_text is None
    assert made.args == ()

    logging.getLogger().setLevel(logging.DEBUG)
    assert SECRET in formatter.format(made)


def test_what_asyncio_says_of_a_lost_task_is_its_first_line() -> None:
    made = record(f"Task exception was never retrieved\nfuture: <Task exception={SECRET!r}>")
    made.name = "asyncio"
    assert written(made)["message"] == "Task exception was never retrieved"


# --- A real gateway, with marks in everything that is said to it ----------------------------------

TRANSFORM = """
from hooks.transforms import register

@register("breaks")
def breaks(payload, headers, query, path):
    raise ValueError(f"no: {payload} {headers}")
"""
QUOTING = 'cat; cat >&2; echo "$0 said MARK-stderr" >&2; exit 3'


def test_nothing_that_was_said_and_no_secret_is_in_the_log(tmp_path: Path) -> None:
    (tmp_path / "broken_transform.py").write_text(TRANSFORM)
    secret = new_signing_secret()
    environment = {
        "LOG_FORMAT": "json",
        "LOG_LEVEL": "INFO",
        "HOOK_TRANSFORMS": "broken_transform",
        "PYTHONPATH": str(tmp_path),
        "OPENCLAW_HOOKS_TOKEN": "MARK-hooks-token-0123456789",
        "OPENCLAW_GATEWAY_TOKEN": "MARK-gateway-token-0123456789",
    }
    with LiveGateway(tmp_path, environment=environment) as gateway:
        gateway.hook_token = environment["OPENCLAW_HOOKS_TOKEN"]
        gateway.gateway_token = environment["OPENCLAW_GATEWAY_TOKEN"]
        one_try = ("--every", "off", "--max-attempts", "1")
        gateway.manage("agents", "set", "main", *one_try, "--", "/bin/sh", "-c", QUOTING)
        gateway.manage("agents", "set", "echo", *one_try, "--", "/bin/cat")
        gateway.manage(
            "agents", "set", "web", *one_try, "--runner", "http", "--secret", secret,
            "--url", "http://user:MARK-password@127.0.0.1:9/MARK-path?MARK-query",
        )  # fmt: skip
        mapping = (
            "from hooks.models import HookMapping; HookMapping.objects.create("
            "name='breaks', match_path='breaks', transform='breaks', text_template='x')"
        )
        gateway.manage("shell", "-v0", "-c", mapping)
        _say_all(gateway)
        deadline = time.monotonic() + 60
        while len(runs := re.findall(r"heartbeats: run \S+ of", gateway.log())) < 6:
            assert time.monotonic() < deadline, gateway.log()
            time.sleep(0.1)
        time.sleep(0.3)
        assert gateway.stop() == 0
    log = gateway.log()
    assert runs
    lines = [json.loads(line) for line in log.splitlines()]
    assert all(isinstance(line, dict) and line["message"] for line in lines)
    assert re.findall(r"MARK\S{0,30}", log) == []
    assert secret.removeprefix("whsec_") not in log
    # It is the failures' log: they are there, with their ids.
    assert any("transform of mapping breaks failed" in line["message"] for line in lines)
    assert any("ValueError" in line.get("exception", "") for line in lines)
    failed = next(line for line in lines if ": failed, " in line["message"])
    assert failed["run_id"] in failed["message"]
    assert failed["agent_id"] in ("main", "web")
    assert failed["session_key"].startswith("agent:")


def _say_all(gateway: LiveGateway) -> None:
    """Wake through every door, rightly and wrongly, with MARK in all that may not be logged."""
    for agent in ("main", "echo", "web"):
        gateway.manage("system_event", f"MARK-cli {agent}", "--agent", agent)
        _hook(gateway, "wake", {"text": "MARK-hook", "agentId": agent, "sessionKey": None})
    _hook(gateway, "agent", {"message": "MARK-turn", "name": "MARK-name", "agentId": "echo"})
    _hook(gateway, "wake", {"text": ["MARK-list"]})
    _hook(gateway, "wake", {"text": "MARK-key", "sessionKey": "MARK\n-session"})
    _hook(gateway, "breaks", {"MARK-name": "MARK-payload"}, {"x-mark": "MARK-header"})
    _hook(gateway, "wake", {}, {"authorization": "Bearer MARK-wrong"})
    _hook(gateway, "wake?token=MARK-query", {"text": "x"})
    httpx.post(f"{gateway.url}/hooks/wake", content=b'{"MARK-json', headers=_bearer(gateway))
    httpx.get(f"{gateway.url}/metrics?token=MARK-query", headers={"authorization": "MARK-auth"})
    with connected(gateway.ws_url, auth={"token": gateway.gateway_token}) as wire:
        for agent in ("echo", "MARK-agent"):
            wire.call("wake", {"mode": "now", "text": "MARK-ws", "agentId": agent})
        wire.call("wake", {"mode": "MARK-mode", "text": 7})
        wire.call("MARK-method", {"text": "MARK-params"})
        wire.call("system-event", {"text": "MARK-system"})
        wire.send("MARK-frame")
    for path in ("?token=MARK-query", "ws?token=MARK-query", "no?token=MARK-query"):
        with contextlib.suppress(WebSocketException), Wire(f"{gateway.ws_url}{path}"):
            pass
    for changes in (
        {"auth": {"token": "MARK-token"}},
        {"role": "MARK-role"},
        {"auth": {"token": ["MARK-token"]}},
        {"minProtocol": "MARK-protocol"},
        {"scopes": ["MARK-scope"], "auth": {"password": "MARK-password"}},
    ):
        with Wire(gateway.ws_url) as wire:
            wire.call("connect", connect_params(**changes))


def _bearer(gateway: LiveGateway) -> dict[str, str]:
    return {"authorization": f"Bearer {gateway.hook_token}"}


def _hook(
    gateway: LiveGateway, path: str, body: object, headers: dict[str, str] | None = None
) -> None:
    answer = httpx.post(
        f"{gateway.url}/hooks/{path}", json=body, headers={**_bearer(gateway), **(headers or {})}
    )
    assert answer.status_code < 600
