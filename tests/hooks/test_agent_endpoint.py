"""`POST /hooks/agent` and the mapping action `agent`: a turn of its own."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from hooks.models import HookMapping
from tests.hooks.conftest import Send, allow_keys, error_of, rows, set_policy
from wake.models import Agent, AgentTurn, SystemEvent

pytestmark = pytest.mark.django_db

BODY = {"message": "Look at the build"}


def run_id(response: Any) -> str:
    """Check the answer, which has exactly two fields, and return the run's id."""
    assert response.status_code == 200, response.content
    answer = json.loads(response.content)
    assert answer == {"ok": True, "runId": answer["runId"]}
    return str(answer["runId"])


def test_a_turn_is_stored_under_the_run_id_of_the_answer(send: Send) -> None:
    answered = run_id(send("/hooks/agent", {**BODY, "name": "CI", "timeoutSeconds": 90}))
    turn = AgentTurn.objects.get()
    assert str(turn.event.uid) == answered
    assert (turn.event.text, turn.event.external, turn.event.alone) == (BODY["message"], True, True)
    assert (turn.name, turn.timeout_seconds, turn.deliver) == ("CI", 90, True)
    assert turn.event.source == "hook:agent"  # the name is the sender's, and no trusted word


def test_without_a_key_each_has_a_session_of_its_own(send: Send) -> None:
    for _ in range(2):
        run_id(send("/hooks/agent", BODY))
    keys = set(SystemEvent.objects.values_list("session__key", flat=True))
    assert len(keys) == 2
    assert all(re.fullmatch(r"agent:main:hook:[0-9a-f-]{36}", key) for key in keys)


def test_the_policys_default_session_goes_before_that(send: Send) -> None:
    set_policy(default_session_key="hook:Turns")
    run_id(send("/hooks/agent", {**BODY, "sessionKey": " "}))
    assert SystemEvent.objects.get().session.key == "agent:main:hook:turns"


def test_a_requests_key_goes_before_both_if_the_policy_lets_it(send: Send) -> None:
    set_policy(default_session_key="hook:turns")
    response = send("/hooks/agent", {**BODY, "sessionKey": "hook:mine"})
    assert "sessionKey is not allowed" in error_of(response)
    allow_keys("hook:")
    Agent.objects.create(id="ops")
    run_id(send("/hooks/agent", {**BODY, "sessionKey": "hook:mine", "agentId": "ops"}))
    assert SystemEvent.objects.get().session.key == "agent:ops:hook:mine"


@pytest.mark.parametrize("default", ["", "other:turns"])
def test_default_sessions_too_must_start_with_an_allowed_prefix(send: Send, default: str) -> None:
    allow_keys("ci:")
    set_policy(default_session_key=default)
    response = send("/hooks/agent", BODY)
    assert (response.status_code, rows()) == (400, (0, 0, 0))
    assert "allowed session prefixes in the hook policy" in error_of(response)


@pytest.mark.parametrize(
    ("body", "error"),
    [
        ({}, "message required"),
        ({"message": " "}, "message required"),
        ({"message": 5}, "message must be a string"),
        ({"text": "x"}, "message required"),
        ([], "the body must be a JSON object"),
        ({**BODY, "deliver": "yes"}, "deliver must be true or false"),
        ({**BODY, "timeoutSeconds": 0}, "timeoutSeconds must be a number from 1 to 86400"),
        ({**BODY, "timeoutSeconds": True}, "timeoutSeconds must be a number from 1 to 86400"),
        ({**BODY, "timeoutSeconds": "60"}, "timeoutSeconds must be a number from 1 to 86400"),
        ({**BODY, "timeoutSeconds": 1e12}, "timeoutSeconds must be a number from 1 to 86400"),
        ({**BODY, "agentId": "nobody"}, 'unknown agent "nobody"'),
        ({**BODY, "name": ["x"]}, "name must be a string"),
    ],
    ids=str,
)
def test_400_for_what_cannot_be_done(send: Send, body: Any, error: str) -> None:
    response = send("/hooks/agent", body)
    assert (response.status_code, error_of(response), rows()) == (400, error, (0, 0, 0))


@pytest.mark.parametrize("field", ["channel", "to"])
def test_a_channel_is_refused_in_words(send: Send, field: str) -> None:
    response = send("/hooks/agent", {**BODY, field: "telegram"})
    assert (response.status_code, rows()) == (400, (0, 0, 0))
    assert error_of(response).startswith(f"{field} is not supported: this gateway delivers to")


@pytest.mark.parametrize(
    ("name", "kept"),
    [(None, "agent"), ("a\nb\0c\t d", "a b c d"), ("x" * 300, "x" * 100)],
)
def test_a_name_is_one_short_line(send: Send, name: str | None, kept: str) -> None:
    run_id(send("/hooks/agent", {**BODY, "name": name}))
    assert AgentTurn.objects.get().name == kept


def test_equal_turns_are_two_and_an_idempotency_key_makes_them_one(send: Send) -> None:
    runs = {run_id(send("/hooks/agent", {**BODY, "sessionKey": None})) for _ in range(2)}
    assert len(runs) == 2
    first = run_id(send("/hooks/agent", {**BODY, "idempotencyKey": "k"}))
    again = json.loads(send("/hooks/agent", {**BODY, "idempotencyKey": "k"}).content)
    assert again == {"ok": True, "runId": first, "eventOutcome": "replayed"}
    assert SystemEvent.objects.count() == 3


def test_a_mapping_can_ask_for_a_turn(send: Send) -> None:
    HookMapping.objects.create(
        name="Build",
        match_path="ci",
        action="agent",
        text_template="Build {{id}} failed",
        session_key="hook:ci",
        mode="next-heartbeat",
        deliver=False,
        timeout_seconds=30,
    )
    answered = run_id(send("/hooks/ci", {"id": 7}))
    turn = AgentTurn.objects.get()
    assert (str(turn.event.uid), turn.event.text) == (answered, "Build 7 failed")
    assert turn.event.session.key == "agent:main:hook:ci"
    assert (turn.name, turn.timeout_seconds, turn.deliver) == ("Build", 30, False)
    assert turn.note_mode == "next-heartbeat"
    assert turn.event.session.due_reason == "wake"  # the mode is the note's: the turn begins now
