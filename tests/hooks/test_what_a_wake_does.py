"""The table of contract "What a wake does", cell by cell, for the two doors over HTTP."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta

import pytest
from django.http import HttpResponse
from django.utils import timezone

from hooks.models import HookMapping
from tests.hooks.conftest import Send, allow_keys
from wake.models import Agent, DueReason, GatewaySettings, Session, SystemEvent
from wake.schedule import Schedule, next_due

Door = Callable[..., HttpResponse]

TEXT = "CI finished: 214 passed"


@pytest.fixture(params=["POST /hooks/wake", "mapping, fixed key", "mapping, template key"])
def door(request: pytest.FixtureRequest, send: Send) -> Door:
    """A way in: called with a mode and perhaps a session key and an agent."""

    def by_wake(mode: str, key: str | None = None, agent: str | None = None) -> HttpResponse:
        body = {"text": TEXT, "mode": mode, "sessionKey": key, "agentId": agent}
        return send("/hooks/wake", body)

    def by_mapping(mode: str, key: str | None = None, agent: str | None = None) -> HttpResponse:
        templated = key is not None and "template" in request.param
        HookMapping.objects.create(
            name="ci",
            match_path="/ci/",
            mode=mode,
            agent_id=agent,
            session_key="{{payload.key}}" if templated else key or "",
            text_template="{{payload.job}} finished: {{payload.passed}} passed",
        )
        return send("/hooks/ci", {"job": "CI", "passed": 214, "key": key})

    allow_keys()
    Agent.objects.create(id="ops")
    Agent.objects.create(id="off", enabled=False)
    return by_wake if "POST" in request.param else by_mapping


def due() -> dict[str, str]:
    """Return why each session is due, by its key; only those that are due now or by schedule."""
    now = timezone.now()
    for session in Session.objects.filter(due_reason=DueReason.WAKE):
        assert session.due_at
        assert session.due_at <= now
    for session in Session.objects.filter(due_reason=DueReason.SCHEDULE):
        every = Schedule(session.agent.heartbeat_every)
        assert session.due_at == next_due(session.agent_id, every, now)
    return {session.key: session.due_reason for session in Session.objects.exclude(due_at=None)}


def receipt(response: HttpResponse, mode: str) -> str:
    """Check the receipt against what is stored and return its session key."""
    event = SystemEvent.objects.get()
    assert response.status_code == 200
    assert json.loads(response.content) == {
        "ok": True,
        "mode": mode,
        "eventOutcome": "queued",
        "sessionKey": event.session.key,
        "eventId": str(event.uid),
    }
    assert (event.text, event.external) == (TEXT, True)
    assert event.source in {"hook:wake", "hook:ci"}
    return event.session.key


def test_no_key_now_nudges_every_enabled_agent(door: Door) -> None:
    assert receipt(door("now"), "now") == "agent:main:main"
    assert due() == {"agent:main:main": "wake", "agent:ops:main": "wake"}


def test_no_key_now_with_an_agent_nudges_only_that_one(door: Door) -> None:
    assert receipt(door("now", agent="ops"), "now") == "agent:ops:main"
    assert due() == {"agent:ops:main": "wake"}


def test_no_key_next_heartbeat_waits_for_the_schedule(door: Door) -> None:
    assert receipt(door("next-heartbeat"), "next-heartbeat") == "agent:main:main"
    assert due() == {"agent:main:main": "schedule"}


def test_no_key_next_heartbeat_with_an_agent_waits_for_its_schedule(door: Door) -> None:
    assert receipt(door("next-heartbeat", agent="ops"), "next-heartbeat") == "agent:ops:main"
    assert due() == {"agent:ops:main": "schedule"}


def test_no_key_next_heartbeat_without_a_schedule_is_due_at_once(door: Door) -> None:
    Agent.objects.filter(pk="main").update(heartbeat_every=timedelta(0))
    assert receipt(door("next-heartbeat"), "next-heartbeat") == "agent:main:main"
    assert due() == {"agent:main:main": "wake"}


def test_key_now_wakes_exactly_that_session(door: Door) -> None:
    assert receipt(door("now", "hook:Build"), "now") == "agent:main:hook:build"
    assert due() == {"agent:main:hook:build": "wake"}


def test_key_next_heartbeat_wakes_another_session_at_once(door: Door) -> None:
    response = door("next-heartbeat", "hook:build", "ops")
    assert receipt(response, "next-heartbeat") == "agent:ops:hook:build"
    assert due() == {"agent:ops:hook:build": "wake"}


def test_key_of_the_main_session_next_heartbeat_waits_for_the_schedule(door: Door) -> None:
    assert receipt(door("next-heartbeat", "main"), "next-heartbeat") == "agent:main:main"
    assert due() == {"agent:main:main": "schedule"}


def test_key_of_the_main_session_now_wakes_it_alone(door: Door) -> None:
    assert receipt(door("now", "agent:main:main"), "now") == "agent:main:main"
    assert due() == {"agent:main:main": "wake"}


def test_every_key_is_global_in_scope_global(door: Door) -> None:
    GatewaySettings.objects.update(scope="global")
    assert receipt(door("now", "hook:build", "ops"), "now") == "global"
    assert SystemEvent.objects.get().session.agent_id == "ops"


def test_the_same_wake_again_is_coalesced(send: Send, db: None) -> None:
    first = json.loads(send(body={"text": TEXT}).content)
    again = json.loads(send(body={"text": f" {TEXT}\n"}).content)
    assert again == {**first, "eventOutcome": "coalesced"}
    assert SystemEvent.objects.count() == 1
