"""The simulator's page: what it fills in, what it tells, and that it does nothing."""

from __future__ import annotations

import html
import json
import re
from datetime import timedelta
from typing import Any
from urllib.parse import urlencode

import pytest
from django.contrib.auth.models import Permission, User
from django.db import connection
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from hooks import configuration, presets, tokens
from hooks.admin.simulator import preset_of
from hooks.configuration import frozen
from hooks.curl import example_payload, line
from hooks.models import HookDelivery, HookMapping, HookPolicy, SignatureScheme
from hooks.samples import SAMPLES
from hooks.trials import headers, hook_path, in_http, query
from tests.admin_browser import Response, signed_in
from tests.hooks.conftest import Send, allow_keys, set_policy
from wake.models import Agent

pytestmark = pytest.mark.django_db

SIMULATOR = "/admin/hooks/simulator/"


def with_permissions(*codenames: str) -> Client:
    user = User.objects.create_user("somebody", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=codenames))
    return signed_in(user)


def simulate(client: Client, body: Any = None, *, asked: str = "", **values: str) -> Response:
    """Send the form. A body that is no text is written as JSON."""
    payload = body if isinstance(body, str) else json.dumps(body)
    form = {"path": "wake", "payload": payload, **values}
    response = client.post(f"{SIMULATOR}{asked}", form)
    assert response.status_code == 200
    return response


def shown(response: Response) -> str:
    """Return the text of a page, without its marks."""
    text = html.unescape(re.sub(r"<[^>]+>", " ", response.content.decode()))
    return " ".join(text.split())


def answer(response: Response) -> tuple[int, str]:
    """Return the status and the body that the page says the sender would get."""
    head, _, body = response.context["answer"].partition("\n\n")
    return int(head.split()[0]), body


def filled(client: Client, **asked: str) -> dict[str, str]:
    """Return what the form holds at first."""
    response = client.get(f"{SIMULATOR}?{urlencode(asked)}")
    assert response.status_code == 200
    return dict(response.context["form"].initial)


def everything_stored() -> dict[str, Any]:
    with connection.cursor() as cursor:
        tables = connection.introspection.table_names(cursor)
        stored = {}
        for table in tables:
            cursor.execute(f'SELECT * FROM "{table}"')  # noqa: S608 - a name of the database's own
            stored[table] = cursor.fetchall()
    return stored


# --- What it tells ------------------------------------------------------------------------------


def test_a_good_request_is_told_to_its_end_and_nothing_at_all_is_stored(
    admin_client: Client, hook_token: str
) -> None:
    allow_keys("hook:")
    HookMapping.objects.create(
        name="builds", match_path="ci", session_key="hook:{{id}}", text_template="{{id}} {{status}}"
    )
    admin_client.get(SIMULATOR)
    before = everything_stored()

    response = simulate(
        admin_client,
        {"id": 42, "status": "passed"},
        path="ci",
        headers=f"Authorization: Bearer {hook_token}\nIdempotency-Key: one",
    )

    assert everything_stored() == before
    text = shown(response)
    for words in ("right: token tests", "42 passed", "hook:42", "agent:main:hook:42", "allowed"):
        assert words in text
    status, body = answer(response)
    assert (status, json.loads(body)["sessionKey"]) == (200, "agent:main:hook:42")
    assert hook_token not in response.context["curl"]


@pytest.mark.parametrize(
    ("path", "body", "sent_headers"),
    [
        ("wake", {"text": "hello"}, {}),
        ("wake", {"text": ""}, {}),
        ("wake", {"text": "x", "sessionKey": "hook:a"}, {}),
        ("wake", b"{nope", {}),
        ("nowhere", {}, {}),
        ("off", {"a": 1}, {}),
        ("both", {"list": [{"a": 1}, {"a": 2}]}, {}),
        ("quiet", {}, {"X-GitHub-Event": "ping"}),
        ("slack", {"type": "url_verification", "challenge": "abc"}, {}),
        ("wake", {"text": "x" * 2000}, {}),
    ],
)
def test_the_answer_is_the_one_that_a_sender_gets(
    path: str, body: Any, sent_headers: dict[str, str], admin_client: Client, send: Send
) -> None:
    Agent.objects.create(id="gone", enabled=False)
    set_policy(max_body_bytes=1024)
    for name, values in {
        "off": {"agent_id": "gone", "text_template": "{{a}}"},
        "both": {"for_each": "list", "text_template": "{{list[0].a}}"},
        "quiet": {"transform": "github"},
        "slack": {
            "text_template": "x",
            "signature_scheme": SignatureScheme.SLACK,
            "signing_secret": "0123456789abcdef",
        },
    }.items():
        HookMapping.objects.create(name=name, match_path=name, **values)
    payload = body.decode() if isinstance(body, bytes) else json.dumps(body)

    told = simulate(
        admin_client,
        payload,
        path=path,
        headers="\n".join(f"{name}: {value}" for name, value in sent_headers.items()),
    ).context["answer"]
    real = send(f"/hooks/{path}", body, headers=sent_headers)

    head, _, told_body = told.partition("\n\n")
    assert head.splitlines()[0] == f"{real.status_code} {real.reason_phrase}"
    told_headers = dict(line.split(": ", 1) for line in head.splitlines()[1:])
    assert told_headers.get("Content-Type") == real.headers.get("Content-Type")
    # Ids are random, and of a simulation there is none.
    ids = r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}"
    assert re.sub(ids, "", told_body) == re.sub(ids, "", real.content.decode())


def test_a_credential_that_opens_another_mapping_only_is_answered_as_a_wrong_one(
    admin_client: Client, send: Send
) -> None:
    opened = HookMapping.objects.create(name="open", match_path="open", text_template="x")
    HookMapping.objects.create(name="closed", match_path="closed", text_template="x")
    response = simulate(admin_client, {}, path="closed", credential=f"mapping:{opened.pk}")
    _, token = tokens.create("limited", mappings=[opened])
    real = send("/hooks/closed", {}, token=token)
    head, _, body = response.context["answer"].partition("\n\n")
    assert (answer(response)[0], real.status_code) == (401, 401)
    assert f"{body}\n" == real.content.decode()
    assert f"WWW-Authenticate: {real.headers['WWW-Authenticate']}" in head


def test_with_hooks_off_it_says_so_and_tells_the_site_s_404(admin_client: Client) -> None:
    set_policy(enabled=False)
    response = simulate(admin_client, {"text": "x"})
    assert answer(response)[0] == 404
    assert "Hooks are off in the hook policy" in shown(response)


def test_a_wrong_token_is_told_and_the_rest_as_if_it_were_right(admin_client: Client) -> None:
    response = simulate(admin_client, {"text": "x"}, headers="Authorization: Bearer och_wrong")
    text = shown(response)
    assert "the token is wrong, expired or revoked" in text
    assert "Once its credential is right; until then the answer is 401." in text
    assert answer(response)[0] == 200
    assert "until then" not in shown(
        simulate(admin_client, {"text": "x"}, credential=token_choice("right"))
    )


def token_choice(name: str, **values: Any) -> str:
    row, _ = tokens.create(name, **values)
    configuration.hooks.forget()
    return f"token:{row.pk}"


def test_an_expired_token_is_no_choice(admin_client: Client) -> None:
    chosen = token_choice("old", expires_at=timezone.now() - timedelta(days=1))
    response = simulate(admin_client, {"text": "x"}, credential=chosen)
    assert "credential" in response.context["form"].errors
    assert "answer" not in response.context


def test_what_comes_from_outside_is_only_text_on_the_page(admin_client: Client) -> None:
    hostile = "<script>alert(1)</script>"
    response = simulate(admin_client, {"text": hostile * 10}, headers=f"X-Bad: {hostile}")
    assert hostile not in response.content.decode()
    assert html.escape(hostile * 10) in response.content.decode()


@pytest.mark.parametrize(
    ("values", "field", "words"),
    [
        ({"headers": "X-Fine: 1\nno colon"}, "headers", "'no colon' is no header"),
        ({"headers": "a b: 1"}, "headers", "is no header"),
        ({"path": " / "}, "path", "name a path below /hooks/"),
        ({"path": "https://host.example/hooks"}, "path", "name a path below /hooks/"),
        ({"path": "github?kind=x"}, "path", "write what follows the ? as the query"),
        ({"payload": "a\0b"}, "payload", "Null characters"),
    ],
)
def test_what_is_written_wrong_is_said_at_its_field(
    values: dict[str, str], field: str, words: str, admin_client: Client
) -> None:
    response = simulate(admin_client, {"text": "x"}, **values)
    assert words in " ".join(response.context["form"].errors[field])
    assert "answer" not in response.context


def test_a_payload_that_is_no_json_is_a_result(admin_client: Client) -> None:
    status, body = answer(simulate(admin_client, "{nope"))
    assert status == 400
    assert "not valid JSON" in body


# --- What it fills in ---------------------------------------------------------------------------


def test_every_sample_can_be_filled_in_and_simulated(admin_client: Client) -> None:
    HookMapping.objects.create(name="all", match_path="somewhere", text_template="x")
    for sample in SAMPLES:
        form = filled(admin_client, sample=sample.key, path="somewhere")
        assert form["path"] == "somewhere"
        assert json.loads(form["payload"]) == sample.payload
        assert headers(form["headers"].splitlines()) == {
            name.lower(): value for name, value in sample.headers.items()
        }
        assert answer(simulate(admin_client, form.pop("payload"), **form))[0] == 200


def test_a_mapping_of_a_preset_is_filled_in_and_answers(admin_client: Client) -> None:
    allow_keys()
    for preset in presets.PRESETS:
        mapping = presets.new_mapping(preset, taken_names=[])
        mapping.save()
    for mapping in HookMapping.objects.all():
        form = filled(admin_client, mapping=str(mapping.pk))
        assert form["credential"] == f"mapping:{mapping.pk}"
        response = simulate(admin_client, form.pop("payload"), **form)
        assert answer(response)[0] == 200, mapping.name
        assert f'Mapping "{mapping.name}"' in shown(response)


def test_another_mapping_gets_a_payload_with_all_that_its_templates_read(
    admin_client: Client,
) -> None:
    allow_keys()
    mapping = HookMapping.objects.create(
        name="own",
        match_source="me",
        for_each="items",
        text_template="{{items[0].a.b}} {{payload.c[1]}} {{headers.x}} {{payload}}",
        session_key="hook:{{id}}",
    )
    assert example_payload(frozen(mapping)) == {
        "source": "me",
        "items": [{"a": {"b": "example"}}],
        "c": [None, "example"],
        "id": "example",
    }
    form = filled(admin_client, mapping=str(mapping.pk))
    response = simulate(admin_client, form.pop("payload"), **form)
    assert answer(response)[0] == 200


def test_an_example_does_not_grow_with_an_index() -> None:
    mapping = HookMapping(text_template="{{a[999999999]}} {{b}}")
    assert example_payload(frozen(mapping)) == {"b": "example"}


def test_a_disabled_mapping_is_said_to_answer_nothing(admin_client: Client) -> None:
    mapping = HookMapping.objects.create(
        name="off", match_path="off", text_template="x", enabled=False
    )
    assert "off is disabled" in shown(admin_client.get(f"{SIMULATOR}?mapping={mapping.pk}"))


@pytest.mark.parametrize(
    "asked", ["mapping=nope", "mapping=999999999999999999999", "delivery=nope", "sample=nope"]
)
def test_what_does_not_exist_is_said_and_the_form_stays_usable(
    asked: str, admin_client: Client
) -> None:
    response = admin_client.get(f"{SIMULATOR}?{asked}")
    assert response.status_code == 200
    assert "does not exist" in shown(response)
    assert answer(simulate(admin_client, {"text": "x"}, asked=f"?{asked}"))[0] == 200


def test_a_delivery_is_filled_in_with_its_credential(admin_client: Client, send: Send) -> None:
    mapping = HookMapping.objects.create(name="own", match_path="own", text_template="{{é}}")
    _, token = tokens.create("limited", mappings=[mapping])
    configuration.hooks.forget()
    send("/hooks/own?kind=a+b", {"é": "ü"}, token=token, headers={"X-Event": "push"})
    delivery = HookDelivery.objects.get()
    asked = {"delivery": str(delivery.uid)}
    form = filled(admin_client, **asked)
    assert query(form["query"]) == {"kind": "a b"}
    assert "x-event: push" in form["headers"]
    response = simulate(admin_client, form.pop("payload"), asked=f"?{urlencode(asked)}", **form)
    assert answer(response)[0] == 200
    assert "token limited" in shown(response)
    # Its credential still opens no more than it did.
    form["path"] = "wake"
    response = simulate(admin_client, {"text": "x"}, asked=f"?{urlencode(asked)}", **form)
    assert answer(response)[0] == 401


@pytest.mark.parametrize(
    ("body", "said"),
    [(b'"\xff"', "The body is not UTF-8"), (b"1" * 600_000, "too many to edit here")],
)
def test_a_body_that_is_no_text_to_edit_is_said_to_be_none(
    body: bytes, said: str, admin_client: Client, send: Send
) -> None:
    set_policy(max_body_bytes=1024 * 1024)
    send("/hooks/wake", body)
    delivery = HookDelivery.objects.get()
    assert said in shown(admin_client.get(f"{SIMULATOR}?delivery={delivery.uid}"))


# --- The command line ---------------------------------------------------------------------------


def test_the_curl_line_sends_the_same_and_shows_no_credential(admin_client: Client) -> None:
    response = simulate(
        admin_client,
        {"text": "it's @home"},
        query="kind=a b&x=",
        headers="X-OpenClaw-Token: secret\nX-Event: it's\nHost: elsewhere\nX-Empty:",
    )
    lines = response.context["curl"].split(" \\\n  ")
    assert lines == [
        "curl 'http://testserver/hooks/wake?kind=a+b&x='",
        '-H "Authorization: Bearer $TOKEN"',
        "-H 'Content-Type: application/json'",
        """-H 'x-event: it'"'"'s'""",
        "-H 'x-empty;'",
        """--data-raw '{"text": "it'"'"'s @home"}'""",
    ]


def test_a_long_payload_is_sent_from_a_file() -> None:
    assert line("http://h/x", None).endswith("--data-binary @payload.json")


# --- Who may, and where from --------------------------------------------------------------------


def test_who_may_look_at_the_policy_may_simulate(admin_client: Client) -> None:
    assert with_permissions("view_hookpolicy").get(SIMULATOR).status_code == 200


def test_who_may_not_look_at_the_policy_may_not_simulate(admin_client: Client) -> None:
    client = with_permissions("view_hookmapping", "view_hookdelivery")
    assert client.get(SIMULATOR).status_code == 403
    assert client.post(SIMULATOR, {"path": "wake", "payload": "{}"}).status_code == 403
    assert Client().get(SIMULATOR).status_code == 302


def test_a_delivery_is_filled_in_only_for_those_who_may_look_at_deliveries(send: Send) -> None:
    send("/hooks/wake", {"text": "private"})
    client = with_permissions("view_hookpolicy")
    uid = HookDelivery.objects.get().uid
    assert client.get(f"{SIMULATOR}?delivery={uid}").status_code == 403


def test_the_sidebar_leads_there(admin_client: Client) -> None:
    assert f'href="{SIMULATOR}"' in admin_client.get(reverse("admin:index")).content.decode()
    viewer = with_permissions("view_hooktoken")
    assert SIMULATOR not in viewer.get(reverse("admin:index")).content.decode()


# --- How it is written --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("written", "path"),
    [
        ("wake", "wake"),
        ("/hooks/wake/", "wake"),
        ("https://gateway.example:8443/hooks/ci/build", "ci/build"),
        ("hooks/ci", "hooks/ci"),
        ("/ci", "ci"),
    ],
)
def test_a_path_may_be_written_in_many_ways(written: str, path: str) -> None:
    assert hook_path(written, "/hooks") == path


def test_a_header_that_comes_twice_is_joined_as_the_server_does_it() -> None:
    assert headers(["X-A: 1", "", "x-a:2", "X-B:c:d"]) == {"x-a": "1,2", "x-b": "c:d"}


def test_a_mapping_is_told_to_be_of_a_preset_by_signature_or_path() -> None:
    def key(**values: str) -> str | None:
        found = preset_of(HookMapping(**values))
        return found.key if found else None

    assert key(match_path="x", signature_scheme=SignatureScheme.STRIPE) == "stripe"
    assert key(match_path="gmail-2") == "gmail"
    assert key(match_path="gmail-x") is None
    assert key(match_path="other", signature_scheme=SignatureScheme.HMAC) is None


def test_the_policy_page_s_base_path_is_the_one_shown(admin_client: Client) -> None:
    HookPolicy.objects.update(base_path="/in")
    configuration.hooks.forget()
    response = simulate(admin_client, {"text": "x"}, path="/in/wake")
    assert "http://testserver/in/wake" in response.context["curl"]
    assert "POST /in/wake" in shown(response)


def test_a_retry_is_told_with_its_seconds() -> None:
    from hooks import answers
    from hooks.errors import TooManyFailures

    told = in_http(answers.of_error(TooManyFailures(17)), configuration.HookConfiguration())
    assert told.startswith("429 Too Many Requests\n")
    assert "Retry-After: 17" in told
