"""How the HTTP door refuses: with which status, in which order, and without storing a row."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
from django.db import OperationalError, connection
from django.test import override_settings
from django.utils import timezone

from hooks.models import HookMapping, HookToken
from tests.hooks.conftest import Send, allow_keys, error_of, rows, set_policy
from wake.models import Agent


@pytest.fixture(autouse=True)
def _a_refusal_stores_nothing(db: None) -> Iterator[None]:
    before = rows()
    yield
    assert rows() == before


# --- Where hooks are ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "path", ["/hooks", "/hooks/", "/hooks//", "/hook/wake", "/hookswake", "/x"]
)
@pytest.mark.parametrize("method", ["POST", "GET"])
def test_404_where_no_hook_can_be(send: Send, path: str, method: str) -> None:
    assert send(path, {"text": "x"}, method=method).status_code == 404


@pytest.mark.parametrize("method", ["POST", "GET"])
@pytest.mark.parametrize("debug", [False, True])
def test_404_when_hooks_are_off(send: Send, method: str, debug: bool) -> None:
    set_policy(enabled=False)
    with override_settings(DEBUG=debug):
        assert send(method=method, body={"text": "x"}).status_code == 404


def test_404_when_no_mapping_is_on_the_path_before_the_body_is_looked_at(send: Send) -> None:
    response = send("/hooks/ci/build", b"not JSON")
    assert response.status_code == 404
    assert error_of(response) == "no hook mapping matches 'ci/build'"


def test_404_when_no_mapping_matches_the_source(send: Send) -> None:
    HookMapping.objects.create(name="a", match_path="ci", match_source="a", text_template="x")
    assert send("/hooks/ci", {"source": "b"}).status_code == 404
    assert send("/hooks/ci", b"not JSON").status_code == 400


def test_the_rest_of_the_site_keeps_its_trailing_slashes(send: Send) -> None:
    response = send("/admin", method="GET")
    assert (response.status_code, response["Location"]) == (301, "/admin/")


# --- Method, token in the query, credential -----------------------------------------------------


@pytest.mark.parametrize("method", ["GET", "HEAD", "OPTIONS", "PUT", "PATCH", "DELETE", "TRACE"])
def test_405_for_all_but_post_before_the_credential(send: Send, method: str) -> None:
    response = send("/hooks/wake?token=x", token=None, method=method)
    assert (response.status_code, response["Allow"]) == (405, "POST")
    if method != "HEAD":
        assert error_of(response) == "method not allowed: use POST"


@pytest.mark.parametrize("query", ["token=secret", "Token=secret", "token=", "a=1&TOKEN"])
def test_400_for_a_token_in_the_query_before_the_credential(send: Send, query: str) -> None:
    response = send(f"/hooks/wake?{query}", {"text": "x"}, token=None)
    assert response.status_code == 400
    assert "Authorization: Bearer" in error_of(response)
    assert b"secret" not in response.content


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": "Bearer"},
        {"Authorization": "Bearer  "},
        {"Authorization": "Basic YTpi"},
        {"Authorization": "TOKEN"},
        {"Authorization": "Bearer TOKEN extra"},
        {"Authorization": "Bearer p\u00e4ssw\u00f6rt"},
        {"Authorization": "Bearer \ud800"},
        {"Authorization": "Bearer " + "x" * 100_000},
        {"X-OpenClaw-Token": "wrong"},
        {"X-OpenClaw-Token": ""},
    ],
)
def test_401_without_the_right_credential_before_the_path_and_the_body(
    send: Send, hook_token: str, headers: dict[str, str]
) -> None:
    shown = {name: value.replace("TOKEN", hook_token) for name, value in headers.items()}
    for path in ("/hooks/wake", "/hooks/nowhere"):
        response = send(path, b"not JSON", token=None, headers=shown)
        assert (response.status_code, response.content) == (401, b"Unauthorized\n")
        assert response["Content-Type"].startswith("text/plain")
        assert response["WWW-Authenticate"] == "Bearer"


@pytest.mark.parametrize("change", ["expires_at", "revoked_at"])
def test_401_at_once_for_a_token_that_is_expired_or_revoked(send: Send, change: str) -> None:
    assert send(body={"text": " "}).status_code == 400
    token = HookToken.objects.get()
    setattr(token, change, timezone.now() - timedelta(seconds=1))
    token.save()
    assert send(body={"text": "x"}).status_code == 401


# --- The body -----------------------------------------------------------------------------------


def test_413_for_a_body_over_the_limit(send: Send) -> None:
    set_policy(max_body_bytes=1024)
    response = send(body=b"x" * 1025)
    assert response.status_code == 413
    assert "1024 bytes" in error_of(response)
    assert send(body=b"x" * 1024).status_code == 400
    assert send(body=b"x" * 1025, token="wrong").status_code == 401


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b" ",
        b"{",
        b'{"text": "x"',
        b'{"text": "x"} x',
        b"text=x",
        b'{"text": NaN}',
        b'{"text": Infinity}',
        b'{"text": 1e999}',
        b'{"text": "\xff"}',
        b'{"text": "\\ud800"}',
        b'{"text": "\\ud800\\ud800"}',
        b"\xff\xfe",
        b"\x00",
        b"[" * 200_000,
        b'{"a":' * 30_000,
        b"9" * 10_000,
        b'["text"]',
        b'"text"',
        b"17",
        b"null",
    ],
    ids=lambda body: repr(body[:24]),
)
def test_400_for_a_body_that_is_not_a_json_object(send: Send, body: bytes) -> None:
    response = send(body=body)
    assert response.status_code == 400
    assert "the body" in error_of(response)


def test_400_for_a_form_whatever_its_content_type(send: Send) -> None:
    for content_type in ("application/x-www-form-urlencoded", "multipart/form-data; boundary=x"):
        response = send(body=b"text=hello", content_type=content_type)
        assert (response.status_code, error_of(response)[:8]) == (400, "the body")


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "text required"),
        ({"text": None}, "text required"),
        ({"text": " \n"}, "text required"),
        ({"text": 5}, "text must be a string"),
        ({"text": ["x"]}, "text must be a string"),
        ({"text": "x", "sessionKey": 5}, "sessionKey must be a string"),
        ({"text": "x", "sessionKey": {}}, "sessionKey must be a string"),
        ({"text": "x", "agentId": False}, "agentId must be a string"),
        ({"text": "x", "agentId": "nobody"}, 'unknown agent "nobody"'),
        ({"text": "x", "agentId": "off"}, 'agent "off" is disabled'),
        ({"text": "x\0"}, "text contains a NUL character"),
        ({"text": "x" * 65_537}, "text is 65537 bytes long; at most 65536 are allowed"),
        ({"text": "x", "sessionKey": "agent:ops"}, 'malformed session key "agent:ops"'),
        (
            {"text": "x", "sessionKey": "agent:ops:hook:x"},
            'session key "agent:ops:hook:x" targets agent "ops" but the default agent is "main"; '
            "cross-agent wake is not supported",
        ),
    ],
    ids=str,
)
def test_400_for_what_cannot_be_done(send: Send, body: dict[str, Any], error: str) -> None:
    allow_keys()
    Agent.objects.create(id="ops")
    Agent.objects.create(id="off", enabled=False)
    response = send(body={"text": "x", **body} if "text" in body else body)
    assert (response.status_code, error_of(response)) == (400, error)


def test_400_for_more_parameters_than_a_url_may_have(send: Send) -> None:
    response = send("/hooks/wake?" + "&".join(f"a{n}=1" for n in range(1100)), {"text": "x"})
    assert (response.status_code, error_of(response)) == (400, "malformed request")


# --- When it cannot be stored -------------------------------------------------------------------


def test_503_when_the_database_cannot_store(send: Send) -> None:
    def fail(execute: Any, sql: str, *arguments: Any) -> Any:
        if "INTO wake_systemevent" in sql:
            raise OperationalError("disk full at /secret/place")
        return execute(sql, *arguments)

    with connection.execute_wrapper(fail):
        response = send(body={"text": "x"})
    assert (response.status_code, response["Retry-After"]) == (503, "5")
    assert error_of(response) == "the event could not be stored now; try again"


def test_503_while_the_database_is_away_also_for_the_configuration(send: Send) -> None:
    from hooks.configuration import hooks
    from wake.configuration import gateway

    def fail(*arguments: Any) -> Any:
        raise OperationalError("connection refused")

    hooks()
    hooks.forget()
    gateway.forget()
    with connection.execute_wrapper(fail):
        response = send(body={"text": "x"})
    assert (response.status_code, response["Retry-After"]) == (503, "5")
