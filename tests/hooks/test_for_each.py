"""Mappings that act once for each item, and transforms: all of it or nothing."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from typing import Any

import pytest

from hooks import transforms
from hooks.models import HookMapping
from tests.hooks.conftest import Send, allow_keys, error_of, rows
from wake.models import GatewaySettings, SystemEvent

pytestmark = pytest.mark.django_db

MAIL = {
    "name": "mail",
    "match_path": "gmail",
    "for_each": "messages",
    "text_template": "{{messages[0].subject}} for {{account}}",
    "session_key": "hook:gmail:{{messages[0].id}}",
}


def mails(*subjects: str | None) -> dict[str, Any]:
    items = [{"id": f"m{n}", "subject": subject} for n, subject in enumerate(subjects, 1)]
    return {"account": "a@b", "messages": items}


@pytest.fixture
def mail() -> HookMapping:
    allow_keys("hook:gmail:")
    return HookMapping.objects.create(**MAIL)


def test_each_item_is_an_event_of_its_own(send: Send, mail: HookMapping) -> None:
    response = send("/hooks/gmail", mails("One", "Two"))
    stored = list(SystemEvent.objects.order_by("pk").values_list("text", "session__key", "uid"))
    assert [row[:2] for row in stored] == [
        ("One for a@b", "agent:main:hook:gmail:m1"),
        ("Two for a@b", "agent:main:hook:gmail:m2"),
    ]
    assert json.loads(response.content) == {
        "ok": True,
        "results": [
            {
                "ok": True,
                "mode": "now",
                "eventOutcome": "queued",
                "sessionKey": key,
                "eventId": str(uid),
            }
            for _, key, uid in stored
        ],
    }


def test_no_items_are_nothing_to_do(send: Send, mail: HookMapping) -> None:
    response = send("/hooks/gmail", mails())
    assert (response.status_code, response.content, rows()) == (204, b"", (0, 0, 0))


@pytest.mark.parametrize("payload", [{}, {"messages": None}, {"messages": {"0": {}}}, [], "x"])
def test_what_is_no_array_is_refused(send: Send, mail: HookMapping, payload: Any) -> None:
    response = send("/hooks/gmail", payload)
    assert response.status_code == 400
    assert error_of(response) == (
        'hook mapping "mail" expects an array in the payload\'s "messages"'
    )


def test_more_than_200_are_refused_and_not_cut(send: Send, mail: HookMapping) -> None:
    response = send("/hooks/gmail", mails(*["x"] * 201))
    assert (response.status_code, rows()) == (400, (0, 0, 0))
    assert "at most 200 items" in error_of(response)
    assert send("/hooks/gmail", mails(*["x"] * 200)).status_code == 200
    assert SystemEvent.objects.count() == 200


def test_one_bad_item_refuses_them_all(send: Send, mail: HookMapping) -> None:
    mail.text_template = "{{messages[0].subject}}"
    mail.save()
    response = send("/hooks/gmail", mails("One", None, "Three"))
    assert (response.status_code, rows()) == (400, (0, 0, 0))
    assert error_of(response) == "hook mapping requires text"


def test_one_full_session_refuses_them_all(send: Send, mail: HookMapping) -> None:
    send("/hooks/gmail", mails("One"))
    GatewaySettings.objects.update(max_queued_events=1)
    from wake import configuration

    configuration.gateway.forget()
    before = rows()
    again = {"messages": [{"id": "m2", "subject": "x"}, {"id": "m1", "subject": "y"}]}
    assert send("/hooks/gmail", again).status_code == 429
    assert rows() == before


def test_the_same_batch_again_is_replayed_as_a_whole(send: Send, mail: HookMapping) -> None:
    first = json.loads(send("/hooks/gmail", mails("1", "2"), headers={"webhook-id": "x"}).content)
    again = json.loads(send("/hooks/gmail", mails("1", "2"), headers={"webhook-id": "x"}).content)
    assert again["eventOutcome"] == "replayed"
    assert [r["eventId"] for r in again["results"]] == [r["eventId"] for r in first["results"]]
    assert {r["eventOutcome"] for r in again["results"]} == {"replayed"}


def test_turns_without_a_key_have_a_session_each(send: Send) -> None:
    HookMapping.objects.create(**{**MAIL, "action": "agent", "session_key": ""})
    answer = json.loads(send("/hooks/gmail", mails("One", "Two")).content)
    assert len({result["runId"] for result in answer["results"]}) == 2
    assert len(set(SystemEvent.objects.values_list("session", flat=True))) == 2


# --- Transforms ---------------------------------------------------------------------------------


@pytest.fixture
def transform() -> Iterator[Any]:
    """Register a transform as "t" for this test."""
    yield lambda function: transforms.register("t")(function)
    transforms._registered.pop("t", None)


def mapped(**values: Any) -> HookMapping:
    return HookMapping.objects.create(
        name="m", match_path="m", transform="t", text_template="as {{who}}", **values
    )


def test_a_transform_sets_text_mode_and_key_and_templates_do_the_rest(
    send: Send, transform: Any
) -> None:
    allow_keys("hook:")
    seen: list[Any] = []

    def three(payload: Any, headers: Any, query: Any, path: str) -> Any:
        seen.append((payload, headers["x-kind"], dict(query), path, "authorization" in headers))
        return {"text": "written", "mode": "next-heartbeat", "session_key": "hook:t"}

    transform(three)
    mapped()
    answer = json.loads(send("/hooks/m?a=b", {"who": "me"}, headers={"X-Kind": "k"}).content)
    assert (answer["mode"], answer["sessionKey"]) == ("next-heartbeat", "agent:main:hook:t")
    assert SystemEvent.objects.get().text == "written"
    assert seen == [({"who": "me"}, "k", {"a": "b"}, "m", False)]


def test_what_it_does_not_set_the_templates_do(send: Send, transform: Any) -> None:
    transform(lambda payload, headers, query, path: {})
    mapped()
    send("/hooks/m", {"who": "me"})
    assert SystemEvent.objects.get().text == "as me"


def test_its_key_comes_from_outside(send: Send, transform: Any) -> None:
    transform(lambda payload, headers, query, path: {"session_key": "hook:t"})
    mapped()
    response = send("/hooks/m", {"who": "me"})
    assert (response.status_code, rows()) == (400, (0, 0, 0))
    assert error_of(response).startswith("a session key from a transform is not allowed")


@pytest.mark.parametrize("key", ["", " "])
def test_a_key_that_it_leaves_empty_is_refused_and_not_the_main_session(
    send: Send, transform: Any, key: str
) -> None:
    transform(lambda payload, headers, query, path: {"session_key": key})
    mapped(session_key="hook:fixed")
    response = send("/hooks/m", {"who": "me"})
    assert (response.status_code, rows()) == (400, (0, 0, 0))
    assert "its transform left it empty" in error_of(response)


def test_none_is_nothing_to_do(send: Send, transform: Any) -> None:
    transform(lambda payload, headers, query, path: None)
    mapped()
    response = send("/hooks/m", {})
    assert (response.status_code, response.content, rows()) == (204, b"", (0, 0, 0))


@pytest.mark.parametrize(
    "result",
    [
        lambda: 1 / 0,
        lambda: 5,
        lambda: {"agent_id": "ops"},
        lambda: {"text": 5},
        lambda: {"mode": "soon"},
        lambda: (_ for _ in ()).throw(RecursionError("secret")),
    ],
)
def test_500_for_a_defect_says_nothing_outside_and_all_in_the_log(
    send: Send, transform: Any, result: Any, caplog: pytest.LogCaptureFixture
) -> None:
    transform(lambda payload, headers, query, path: result())
    mapped()
    with caplog.at_level(logging.ERROR):
        response = send("/hooks/m", {})
    assert (response.status_code, rows()) == (500, (0, 0, 0))
    assert error_of(response) == "the transform of this hook failed"
    assert "Traceback" in caplog.text
    assert "the transform of mapping m failed" in caplog.text


def test_a_transform_that_is_no_more_breaks_its_mapping_only(send: Send) -> None:
    mapped()
    response = send("/hooks/m", {"who": "me"})
    assert response.status_code == 400
    assert 'no transform is registered as "t"' in error_of(response)
