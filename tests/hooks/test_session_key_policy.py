"""Which session keys the HTTP door may use: `allow_request_session_key` and the prefixes."""

from __future__ import annotations

import json

import pytest
from django.http import HttpResponse

from hooks.models import AllowedSessionPrefix, HookMapping
from tests.hooks.conftest import Send, allow_keys, error_of, rows
from wake.models import Agent, GatewaySettings

pytestmark = pytest.mark.django_db


def key_of(response: HttpResponse) -> str:
    assert response.status_code == 200, response.content
    return str(json.loads(response.content)["sessionKey"])


def add_mapping(session_key: str, agent: str | None = None) -> None:
    HookMapping.objects.create(
        name="gh", match_path="gh", agent_id=agent, session_key=session_key, text_template="x"
    )


def test_a_request_may_not_choose_its_key_by_default(send: Send) -> None:
    before = rows()
    response = send(body={"text": "x", "sessionKey": "hook:x"})
    assert response.status_code == 400
    assert error_of(response) == (
        "sessionKey is not allowed: turn on allow_request_session_key "
        '("requests may choose the session") in the hook policy'
    )
    assert rows() == before


def test_a_template_is_a_key_from_outside(send: Send) -> None:
    add_mapping("hook:gh:{{payload.id}}")
    before = rows()
    response = send("/hooks/gh", {"id": 5})
    assert response.status_code == 400
    assert "a session key template is not allowed: turn on allow_request" in error_of(response)
    assert rows() == before
    allow_keys()
    assert key_of(send("/hooks/gh", {"id": 5})) == "agent:main:hook:gh:5"


def test_a_fixed_key_is_the_operators_own(send: Send) -> None:
    add_mapping("hook:gh")
    assert key_of(send("/hooks/gh", {})) == "agent:main:hook:gh"


def test_a_fixed_key_must_have_an_allowed_prefix_too(send: Send) -> None:
    add_mapping("discord:channel:1")
    AllowedSessionPrefix.objects.create(prefix="hook:")
    before = rows()
    response = send("/hooks/gh", {})
    assert response.status_code == 400
    assert error_of(response) == (
        "session key 'discord:channel:1' starts with none of the allowed session prefixes "
        "in the hook policy: hook:"
    )
    assert rows() == before


@pytest.mark.parametrize(
    ("prefixes", "key", "allowed"),
    [
        (["hook:"], "hook:x", True),
        (["hook:"], " HOOK:x ", True),
        (["Hook:"], "hook:x", True),
        (["hook:"], "agent:main:hook:x", False),
        (["hook:"], "hooks:x", False),
        (["hook:"], "main", False),
        (["hook:"], "x:hook:y", False),
        (["agent:main:hook:"], "hook:x", True),
        (["agent:main:hook:"], "AGENT:Main:Hook:x", True),
        (["agent:main:hook:"], "other:x", False),
        (["agent:main:"], "main", True),
        (["other:", "hook:"], "hook:x", True),
        ([], "anything", True),
    ],
)
def test_a_key_must_start_with_an_allowed_prefix_as_written_or_as_canonicalized(
    send: Send, prefixes: list[str], key: str, allowed: bool
) -> None:
    allow_keys(*prefixes)
    before = rows()
    response = send(body={"text": "x", "sessionKey": key})
    assert response.status_code == (200 if allowed else 400)
    if not allowed:
        assert "allowed session prefixes" in error_of(response)
        assert rows() == before


def test_in_scope_global_the_key_as_written_still_counts(send: Send) -> None:
    GatewaySettings.objects.update(scope="global")
    allow_keys("hook:")
    assert key_of(send(body={"text": "x", "sessionKey": "hook:x"})) == "global"
    assert send(body={"text": "x", "sessionKey": "other:x"}).status_code == 400


def test_no_key_needs_no_prefix(send: Send) -> None:
    AllowedSessionPrefix.objects.create(prefix="hook:")
    assert key_of(send(body={"text": "x"})) == "agent:main:main"


@pytest.mark.parametrize("agent", [None, "main"])
@pytest.mark.parametrize("key", ["agent:ops:x", "Agent:OPS:main", "agent:ops", "agent::x"])
def test_a_rendered_key_cannot_leave_the_mappings_agent(
    send: Send, key: str, agent: str | None
) -> None:
    Agent.objects.create(id="ops")
    allow_keys()
    add_mapping("{{payload.key}}", agent)
    before = rows()
    assert send("/hooks/gh", {"key": key}).status_code == 400
    assert rows() == before


def test_the_policy_counts_at_once(send: Send) -> None:
    body = {"text": "x", "sessionKey": "hook:x"}
    assert send(body=body).status_code == 400
    allow_keys("hook:")
    assert send(body=body).status_code == 200
    AllowedSessionPrefix.objects.get().delete()
    assert send(body={**body, "sessionKey": "other:x"}).status_code == 200
    AllowedSessionPrefix.objects.create(prefix="third:")
    assert send(body=body).status_code == 400
