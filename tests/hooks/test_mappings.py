"""Mappings: which one answers, and what it makes of a request."""

from __future__ import annotations

import json
from datetime import datetime
from typing import Any
from uuid import uuid4

import pytest
from django.utils import timezone

from hooks.configuration import MappingConfiguration
from hooks.errors import MappingError
from hooks.mapping import write
from hooks.models import HookMapping
from hooks.template import HookRequest, Template
from tests.hooks.conftest import Send, allow_keys, error_of, rows
from wake.models import SystemEvent

pytestmark = pytest.mark.django_db


def add(name: str, path: str = "ci", text: str = "{{payload.text}}", **values: Any) -> HookMapping:
    return HookMapping.objects.create(name=name, match_path=path, text_template=text, **values)


def answered_by(send: Send, path: str, payload: Any) -> str | None:
    """Return the name of the mapping that took this payload."""
    if send(path, payload).status_code == 404:
        return None
    return SystemEvent.objects.order_by("pk").values_list("source", flat=True).last()


def test_the_first_enabled_one_in_order_answers(send: Send) -> None:
    add("off", enabled=False, position=0, text="off")
    add("third", position=3, text="third")
    first = add("first", position=1, text="first")
    add("second", position=1, text="second")
    assert answered_by(send, "/hooks/ci", {}) == "hook:first"
    first.delete()
    assert answered_by(send, "/hooks/ci", {}) == "hook:second"


@pytest.mark.parametrize("written", ["ci/build", "/ci/build/", "//ci/build"])
@pytest.mark.parametrize("asked", ["/hooks/ci/build", "/hooks//ci/build/"])
def test_outer_slashes_do_not_matter(send: Send, written: str, asked: str) -> None:
    add("build", written, "x")
    assert answered_by(send, asked, {}) == "hook:build"
    assert answered_by(send, "/hooks/ci", {}) is None
    assert answered_by(send, "/hooks/ci/build/x", {}) is None
    assert answered_by(send, "/hooks/CI/build", {}) is None


def test_a_source_must_equal_the_payloads(send: Send) -> None:
    add("gmail", text="mail", match_source="gmail")
    assert answered_by(send, "/hooks/ci", {"source": "gmail"}) == "hook:gmail"
    others: list[Any] = [{"source": "Gmail"}, {"source": ["gmail"]}, {"source": None}, {}, [], 5]
    for other in others:
        assert answered_by(send, "/hooks/ci", other) is None
    add("rest", text="rest", position=1)
    assert answered_by(send, "/hooks/ci", ["gmail"]) == "hook:rest"


def test_an_empty_path_answers_everywhere_but_on_the_endpoints(send: Send) -> None:
    add("any", "", "caught {{path}}")
    assert answered_by(send, "/hooks/some/where", {}) == "hook:any"
    assert SystemEvent.objects.get().text == "caught some/where"
    assert error_of(send("/hooks/wake", {})) == "text required"


def test_text_and_session_key_are_filled_from_the_request(send: Send) -> None:
    allow_keys("hook:")
    add(
        "github",
        "github",
        "{{headers.X-GitHub-Event}} {{query.kind}} {{repository.name}}#{{payload.pulls[1].id}}",
        session_key="hook:gh:{{payload.repository.name}}:{{ pulls[1].id }}",
    )
    payload = {"repository": {"name": "Wake"}, "pulls": [{}, {"id": 12}]}
    response = send("/hooks/github?kind=pr", payload, headers={"X-GitHub-Event": "opened"})
    assert json.loads(response.content)["sessionKey"] == "agent:main:hook:gh:wake:12"
    assert SystemEvent.objects.get().text == "opened pr Wake#12"


def test_credentials_never_reach_the_text(send: Send, hook_token: str) -> None:
    add("leak", text="[{{headers.authorization}}{{headers.cookie}}{{headers.x-hub-signature-256}}]")
    send("/hooks/ci", {}, headers={"Cookie": "a=b", "X-Hub-Signature-256": "sha256=1"})
    assert SystemEvent.objects.get().text == "[]"


@pytest.mark.parametrize("payload", [{}, {"text": None}, {"text": " "}, [], 5, None, "text"])
def test_a_text_that_renders_empty_is_refused(send: Send, payload: Any) -> None:
    add("ci")
    before = rows()
    response = send("/hooks/ci", payload)
    assert (response.status_code, error_of(response)) == (400, "hook mapping requires text")
    assert rows() == before


@pytest.mark.parametrize(
    ("template", "payload"),
    [
        ("hook:gh:{{payload.id}}", {}),
        ("hook:gh:{{payload.id}}", {"id": None}),
        ("hook:gh:{{payload.id}}", {"id": ""}),
        ("hook:gh:{{payload.id}}", {"id": "  "}),
        ("hook:gh-{{payload.id}}", {}),
        ("{{payload.id}}", {}),
        ("{{payload.a}}:{{payload.id}}", {"id": 1}),
        ("hook:{{payload.a}}:{{payload.id}}", {"id": 1}),
        ("hook:gh:{{payload.id}}", {"id": ":"}),
        ("hook:gh:{{payload.id}}", {"id": "a::b"}),
        ("hook:gh:{{payload.id}}", {"id": "a: :b"}),
        ("hook:gh:{{payload.id}}", {"id": "a:"}),
        ("{{payload.id}}", {"id": ":a"}),
    ],
)
@pytest.mark.parametrize("scope", ["per-agent", "global"])
def test_a_session_key_that_is_not_filled_in_whole_is_refused(
    send: Send, template: str, payload: dict[str, Any], scope: str
) -> None:
    from wake.models import GatewaySettings

    GatewaySettings.objects.update(scope=scope)
    allow_keys()
    add("gh", text="x", session_key=template)
    before = rows()
    response = send("/hooks/ci", payload)
    assert response.status_code == 400
    assert 'hook mapping "gh"' in error_of(response)
    assert rows() == before


def test_values_with_colons_add_segments(send: Send) -> None:
    allow_keys("hook:")
    add("gh", text="x", session_key="hook:{{payload.key}}")
    answer = json.loads(send("/hooks/ci", {"key": "a:B"}).content)
    assert answer["sessionKey"] == "agent:main:hook:a:b"


def test_a_malformed_template_breaks_its_mapping_only(send: Send) -> None:
    add("broken", "broken", "{{payload.")
    add("good", "good", "x")
    before = rows()
    response = send("/hooks/broken", {})
    assert response.status_code == 400
    assert error_of(response) == (
        'hook mapping "broken" is broken: {{ is never closed by }} (at character 1)'
    )
    assert rows() == before
    assert send("/hooks/good", {}).status_code == 200


def test_values_too_deep_to_write_are_refused() -> None:
    payload: list[Any] = []
    for _ in range(100_000):
        payload = [payload]
    mapping = MappingConfiguration(1, "deep", text=Template.parse("{{payload}}"))
    with pytest.raises(MappingError, match='"deep" cannot write a value nested so deep'):
        write(mapping, HookRequest("ci", payload, timezone.now(), uuid4()), {})


def test_now_is_the_time_of_the_request(send: Send) -> None:
    add("clock", text="{{now}}")
    before = timezone.now().replace(microsecond=0)
    send("/hooks/ci", {})
    text = SystemEvent.objects.get().text
    assert text.endswith("Z")
    assert before <= datetime.fromisoformat(text) <= timezone.now()
