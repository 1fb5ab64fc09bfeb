"""`manage.py hook_test`: a request tried on the terminal."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.core.management import CommandError, call_command

from hooks import tokens
from hooks.models import HookMapping
from tests.hooks.conftest import allow_keys, rows, set_policy
from tests.live import ROOT

pytestmark = pytest.mark.django_db


def run(path: str, body: Any, directory: Path, *arguments: str) -> tuple[int, str]:
    """Return the exit status and what was printed. A body that is not bytes is written as JSON."""
    file = directory / "body.json"
    file.write_bytes(body if isinstance(body, bytes) else json.dumps(body).encode())
    output = io.StringIO()
    try:
        call_command("hook_test", path, "--payload", str(file), *arguments, stdout=output)
    except SystemExit as ended:
        return int(ended.code or 0), output.getvalue()
    return 0, output.getvalue()


def test_a_good_request_is_told_and_stores_nothing(tmp_path: Path) -> None:
    allow_keys("hook:")
    HookMapping.objects.create(
        name="push",
        match_path="github",
        session_key="hook:{{query.kind}}",
        text_template="{{headers.x-event}}\nof {{id}}",
    )
    before = rows()
    arguments = ("--header", "X-Event: push", "--query", "kind=a=b")
    status, output = run("/hooks/github", {"id": 7}, tmp_path, *arguments)
    assert status == 0
    lines = [" ".join(line.split()) for line in output.splitlines()]
    assert '+ Mapping "push" answers, action wake' in lines
    assert "+ Text push" in lines
    assert "of 7" in lines
    assert "+ Session, canonical agent:main:hook:a=b (agent main)" in lines
    assert "200 OK" in lines
    assert rows() == before


def test_a_request_that_would_be_refused_exits_with_1(tmp_path: Path) -> None:
    status, output = run("wake", {"text": ""}, tmp_path)
    assert status == 1
    assert "400 Bad Request" in output
    assert '{"ok":false,"error":"text required"}' in output


def test_nothing_to_do_is_no_failure(tmp_path: Path) -> None:
    HookMapping.objects.create(name="gh", match_path="gh", transform="github")
    status, output = run("gh", {}, tmp_path, "--header", "X-GitHub-Event:ping")
    assert (status, output.splitlines()[-1]) == (0, "204 No Content")


def test_json_has_the_status_the_body_and_the_steps(tmp_path: Path) -> None:
    status, output = run("wake", {"text": "é"}, tmp_path, "--json")
    told = json.loads(output)
    assert (status, told["status"], told["body"]["ok"]) == (0, 200, True)
    assert {"title": "Text", "detail": "é", "verdict": "good"} in told["steps"]


def test_a_token_is_told_to_be_right_or_wrong_and_does_not_end_it(tmp_path: Path) -> None:
    _, token = tokens.create("ci")
    shown = ("--header", f"Authorization: Bearer {token}")
    status, output = run("wake", {"text": "x"}, tmp_path, *shown)
    assert (status, "right: token ci" in output, token in output) == (0, True, False)
    wrong = ("--header", "X-OpenClaw-Token: och_wrong")
    status, output = run("wake", {"text": "x"}, tmp_path, *wrong)
    assert (status, "the token is wrong" in output) == (0, True)
    status, output = run("wake", {"text": "x"}, tmp_path)
    assert (status, "none shown" in output) == (0, True)


def test_a_body_over_the_limit_is_refused_as_the_door_does_it(tmp_path: Path) -> None:
    set_policy(max_body_bytes=1024)
    status, output = run("wake", {"text": "x" * 5000}, tmp_path)
    assert (status, "413 " in output) == (1, True)


def test_text_that_a_terminal_would_obey_is_written_out(tmp_path: Path) -> None:
    _, output = run("wake", {"text": "a\x1b[31mb\u202ec"}, tmp_path)
    assert "\x1b" not in output
    assert r"a\x1b[31mb\u202ec" in output


def test_a_file_that_is_missing_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(CommandError, match="no-such-file: No such file or directory"):
        call_command("hook_test", "wake", "--payload", str(tmp_path / "no-such-file"))
    with pytest.raises(CommandError, match="Is a directory"):
        call_command("hook_test", "wake", "--payload", str(tmp_path))


# --- As a process of its own --------------------------------------------------------------------


def run_process(
    directory: Path,
    *arguments: str | bytes,
    body: bytes = b"{}",
    migrate: bool = False,
    output: int = subprocess.PIPE,
) -> subprocess.CompletedProcess[bytes]:
    environment = {
        **os.environ,
        "DATABASE_URL": f"sqlite:///{directory / 'own.sqlite3'}",
        "SECRET_KEY": "only-for-tests",
    }
    command = [sys.executable, str(ROOT / "manage.py")]
    if migrate:
        subprocess.run([*command, "migrate", "-v0"], env=environment, check=True, cwd=directory)
    return subprocess.run(
        [*command, "hook_test", *arguments],
        input=body,
        env=environment,
        cwd=directory,
        stdout=output,
        stderr=subprocess.PIPE,
        timeout=60,
        check=False,
    )


def test_nothing_odd_around_the_process_ends_in_a_traceback(tmp_path: Path) -> None:
    """And standard input, an unmigrated database, and nobody who reads what is printed."""
    unmigrated = run_process(tmp_path, "wake", "--payload", "-")
    assert unmigrated.returncode == 1
    assert unmigrated.stderr.decode() == (
        "CommandError: the database has no tables yet; run manage.py migrate\n"
    )
    odd = run_process(
        tmp_path,
        *(b"nowhere\xff", "--payload", "-", "--header", b"X-A:\xff", "--query", b"k=\xff"),
        migrate=True,
    )
    assert (odd.returncode, odd.stderr) == (1, b"")
    assert rb"nowhere\udcff" in odd.stdout
    # Nobody reads the answer to its end.
    reading, writing = os.pipe()
    os.close(reading)
    unread = run_process(tmp_path, "wake", "--payload", "-", output=writing)
    os.close(writing)
    assert (unread.returncode, unread.stderr) == (1, b"")
    good = run_process(tmp_path, "wake", "--payload", "-", body=b'{"text": "hello"}')
    assert (good.returncode, b"200 OK" in good.stdout) == (0, True)


@pytest.mark.parametrize(
    "arguments",
    [
        ("wake",),
        ("--payload", "-"),
        ("wake", "--payload", "-", "--header", "no colon"),
        ("wake", "--payload", "-", "--query", "novalue"),
        ("/", "--payload", "-"),
    ],
)
def test_wrong_usage_exits_with_2(arguments: tuple[str, ...], monkeypatch: Any) -> None:
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"{}")))
    from hooks.management.commands.hook_test import Command

    with pytest.raises(SystemExit) as ended:
        Command().run_from_argv(["manage.py", "hook_test", *arguments])
    assert ended.value.code == 2
