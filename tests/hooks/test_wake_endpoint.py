"""What `POST /hooks/wake` takes, however sloppily it is sent."""

from __future__ import annotations

import json
from typing import Any

import pytest

from tests.hooks.conftest import Send, error_of, rows, set_policy
from wake.models import GatewaySettings


@pytest.mark.parametrize("path", ["/hooks/wake/", "/hooks//wake", "/hooks/wake//"])
def test_outer_slashes_do_not_matter(send: Send, path: str) -> None:
    assert send(path, {"text": "x"}).status_code == 200


def test_another_base_path_counts_at_once(send: Send) -> None:
    set_policy(base_path="/in/from-outside")
    assert send("/in/from-outside/wake", {"text": "x"}).status_code == 200
    assert send("/hooks/wake", {"text": "x"}).status_code == 404
    assert send("/in/wake", {"text": "x"}).status_code == 404


def test_a_body_of_megabytes_is_taken_when_the_policy_says_so(send: Send) -> None:
    set_policy(max_body_bytes=4 * 1024 * 1024)
    assert send(body={"text": "x", "more": "y" * 3 * 1024 * 1024}).status_code == 200


@pytest.mark.parametrize("content_type", ["", "text/plain", "multipart/form-data", "a/b; c=d"])
@pytest.mark.parametrize("accept", ["text/html", "application/xml;q=0.1", "garbage", "*/*"])
def test_json_is_taken_and_answered_whatever_the_headers_say(
    send: Send, content_type: str, accept: str
) -> None:
    response = send(
        "/hooks/wake?format=xml",
        {"text": "x"},
        content_type=content_type,
        headers={"Accept": accept},
    )
    assert (response.status_code, response["Content-Type"]) == (200, "application/json")


@pytest.mark.parametrize(
    ("written", "mode"),
    [
        ("next-heartbeat", "next-heartbeat"),
        ("now", "now"),
        ("Next-Heartbeat", "now"),
        ("soon", "now"),
        (None, "now"),
        (5, "now"),
        ({}, "now"),
    ],
)
def test_mode_is_now_unless_exactly_next_heartbeat(send: Send, written: Any, mode: str) -> None:
    answer = json.loads(send(body={"text": "x", "mode": written}).content)
    assert (answer["ok"], answer["mode"]) == (True, mode)


@pytest.mark.parametrize("key", ["", "  ", "\n", None])
def test_a_blank_session_key_is_no_key(send: Send, key: str | None) -> None:
    answer = json.loads(send(body={"text": "x", "sessionKey": key, "agentId": key}).content)
    assert answer["sessionKey"] == "agent:main:main"


def test_429_when_the_session_is_full(send: Send) -> None:
    GatewaySettings.objects.update(max_queued_events=1)
    assert send(body={"text": "one"}).status_code == 200
    before = rows()
    response = send(body={"text": "two"})
    assert (response.status_code, response["Retry-After"]) == (429, "10")
    assert "agent:main:main" in error_of(response)
    assert rows() == before
