"""The template language: what each expression means, and that nothing is ever evaluated."""

from __future__ import annotations

import json
import string
from datetime import UTC, datetime, timedelta, timezone
from typing import Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooks.template import HookRequest, Template, TemplateError, visible_headers

NOW = datetime(2026, 11, 22, 16, 0, 1, 999_999, tzinfo=timezone(timedelta(hours=1)))
PAYLOAD: dict[str, Any] = {
    "a": {"b": "c", "x-y": 1, "none": None},
    "messages": [{"subject": "hello"}, [1, 2]],
    "yes": True,
    "number": 1.5,
    "big": 12345678901234567890123,
    "object": {"k": [1, "ä", None], "l": {}},
    "empty": "",
    "now": "payload's own",
    "headers": {"x": "payload's own"},
    "payload": {"a": "inner"},
    "$ref": "dollar",
    "naïve": "ï",
    "items": "a field, not a method",
    "nested": "{{a.b}}",
}
UID = UUID(int=1)
REQUEST = HookRequest(
    path="ci/build",
    payload=PAYLOAD,
    now=NOW,
    uid=UID,
    all_headers={"x-event": "push", "x-other": "o", "x-token": "t"},
    hidden={"x-other"},
    query={"kind": "pr", "hub.mode": "subscribe", "ids[0]": "7"},
)


def render(text: str, request: HookRequest = REQUEST) -> str:
    return Template.parse(text).render(request)


@pytest.mark.parametrize(
    ("text", "rendered"),
    [
        ("", ""),
        ("plain } {  }} text", "plain } {  }} text"),
        ("{{payload.a.b}}|{{a.b}}|{{  a.b }}|{{\na.b\n}}", "c|c|c|c"),
        ("{{a.x-y}}{{$ref}}{{naïve}}", "1dollarï"),
        ("{{messages[0].subject}} {{payload.messages[1][0]}}", "hello 1"),
        ("{{yes}} {{number}} {{big}}", "true 1.5 12345678901234567890123"),
        ("{{object}} {{messages}}", '{"k":[1,"ä",null],"l":{}} [{"subject":"hello"},[1,2]]'),
        (
            "<{{a.none}}{{empty}}{{missing}}{{a.b.c}}{{messages[9]}}{{messages.subject}}{{a[0]}}>",
            "<>",
        ),
        ("{{headers.x-event}} {{headers.X-Event}} <{{headers.x-other}}>", "push push <>"),
        (
            "{{query.kind}} {{query.hub.mode}} {{query.ids[0]}} <{{query.Kind}}>",
            "pr subscribe 7 <>",
        ),
        ("{{path}} {{now}}", "ci/build 2026-11-22T15:00:01Z"),
        ("{{payload.now}} {{payload.headers.x}}", "payload's own payload's own"),
        ("{{payload.payload.a}}", "inner"),
        ("{{items}}<{{a.keys}}{{a.__class__}}{{yes.real}}>", "a field, not a method<>"),
        ("{{nested}}", "{{a.b}}"),
        ('{"x":{"y":"{{a.b}}"}}', '{"x":{"y":"c"}}'),
    ],
)
def test_what_an_expression_renders(text: str, rendered: str) -> None:
    assert render(text) == rendered


def test_the_whole_payload() -> None:
    request = HookRequest("x", [1, {"a": "b"}], NOW, UID)
    assert render("{{payload}} {{payload[1].a}}<{{a}}>", request) == '[1,{"a":"b"}] b<>'


@pytest.mark.parametrize(
    ("text", "position"),
    [
        ("{{", 0),
        ("ab{{a", 2),
        ("{{}}", 0),
        ("{{a}} {{ }}", 6),
        ("{{a.}}", 0),
        ("{{.a}}", 0),
        ("{{a..b}}", 0),
        ("{{a[}}", 0),
        ("{{a[x]}}", 0),
        ("{{a[-1]}}", 0),
        ("{{[0]}}", 0),
        ("{{a b}}", 0),
        ("{{a|upper}}", 0),
        ("{{a()}}", 0),
        ("{{1 + 1}}", 0),
        ("{{#if a}}", 0),
        ("{{{a}}}", 0),
        ("{{headers}}", 0),
        ("{{query}}", 0),
        ("{{headers[0]}}", 0),
        ("{{path.x}}", 0),
        ("{{now[0]}}", 0),
    ],
)
def test_a_malformed_template_is_refused_with_its_position(text: str, position: int) -> None:
    with pytest.raises(TemplateError, match=rf"\(at character {position + 1}\)$") as caught:
        Template.parse(text)
    assert caught.value.position == position


def test_headers_that_carry_a_credential_are_not_visible() -> None:
    secret = ["Authorization", "Proxy-Authorization", "Cookie", "X-OpenClaw-Token", "X-Api-Key"]
    signed = ["X-Hub-Signature-256", "Webhook-Signature", "Stripe-Signature", "X-Gitlab-Token"]
    shown = {"X-GitHub-Event": "push", "Idempotency-Key": "k", "User-Agent": "u"}
    headers = {**dict.fromkeys([*secret, *signed], "s"), **shown}
    assert visible_headers(headers) == {name.lower(): value for name, value in shown.items()}


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=10,
)
template_texts = st.lists(
    st.sampled_from(["{{", "}}", "{", "}", ".", "[", "]", "0", "payload", "headers", "a", "path"])
    | st.text(string.printable, max_size=4)
).map("".join)


@given(text=template_texts | st.text(), payload=json_values)
def test_a_template_renders_or_is_refused_by_name(text: str, payload: Any) -> None:
    try:
        template = Template.parse(text)
    except TemplateError as error:
        assert 0 <= error.position < len(text)  # noqa: PT017
        assert "{{" in text
    else:
        assert isinstance(template.render(HookRequest("x", payload, NOW, UID)), str)


@given(st.text().filter(lambda text: "{{" not in text))
def test_text_without_expressions_renders_as_it_is(text: str) -> None:
    assert render(text) == text


@given(json_values)
def test_values_render_as_json_and_strings_as_they_are(value: Any) -> None:
    rendered = render("{{payload.value}}", HookRequest("x", {"value": value}, NOW, UID))
    if value is None or isinstance(value, str):
        assert rendered == (value or "")
    else:
        assert json.loads(rendered) == value


@given(st.text(), st.text())
def test_what_was_rendered_is_never_rendered_again(first: str, second: str) -> None:
    request = HookRequest("x", {"a": first, "b": second}, NOW.astimezone(UTC), UID)
    assert render("{{a}}{{b}}", request) == first + second
