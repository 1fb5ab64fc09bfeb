"""`manage.py gateway_tokens`: tokens with scopes, shown once, replaced without a gap, revoked."""

from __future__ import annotations

import io
import re
import shlex
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.test import override_settings
from django.utils import timezone

from wake.models import GatewayToken, OperatorScope, SystemEvent
from wake.tokens import digest, is_usable

READ, WRITE, ADMIN = OperatorScope.values


def run(*arguments: str) -> str:
    output = io.StringIO()
    call_command("gateway_tokens", *arguments, stdout=output)
    return output.getvalue()


def shown_token(output: str) -> str:
    token = re.search(r"^  (ocg_\S{40,})$", output, re.MULTILINE)
    assert token
    return token[1]


def as_shown(output: str, url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run the line that an output shows to try the token, at this gateway instead."""
    line = re.search(r"^  (OPENCLAW_GATEWAY_TOKEN=.*)$", output, re.MULTILINE)
    assert line
    variable, program, command, *arguments = shlex.split(line[1])
    assert program == "manage.py"
    assert arguments[-2:] == ["--url", "ws://127.0.0.1:8000"]
    with monkeypatch.context() as patch:
        patch.setenv(*variable.split("=", 1))
        call_command(command, *arguments[:-1], url, stdout=io.StringIO())


@pytest.mark.django_db
def test_create_shows_the_token_once_and_keeps_its_hash() -> None:
    token = shown_token(run("create", "laptop"))
    row = GatewayToken.objects.get(name="laptop")
    assert (row.digest, row.expires_at, row.scopes) == (digest(token), None, [READ, WRITE, ADMIN])
    assert token.startswith(row.hint)
    assert token not in run()


def test_the_line_that_is_shown_sends_an_event_until_the_token_is_revoked(
    gateway_url: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown = run("create", "laptop", "--scope", WRITE)
    rotated = run("rotate", "laptop", "--keep-old", "2h")
    for output in (shown, rotated):
        as_shown(output, gateway_url, monkeypatch)
    event = SystemEvent.objects.get()
    assert (event.text, event.source) == ("Hello", "ws")
    assert "with it what it replaced" in run("revoke", "laptop")
    for output in (shown, rotated):
        with pytest.raises(CommandError, match="token mismatch"):
            as_shown(output, gateway_url, monkeypatch)


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("scopes", "words", "has_line"),
    [
        ([READ], ", holds read, shown", False),
        ([READ, WRITE], ", holds read, write, shown", True),
        ([ADMIN], ", holds admin, shown", True),
        ([ADMIN, WRITE, READ], '"laptop", shown', True),
        ([], '"laptop", shown', True),
    ],
)
def test_a_token_holds_the_scopes_that_are_given(
    scopes: list[str], words: str, has_line: bool
) -> None:
    options = [part for scope in scopes for part in ("--scope", scope)]
    output = run("create", "laptop", *options)
    assert GatewayToken.objects.get().scopes == (scopes or [READ, WRITE, ADMIN])
    assert words in output
    assert ("system_event" in output) is has_line
    assert ("No line to try it: it may only read" in output) is not has_line


@pytest.mark.django_db
def test_rotate_keeps_the_scopes_and_the_old_one_for_a_while() -> None:
    old = shown_token(run("create", "laptop", "--scope", READ, "--expires", "90d"))
    before = timezone.now()
    output = run("rotate", "laptop", "--keep-old", "2h")
    assert 'New gateway token "laptop" (the old one works for 2h more), holds read,' in output
    made = GatewayToken.objects.get(name="laptop")
    assert (made.digest, made.scopes, made.expires_at) == (
        digest(shown_token(output)),
        [READ],
        None,
    )
    kept = GatewayToken.objects.get(digest=digest(old))
    assert kept.name.startswith("laptop (until 2")
    assert kept.scopes == [READ]
    assert kept.expires_at
    assert before <= kept.expires_at - timedelta(hours=2) <= timezone.now()


@pytest.mark.django_db
def test_rotate_without_keeping_revokes_the_old_one() -> None:
    old = shown_token(run("create", "laptop"))
    new = shown_token(run("rotate", "laptop", "--keep-old", "0", "--expires", "1h"))
    now = timezone.now()
    usable = {row.digest: is_usable(row, now) for row in GatewayToken.objects.all()}
    assert usable == {digest(old): False, digest(new): True}
    assert not is_usable(GatewayToken.objects.get(name="laptop"), now + timedelta(hours=1))


@pytest.mark.django_db
def test_the_list_says_what_each_token_is_worth() -> None:
    assert "gateway_tokens create NAME" in run()
    run("create", "every")
    run("create", "some", "--scope", READ, "--scope", WRITE)
    run("create", "old", "--expires", "1d")
    GatewayToken.objects.filter(name="old").update(expires_at=timezone.now())
    run("create", "gone")
    run("revoke", "gone")
    heading, *lines = run("list").splitlines()
    rows = {line.split()[0]: re.split(r"  +", line) for line in lines}
    assert re.split(r"  +", heading)[:4] == ["NAME", "STARTS WITH", "STATE", "HOLDS"]
    assert rows["every"][2:4] == ["valid", "every scope"]
    assert rows["every"][5:] == ["never", "-"]
    assert rows["some"][2:4] == ["valid", "read, write"]
    assert rows["old"][2] == "expired"
    assert rows["gone"][2] == "revoked"
    with override_settings(OPENCLAW_GATEWAY_TOKEN="ocg_very_secret"):
        last = run().splitlines()[-1]
    assert re.split(r"  +", last) == [
        "OPENCLAW_GATEWAY_TOKEN",
        "from the environment",
        "every scope",
        "never",
    ]


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["create", "taken"], "name: Gateway token with this Name already exists."),
        (["create", ""], "name: This field cannot be blank."),
        (["create", "x", "--scope", READ, "--scope", READ], f"scopes: {READ} stands there twice."),
        (["rotate", "nobody"], 'no gateway token is called "nobody"'),
        (["revoke", "nobody"], 'no gateway token is called "nobody"'),
        (["rotate", "revoked"], 'token "revoked" is revoked; create one under another name'),
        (["create", "x", "--expires", "999999999d"], "the duration reaches past the end"),
        (
            ["create", "x", "--scope", "operator.everything"],
            "invalid choice: 'operator.everything'",
        ),
        (["create", "x", "--expires", "90"], "is not a duration"),
        (["create", "a\udcff"], "is not valid text"),
    ],
)
def test_errors_are_one_line_and_change_nothing(arguments: list[str], error: str) -> None:
    run("create", "taken")
    run("create", "revoked")
    run("revoke", "revoked")
    before = list(GatewayToken.objects.values())
    with pytest.raises(CommandError, match=re.escape(error)) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    assert list(GatewayToken.objects.values()) == before


@pytest.mark.django_db
def test_a_name_that_a_terminal_would_obey_is_written_out() -> None:
    assert "\x1b" not in run("create", "a\x1b[31mb")
    assert r"a\x1b[31mb" in run("list")
