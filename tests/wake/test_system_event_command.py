"""`manage.py system_event`: the contract's table, remote gateways, one line for every refusal."""

from __future__ import annotations

import contextlib
import io
import json
import os
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.management import call_command
from django.core.management.base import CommandError
from django.db import connection
from django.utils import timezone
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, serve

from tests.wake.gateway_server import TOKEN, stored_rows
from wake import configuration
from wake.models import Agent, DueReason, GatewaySettings, Session, SystemEvent

ROOT = Path(__file__).resolve().parents[2]
MAIN = "agent:main:main"
OPS = "agent:ops:main"
CHANNEL = "agent:main:discord:channel:123"

Run = Callable[..., dict[str, Any]]


@pytest.fixture(autouse=True)
def _no_remote_gateway(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("OPENCLAW_GATEWAY_URL", "OPENCLAW_GATEWAY_TOKEN"):
        monkeypatch.delenv(name, raising=False)


def system_event(*arguments: str) -> str:
    """Run the command in this process and return what it prints on standard output."""
    output = io.StringIO()
    call_command("system_event", *arguments, stdout=output)
    return output.getvalue()


@pytest.fixture(params=["database", "url"])
def run(request: pytest.FixtureRequest, gateway_url: str) -> Run:
    """Run the command with --json against the database, and once more as a remote client."""
    remote = ("--url", gateway_url, "--token", TOKEN) if request.param == "url" else ()

    def run(*arguments: str) -> dict[str, Any]:
        receipt: dict[str, Any] = json.loads(system_event(*arguments, "--json", *remote))
        return receipt

    return run


def woken_now() -> set[str]:
    due = Session.objects.filter(due_at__lte=timezone.now(), due_reason=DueReason.WAKE)
    return set(due.values_list("key", flat=True))


def waiting_for_schedule() -> set[str]:
    due = Session.objects.filter(due_at__gt=timezone.now(), due_reason=DueReason.SCHEDULE)
    return set(due.values_list("key", flat=True))


# --- The contract's table -------------------------------------------------------------------------


def test_without_key_now_nudges_every_enabled_agent(run: Run) -> None:
    Agent.objects.create(id="ops")
    receipt = run("hello", "--mode", "now")
    event = SystemEvent.objects.get()
    assert receipt == {
        "ok": True,
        "mode": "now",
        "eventOutcome": "queued",
        "sessionKey": MAIN,
        "eventId": str(event.uid),
    }
    assert (event.session.key, event.text, event.external) == (MAIN, "hello", False)
    assert woken_now() == {MAIN, OPS}


def test_without_key_now_nudges_only_the_selected_agent(run: Run) -> None:
    Agent.objects.create(id="ops")
    assert run("hello", "--mode", "now", "--agent", "ops")["sessionKey"] == OPS
    assert woken_now() == {OPS}


def test_without_key_next_heartbeat_is_the_default_and_waits(run: Run) -> None:
    receipt = run("hello")
    assert (receipt["mode"], receipt["sessionKey"]) == ("next-heartbeat", MAIN)
    assert waiting_for_schedule() == {MAIN}
    assert woken_now() == set()


def test_with_key_now_requests_that_sessions_heartbeat(run: Run) -> None:
    receipt = run("hello", "--session-key", "discord:channel:123", "--mode", "now")
    assert receipt["sessionKey"] == CHANNEL
    assert woken_now() == {CHANNEL}


def test_with_the_main_key_next_heartbeat_waits_for_the_schedule(run: Run) -> None:
    run("hello", "--session-key", "main")
    assert waiting_for_schedule() == {MAIN}


def test_with_another_key_next_heartbeat_is_woken_at_once(run: Run) -> None:
    run("hello", "--session-key", "discord:channel:123")
    assert woken_now() == {CHANNEL}


def test_next_heartbeat_with_the_schedule_off_wakes_at_once(run: Run) -> None:
    Agent.objects.update(heartbeat_every=timedelta(0))
    configuration.gateway.forget()
    run("hello")
    assert woken_now() == {MAIN}


def test_a_key_of_another_agent_is_taken_when_it_is_selected(run: Run) -> None:
    Agent.objects.create(id="ops")
    receipt = run("hello", "--agent", "ops", "--session-key", "agent:ops:x")
    assert receipt["sessionKey"] == "agent:ops:x"


def test_the_same_again_is_coalesced(run: Run) -> None:
    first, second = run("hello"), run("--text", " hello ", "--session-key", " ", "--agent", "")
    assert second == {**first, "eventOutcome": "coalesced"}


# --- Refusals -------------------------------------------------------------------------------------


@pytest.mark.parametrize("door", ["database", "url"])
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("x", "--session-key", "agent:ops"), 'malformed session key "agent:ops"'),
        (
            ("x", "--session-key", "agent:ops:x"),
            'session key "agent:ops:x" targets agent "ops" but the default agent is "main"; '
            "cross-agent wake is not supported",
        ),
        (("x", "--agent", "nobody"), 'unknown agent "nobody"'),
        (("",), "text required"),
        (("--text", " \n"), "text required"),
        (("x" * 65_537,), "text is 65537 bytes long; at most 65536 are allowed"),
        (("\udcff",), "text is not valid Unicode: it contains a lone surrogate"),
    ],
)
def test_a_refusal_says_why_and_leaves_nothing(
    untouched_gateway_url: str, door: str, arguments: tuple[str, ...], message: str
) -> None:
    remote = ("--url", untouched_gateway_url, "--token", TOKEN) if door == "url" else ()
    with pytest.raises(CommandError) as refused:
        system_event(*arguments, *remote)
    assert (str(refused.value), refused.value.returncode) == (message, 1)


@pytest.mark.usefixtures("untouched_gateway_url")
@pytest.mark.parametrize("option", ["--session-key", "--agent"])
def test_bytes_that_are_no_text_are_refused_in_print(option: str) -> None:
    with pytest.raises(CommandError) as refused:
        system_event("x", option, "a\udcff\x1b[31m")
    assert str(refused.value).isprintable()


def test_a_frame_that_the_gateway_cannot_read_is_one_line(untouched_gateway_url: str) -> None:
    remote = ("--url", untouched_gateway_url, "--token", TOKEN)
    with pytest.raises(CommandError, match=r"^invalid request frame: not valid JSON$"):
        system_event("x", "--session-key", "\udcff", *remote)


def test_a_full_session_is_a_failure(transactional_db: None) -> None:
    GatewaySettings.objects.update(max_queued_events=1)
    configuration.gateway.forget()
    system_event("one")
    with pytest.raises(CommandError, match="holds 1 queued events"):
        system_event("two")
    assert SystemEvent.objects.count() == 1


def test_text_from_standard_input(transactional_db: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO("Grüße\n".encode())))
    assert system_event("-").startswith("queued ")
    assert SystemEvent.objects.get().text == "Grüße"
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xff")))
    with pytest.raises(CommandError, match="standard input is not UTF-8"):
        system_event("-")


def test_the_line_for_people(transactional_db: None) -> None:
    line = system_event("hello", "--session-key", "discord:channel:123")
    event = SystemEvent.objects.get()
    assert line == f"queued {event.uid} for {CHANNEL} (next-heartbeat)\n"


@pytest.mark.skipif(connection.vendor != "sqlite", reason="a lock of SQLite's")
def test_a_locked_database_is_one_line(
    transactional_db: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    import sqlite3

    configuration.gateway()
    connection.close()
    monkeypatch.setitem(connection.settings_dict["OPTIONS"], "timeout", 0.05)
    locking = sqlite3.connect(connection.settings_dict["NAME"], isolation_level=None)
    try:
        locking.execute("BEGIN IMMEDIATE")
        with pytest.raises(CommandError, match=r"could not be stored now.*database is locked"):
            system_event("hello")
    finally:
        locking.rollback()
        locking.close()
        connection.close()
    assert stored_rows() == 0


# --- Remote gateways ------------------------------------------------------------------------------


def test_the_environment_names_the_gateway(
    gateway_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("OPENCLAW_GATEWAY_URL", gateway_url.replace("ws://", "http://"))
    monkeypatch.setenv("OPENCLAW_GATEWAY_TOKEN", TOKEN)
    assert system_event("hello").startswith("queued ")
    assert SystemEvent.objects.get().source == "ws"


@pytest.mark.parametrize(
    ("token", "message"),
    [
        ("wrong", "unauthorized: gateway token mismatch (provide gateway auth token)"),
        ("", "unauthorized: gateway token missing (provide gateway auth token)"),
    ],
)
def test_a_wrong_token_is_one_line(untouched_gateway_url: str, token: str, message: str) -> None:
    with pytest.raises(CommandError) as refused:
        system_event("x", "--url", untouched_gateway_url, "--token", token)
    assert str(refused.value) == message


@pytest.mark.usefixtures("untouched_gateway_url")
def test_a_gateway_that_is_not_there_is_one_line() -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed_soon:
        port = closed_soon.getsockname()[1]
    with pytest.raises(CommandError) as refused:
        system_event("x", "--url", f"ws://user:secret@127.0.0.1:{port}/?token=secret")
    message = str(refused.value)
    assert message.startswith(f"cannot connect to ws://127.0.0.1:{port}/: ")
    assert "secret" not in message
    assert "\n" not in message
    for nonsense in ("not-a-url", "ws://", "ws://[", "ws://x:99999/", "ftp://127.0.0.1/"):
        with pytest.raises(CommandError, match=r"^cannot connect to "):
            system_event("x", "--url", nonsense)


def test_openclaws_own_receipt_is_short_and_its_failures_count() -> None:
    """OpenClaw's gateway answers a wake with {"ok":true} and no more."""
    answers: list[tuple[dict[str, Any], str]] = [
        ({"ok": True, "payload": {"ok": True}}, "accepted\n"),
        ({"ok": True, "payload": {"ok": False, "error": "text\nrequired"}}, "text required"),
        ({"ok": False, "error": {"code": "X", "message": "no \x1b[31m"}}, r"no \x1b[31m"),
        ({"ok": False}, "the gateway refused without a reason"),
    ]
    for answer, expected in answers:
        with _foreign_gateway(answer) as url:
            if expected.endswith("\n"):
                assert system_event("hello", "--url", url, "--token", "t") == expected
                continue
            with pytest.raises(CommandError) as refused:
                system_event("hello", "--url", url, "--token", "t")
            assert str(refused.value) == expected


def test_a_gateway_that_says_nothing_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    from wake.gateway import client

    with (
        _foreign_gateway(None) as url,
        pytest.raises(client.GatewayClientError, match=r"no answer from .* within 0\.2 s"),
        client.connect(url, "t", scopes=(), seconds=0.2) as gateway,
    ):
        gateway.call("wake", {})


@contextlib.contextmanager
def _foreign_gateway(answer: dict[str, Any] | None) -> Iterator[str]:
    """Serve a gateway that takes anyone, and answers every other request alike or not at all."""

    def handle(client: ServerConnection) -> None:
        client.send(json.dumps({"type": "event", "event": "connect.challenge", "payload": {}}))
        with contextlib.suppress(ConnectionClosed):
            while True:
                request = json.loads(client.recv())
                client.send(json.dumps({"type": "event", "event": "tick", "payload": {}}))
                response = {"ok": True} if request["method"] == "connect" else answer
                if response is not None:
                    client.send(json.dumps({"type": "res", "id": request["id"], **response}))

    with serve(handle, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        yield f"ws://127.0.0.1:{server.socket.getsockname()[1]}"
        server.shutdown()
        thread.join()


# --- As a program ---------------------------------------------------------------------------------


def program(
    directory: Path, *arguments: str | bytes, database: str | None = None
) -> subprocess.CompletedProcess[str]:
    """Run the command as a process of its own, on a SQLite file in `directory`."""
    environment = {
        **os.environ,
        "DATABASE_URL": database or f"sqlite:///{directory / 'db.sqlite3'}",
        "SECRET_KEY": "only-for-tests",
    }
    return subprocess.run(
        [sys.executable, ROOT / "manage.py", "system_event", *arguments],
        env=environment,
        cwd=directory,
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def test_wrong_usage_ends_with_2(tmp_path: Path) -> None:
    ended = program(tmp_path, "one", "--mode", "later")
    assert (ended.returncode, ended.stdout) == (2, "")
    assert ended.stderr.startswith("usage: ")


@pytest.mark.parametrize("arguments", [(), ("one", "--text", "two"), ("one", "--token", "t")])
def test_wrong_usage_is_named(untouched_gateway_url: str, arguments: tuple[str, ...]) -> None:
    with pytest.raises(CommandError, match=r"^Error: (give the text once|--token is for a remote)"):
        system_event(*arguments)


def test_a_database_without_tables_is_one_line(tmp_path: Path) -> None:
    ended = program(tmp_path, "hello")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1
    assert "run manage.py migrate" in ended.stderr


def test_a_database_that_cannot_be_opened_is_one_line(tmp_path: Path) -> None:
    ended = program(tmp_path, "hello", database=f"sqlite:///{tmp_path / 'missing' / 'db.sqlite3'}")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.count("\n") == 1
    assert "unable to open database file" in ended.stderr


def test_bytes_that_are_no_utf8_are_one_line(tmp_path: Path) -> None:
    ended = program(tmp_path, b"caf\xe9")
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr == (
        "CommandError: text is not valid Unicode: it contains a lone surrogate\n"
    )


def test_the_websocket_library_is_loaded_only_for_a_url(tmp_path: Path) -> None:
    """The command is to start fast."""
    code = (
        "import sys; sys.argv = ['manage.py', 'system_event', 'x']\n"
        "import runpy\n"
        "try: runpy.run_path(%r, run_name='__main__')\n"
        "except SystemExit: pass\n"
        "print([name for name in ('websockets', 'uvicorn') if name in sys.modules])"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code % str(ROOT / "manage.py")],
        env={**os.environ, "DATABASE_URL": f"sqlite:///{tmp_path / 'db.sqlite3'}"},
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert ended.stdout == "[]\n"
