"""`manage.py hook_tokens`: tokens shown once, replaced without a gap, revoked."""

from __future__ import annotations

import io
import re
from datetime import timedelta

import pytest
from django.core.management import CommandError, call_command
from django.test import override_settings
from django.utils import timezone

from hooks.models import HookMapping, HookToken
from tests.hooks.conftest import Send
from tests.live import LiveGateway
from wake.tokens import digest, is_usable

pytestmark = pytest.mark.django_db


def run(*arguments: str) -> str:
    output = io.StringIO()
    call_command("hook_tokens", *arguments, stdout=output)
    return output.getvalue()


def shown_token(output: str) -> str:
    """Return the token that an output shows: alone in a line, and in a ready curl line."""
    token = re.search(r"^  (och_\S{40,})$", output, re.MULTILINE)
    assert token
    assert f"-H 'Authorization: Bearer {token[1]}'" in output
    assert "/hooks/wake" in output
    return token[1]


def test_create_shows_the_token_once_and_keeps_its_hash(send: Send) -> None:
    token = shown_token(run("create", "ci"))
    row = HookToken.objects.get(name="ci")
    assert (row.digest, row.expires_at) == (digest(token), None)
    assert token not in run()
    assert send(body={"text": "x"}, token=token).status_code == 200


def test_create_with_an_expiry() -> None:
    before = timezone.now()
    run("create", "ci", "--expires", "90d")
    expires_at = HookToken.objects.get(name="ci").expires_at
    assert expires_at
    assert before <= expires_at - timedelta(days=90) <= timezone.now()


def test_rotate_keeps_the_old_one_for_a_while(send: Send) -> None:
    old = shown_token(run("create", "ci"))
    before = timezone.now()
    new = shown_token(run("rotate", "ci", "--keep-old", "2h"))
    assert HookToken.objects.get(name="ci").digest == digest(new)
    kept = HookToken.objects.get(digest=digest(old))
    assert kept.name.startswith("ci (until 2")
    assert kept.expires_at
    assert before <= kept.expires_at - timedelta(hours=2) <= timezone.now()
    for token in (old, new):
        assert send(body={"text": "x"}, token=token).status_code == 200


def test_rotate_twice_and_to_the_longest_name() -> None:
    run("create", "n" * 100)
    run("rotate", "n" * 100)
    run("rotate", "n" * 100)
    assert HookToken.objects.count() == 3


def test_rotate_without_keeping_revokes_the_old_one(send: Send) -> None:
    old = shown_token(run("create", "ci"))
    run("rotate", "ci", "--keep-old", "0")
    assert send(body={"text": "x"}, token=old).status_code == 401


def test_rotate_never_puts_an_expiry_off() -> None:
    run("create", "ci", "--expires", "1h")
    expires_at = HookToken.objects.get(name="ci").expires_at
    run("rotate", "ci")
    assert HookToken.objects.get(name__startswith="ci (").expires_at == expires_at
    assert HookToken.objects.get(name="ci").expires_at is None


def test_revoke_counts_at_once(send: Send) -> None:
    token = shown_token(run("create", "ci"))
    assert send(body={"text": "x"}, token=token).status_code == 200
    assert "revoked" in run("revoke", "ci")
    assert send(body={"text": "x"}, token=token).status_code == 401
    assert not is_usable(HookToken.objects.get(name="ci"), timezone.now())


def test_revoke_ends_what_a_rotation_left_valid_too(send: Send) -> None:
    made = [shown_token(run("create", "ci")), shown_token(run("create", "ci too"))]
    made += [shown_token(run("rotate", "ci")), shown_token(run("rotate", "ci"))]
    assert "with it what it replaced" in run("revoke", "ci")
    answers = [send(body={"text": "x"}, token=token).status_code for token in made]
    assert answers == [401, 200, 401, 401]


def test_the_list_says_what_each_token_is_worth() -> None:
    assert "hook_tokens create" in run()
    for name in ("good", "old", "gone"):
        run("create", name)
    HookToken.objects.filter(name="old").update(expires_at=timezone.now() - timedelta(days=1))
    run("revoke", "gone")
    lines = {line.split()[0]: line for line in run("list").splitlines()}
    assert "valid" in lines["good"]
    assert "never" in lines["good"]
    assert "expired" in lines["old"]
    assert "revoked" in lines["gone"]
    with override_settings(OPENCLAW_HOOKS_TOKEN="och_very_secret"):
        assert "OPENCLAW_HOOKS_TOKEN" in run()
        assert "very_secret" not in run()


def test_a_token_is_limited_to_mappings_and_stays_so_when_it_is_rotated(send: Send) -> None:
    for name in ("builds", "mail", "other"):
        HookMapping.objects.create(name=name, match_path=f"in/{name}", text_template="{{id}}")
    output = run("create", "ci", "--mapping", "builds", "--mapping", "mail")
    old = re.search(r"^  (och_\S{40,})$", output, re.MULTILINE)
    assert old
    assert "opens builds, mail" in output
    assert "curl http://127.0.0.1:8000/hooks/in/builds" in output
    run("create", "all")
    run("rotate", "ci")
    lines = {line.split("  ")[0]: line for line in run("list").splitlines()}
    assert "  builds, mail  " in lines["ci"]
    assert "  every hook  " in lines["all"]
    assert HookToken.objects.filter(limited=True, mappings__name="mail").count() == 2
    for path, status in (("in/builds", 200), ("in/other", 401), ("wake", 401)):
        answer = send(f"/hooks/{path}", {"id": 1, "text": "x"}, token=old[1])
        assert answer.status_code == status, path


def test_the_list_says_that_a_token_opens_nothing() -> None:
    mapping = HookMapping.objects.create(name="builds", text_template="x")
    run("create", "ci", "--mapping", "builds")
    mapping.delete()
    assert "  nothing  " in run("list")


def test_a_name_that_a_terminal_would_obey_is_written_out() -> None:
    assert "\x1b" not in run("create", "a\x1b[31mb")
    assert r"a\x1b[31mb" in run("list")


@pytest.mark.parametrize(
    "arguments", [["create", "a\udcff"], ["create", "a", "--mapping", "\udcff"]]
)
def test_arguments_that_are_no_text_are_wrong_usage(arguments: list[str]) -> None:
    with pytest.raises(CommandError, match="is not valid text"):
        run(*arguments)
    assert not HookToken.objects.exists()


@pytest.mark.parametrize(
    ("arguments", "error"),
    [
        (["create", "taken"], "name: Hook token with this Name already exists."),
        (["create", ""], "name: This field cannot be blank."),
        (["rotate", "nobody"], 'no hook token is called "nobody"'),
        (["revoke", "nobody"], 'no hook token is called "nobody"'),
        (["create", "x", "--mapping", "none"], 'no hook mapping is called "none"'),
        (["rotate", "revoked"], 'token "revoked" is revoked; create one under another name'),
        (["create", "x", "--expires", "999999999d"], "the duration reaches past the end"),
    ],
)
def test_errors_are_one_line_and_change_nothing(arguments: list[str], error: str) -> None:
    run("create", "taken")
    run("create", "revoked")
    run("revoke", "revoked")
    before = list(HookToken.objects.values())
    with pytest.raises(CommandError, match=re.escape(error)) as caught:
        run(*arguments)
    assert "\n" not in str(caught.value)
    assert list(HookToken.objects.values()) == before


def test_from_another_process_into_a_running_gateway(live_gateway: LiveGateway) -> None:
    """The exit statuses, and that a gateway takes a new token within a second."""
    import time

    import httpx

    token = shown_token(live_gateway.manage("hook_tokens", "create", "ci").stdout)

    def status() -> int:
        response = httpx.post(
            f"{live_gateway.url}/hooks/wake",
            json={"text": "hello"},
            headers={"Authorization": f"Bearer {token}"},
        )
        return response.status_code

    def becomes(wanted: int) -> bool:
        deadline = time.monotonic() + 1
        while time.monotonic() < deadline:
            if status() == wanted:
                return True
        return False

    assert becomes(200)
    live_gateway.manage("hook_tokens", "revoke", "ci")
    assert becomes(401)
    refused = live_gateway.manage("hook_tokens", "revoke", "nobody", check=False)
    assert (refused.returncode, refused.stderr.count("\n"), refused.stdout) == (1, 1, "")
    assert live_gateway.manage("hook_tokens", "revoke", check=False).returncode == 2
    odd = live_gateway.manage("hook_tokens", "create", "a\udcff", check=False)
    assert (odd.returncode, "Traceback" in odd.stderr) == (2, False)
