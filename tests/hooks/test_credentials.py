"""The credentials that the HTTP door takes, and the note of their last use."""

from __future__ import annotations

import logging
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError, connection
from django.test import RequestFactory, override_settings
from django.utils import timezone

from hooks import tokens
from hooks.configuration import hooks
from hooks.models import HookToken
from hooks.views import HookView
from tests.hooks.conftest import Send
from wake import configuration

pytestmark = pytest.mark.django_db


@pytest.mark.parametrize(
    "headers",
    [
        {"Authorization": "Bearer TOKEN"},
        {"Authorization": "bearer  TOKEN "},
        {"Authorization": "BEARER TOKEN"},
        {"X-OpenClaw-Token": "TOKEN"},
        {"x-openclaw-token": " TOKEN "},
        {"Authorization": "Basic YTpi", "X-OpenClaw-Token": "TOKEN"},
        {"Authorization": "Bearer wrong", "X-OpenClaw-Token": "TOKEN"},
    ],
)
def test_either_header_will_do(send: Send, hook_token: str, headers: dict[str, str]) -> None:
    shown = {name: value.replace("TOKEN", hook_token) for name, value in headers.items()}
    assert send(body={"text": "x"}, token=None, headers=shown).status_code == 200


def test_several_tokens_are_valid_at_once(send: Send, hook_token: str) -> None:
    _, other = tokens.create("other", expires_at=timezone.now() + timedelta(hours=1))
    for token in (hook_token, other):
        assert send(body={"text": "x"}, token=token).status_code == 200


def test_the_token_from_the_environment_is_valid(send: Send) -> None:
    with override_settings(OPENCLAW_HOOKS_TOKEN="from the environment"):
        assert send(body={"text": "x"}, token="from the environment").status_code == 200


def test_without_one_in_the_environment_an_empty_token_is_wrong(send: Send) -> None:
    assert send(body={"text": "x"}, token="").status_code == 401


def last_used() -> Any:
    return HookToken.objects.get(name="tests").last_used_at


def test_the_last_use_is_noted_once_a_minute_at_most(send: Send) -> None:
    before = timezone.now()
    send(body={"text": "x"}, token="wrong")
    assert last_used() is None
    send(body=b"refused for its body")
    noted = last_used()
    assert before <= noted <= timezone.now()
    send(body={"text": "x"})
    assert last_used() == noted


def test_a_minute_later_it_is_noted_again(send: Send, monkeypatch: pytest.MonkeyPatch) -> None:
    send(body={"text": "x"})
    noted = last_used()
    later = noted + timedelta(minutes=1)
    monkeypatch.setattr("hooks.authentication.timezone.now", lambda: later)
    send(body={"text": "x"})
    assert last_used() == later


def test_a_use_that_cannot_be_noted_does_not_fail_the_request(
    send: Send, hook_token: str, caplog: pytest.LogCaptureFixture
) -> None:
    def fail(execute: Any, sql: str, *arguments: Any) -> Any:
        if sql.startswith("UPDATE") and "hooktoken" in sql:
            raise OperationalError("database is locked")
        return execute(sql, *arguments)

    with connection.execute_wrapper(fail), caplog.at_level(logging.DEBUG):
        assert send(body={"text": "x"}).status_code == 200
    assert last_used() is None
    assert f"the use of hook token {HookToken.objects.get().pk} is not noted" in caplog.text
    assert hook_token not in caplog.text


def test_tokens_are_never_logged(
    send: Send, hook_token: str, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level(logging.DEBUG):
        send(body={"text": ""})
        send(body={"text": "x"}, token="och_wrong")
        send("/hooks/wake?token=och_query", {"text": "x"})
    for secret in (hook_token, "och_wrong", "och_query"):
        assert secret not in caplog.text


def test_until_it_is_answered_a_request_asks_the_database_nothing_beside_its_dispatch(
    hook_token: str, rf: RequestFactory, django_assert_num_queries: Any
) -> None:
    hooks()
    configuration.gateway()
    for headers, status in (({"X-OpenClaw-Token": hook_token}, 400), ({}, 405)):
        request = rf.generic("POST" if headers else "GET", "/hooks/wake", b"{", headers=headers)
        with django_assert_num_queries(0):
            assert HookView.as_view()(request, path="wake").status_code == status
