"""The record of what came in, and sending it again."""

from __future__ import annotations

import json
from typing import Any
from uuid import uuid4

import pytest
from django.db import OperationalError, connection, transaction
from django.test import Client
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from hooks import deliveries, tokens
from hooks.deliveries import NotReplayable
from hooks.errors import NotAuthorized
from hooks.models import FailedCredentials, HookDelivery, HookMapping
from tests.hooks.conftest import Send, allow_keys, rows, set_policy
from wake.errors import StorageUnavailable
from wake.models import GatewaySettings, SystemEvent

pytestmark = pytest.mark.django_db


def only() -> HookDelivery:
    return HookDelivery.objects.get()


def mapping(**values: Any) -> HookMapping:
    values = {"name": "ci", "match_path": "ci", "text_template": "{{text}}", **values}
    return HookMapping.objects.create(**values)


def test_what_was_accepted_is_kept_with_its_outcome(send: Send) -> None:
    ci = mapping()
    before = timezone.now()
    response = send("/hooks/ci?a=b", {"text": "x"}, headers={"X-Kind": "k", "Cookie": "c=d"})
    delivery = only()
    assert (delivery.status, delivery.outcome, delivery.error) == (200, "queued", "")
    assert (delivery.path, delivery.mapping, delivery.mapping_name) == ("ci", ci, "ci")
    assert (delivery.client, delivery.credential) == ("127.0.0.1", "token tests")
    assert before <= delivery.received_at <= timezone.now()
    assert 0 < delivery.milliseconds < 10_000
    assert delivery.answer == json.loads(response.content)
    assert bytes(delivery.body or b"") == b'{"text": "x"}'
    assert delivery.query == {"a": "b"}
    assert delivery.headers["x-kind"] == "k"


@pytest.mark.parametrize("plain_ones_beside_it", [0, 2])
@pytest.mark.parametrize("field", [name for name, _ in deliveries._PLAIN])
def test_each_field_of_a_record_is_stored(field: str, plain_ones_beside_it: int) -> None:
    def draft(**fields: Any) -> deliveries.Draft:
        return deliveries.Draft(
            uid=uuid4(),
            received_at=timezone.now(),
            client="127.0.0.1",
            credential="token tests",
            path="wake",
            **{"credential_mappings": None, "replay_of_id": None, **fields},
        )

    deliveries.record(first := draft())
    values: dict[str, Any] = {
        "credential_mappings": [],
        "mapping_id": mapping().pk,
        "mapping_name": "ci",
        "error": "no",
        "idempotency_key": "k",
        "replay_of_id": HookDelivery.objects.get(uid=first.uid).pk,
    }
    of_bodies = {"has_body": True, "body": b"{}", "headers": {"a": "b"}, "query": {"c": "d"}}
    is_of_body = field in of_bodies
    one = draft(**(of_bodies if is_of_body else {field: values[field]}))
    others = [draft() for _ in range(plain_ones_beside_it)]
    with transaction.atomic():
        deliveries._record([*others, one])
    stored = HookDelivery.objects.get(uid=one.uid)
    value = getattr(stored, field)
    assert (bytes(value) if field == "body" else value) == {**values, **of_bodies}[field]
    for other in others:
        plain = HookDelivery.objects.get(uid=other.uid)
        assert not any(getattr(plain, name) for name, _ in deliveries._PLAIN)


def test_credentials_are_never_kept(send: Send, hook_token: str) -> None:
    secret = "s3cret-value"
    names = ["Cookie", "X-Api-Key", "X-Hub-Signature-256", "Proxy-Authorization", "X-My-Token"]
    send(body={"text": "x"}, headers=dict.fromkeys(names, secret))
    send(
        body={"text": " "}, headers={"X-OpenClaw-Token": hook_token, **dict.fromkeys(names, secret)}
    )
    with connection.cursor() as cursor:
        cursor.execute("SELECT * FROM hooks_hookdelivery")
        stored = repr(cursor.fetchall())
    assert secret not in stored
    assert hook_token not in stored


def test_a_parameter_that_carries_a_credential_is_not_kept(send: Send) -> None:
    secrets = "access_token=och_x&api_key=a&key=b&sig=c&my-auth=d"
    send(f"/hooks/wake?{secrets}&kind=push", {"text": "x"})
    assert only().query == {"kind": "push"}


@pytest.mark.parametrize(
    ("path", "body", "status", "outcome"),
    [
        ("/hooks/wake", {"text": " "}, 400, "refused"),
        ("/hooks/wake", b"{", 400, "refused"),
        ("/hooks/wake", b"x" * 300_000, 413, "refused"),
        ("/hooks/nowhere", {}, 404, "refused"),
        ("/hooks/ci", {}, 400, "refused"),
    ],
    ids=["text", "JSON", "size", "path", "mapping"],
)
def test_what_was_refused_is_kept_with_the_reason(
    send: Send, path: str, body: Any, status: int, outcome: str
) -> None:
    mapping()
    answer = json.loads(send(path, body).content)
    delivery = only()
    assert (delivery.status, delivery.outcome, delivery.error) == (status, outcome, answer["error"])
    assert delivery.mapping_name == ("ci" if path == "/hooks/ci" else "")
    assert delivery.has_body is (status != 413)
    assert delivery.answer is None


def test_what_could_not_be_stored_is_kept_too(send: Send) -> None:
    GatewaySettings.objects.update(max_queued_events=0)
    assert send(body={"text": "x"}).status_code == 429
    assert (only().status, only().outcome) == (429, "refused")


def test_without_a_credential_nothing_is_kept(send: Send) -> None:
    send(body={"text": "x"}, token=None)
    send(body={"text": "x"}, token="wrong")
    send("/hooks/wake?token=x", {"text": "x"})
    send(method="GET")
    assert HookDelivery.objects.count() == 0


@pytest.mark.parametrize(
    ("keep", "kept"),
    [("always", [True, True]), ("failures", [False, True]), ("never", [False, False])],
)
def test_the_policy_says_which_bodies_are_kept(send: Send, keep: str, kept: list[bool]) -> None:
    set_policy(keep_bodies=keep)
    send("/hooks/wake?a=b", {"text": "x"})
    send("/hooks/wake?a=b", {"text": ""})
    stored = HookDelivery.objects.order_by("pk")
    assert [delivery.has_body for delivery in stored] == kept
    assert [delivery.body is not None for delivery in stored] == kept
    assert [bool(delivery.headers) for delivery in stored] == kept
    assert [bool(delivery.query) for delivery in stored] == kept


def test_what_postgresql_cannot_store_is_recorded_all_the_same(send: Send) -> None:
    body = json.dumps({"text": " ", "idempotencyKey": "a\0b"}).encode()
    send(body=body, headers={"X-Odd": "caf\xe9"})
    assert bytes(only().body or b"") == body
    assert only().idempotency_key == "a\N{REPLACEMENT CHARACTER}b"


@pytest.mark.django_db(transaction=True)
def test_recording_costs_the_sender_no_commit(send: Send) -> None:
    send(body={"text": "warm"})
    with CaptureQueriesContext(connection) as queries:
        send(body={"text": "x"}, headers={"Idempotency-Key": "k"})
    statements = [query["sql"] for query in queries]
    recorded = next(n for n, sql in enumerate(statements) if "INTO hooks_hookdelivery" in sql)
    commits = [n for n, sql in enumerate(statements) if sql == "COMMIT"]
    assert commits[0] > recorded
    assert len(commits) == 1


def _without_records(execute: Any, sql: str, *arguments: Any) -> Any:
    if "INTO hooks_hookdelivery" in sql:
        raise OperationalError("disk full")
    return execute(sql, *arguments)


def test_a_record_that_cannot_be_written_undoes_the_event(send: Send) -> None:
    with connection.execute_wrapper(_without_records):
        assert send(body={"text": "x"}).status_code == 503
        assert send(body={"text": ""}).status_code == 400  # its record is lost, not its answer
    assert rows() == (0, 0, 0)


# --- Again --------------------------------------------------------------------------------------


def replay(delivery: HookDelivery) -> HookDelivery:
    return deliveries.replay(delivery, timezone.now())


def test_a_replay_goes_through_todays_configuration(send: Send) -> None:
    assert send("/hooks/ci", {"text": "x"}).status_code == 404
    mapping(text_template="now {{text}}")
    again = replay(only())
    assert (again.status, again.outcome) == (200, "queued")
    assert SystemEvent.objects.get().text == "now x"
    first = HookDelivery.objects.order_by("pk")[0]
    assert (again.replay_of, again.uid == first.uid) == (first, False)
    assert HookDelivery.objects.count() == 2
    assert replay(again).replay_of == again


def test_a_replay_is_done_again_whatever_its_idempotency_key(send: Send) -> None:
    send(body={"text": "x"}, headers={"Idempotency-Key": "k"})
    send(body={"text": "between"})
    assert replay(HookDelivery.objects.order_by("pk")[0]).outcome == "queued"
    assert SystemEvent.objects.count() == 3


def test_a_refused_replay_is_recorded(send: Send) -> None:
    allow_keys()
    send(body={"text": "x", "sessionKey": "hook:a"})
    set_policy(allow_request_session_key=False)
    again = replay(only())
    assert (again.status, again.outcome) == (400, "refused")
    assert again.pk
    assert "sessionKey is not allowed" in again.error


def test_a_replay_opens_no_more_than_its_credential_did(send: Send) -> None:
    second = mapping(name="second", position=2, text_template="second")
    token, shown = tokens.create("limited")
    token.limited = True
    token.save()
    token.mappings.set([second])
    send("/hooks/ci", {"text": "x"}, token=shown)
    mapping(name="first", position=1, text_template="first")
    assert replay(only()).mapping_name == "second"
    second.delete()
    with pytest.raises(NotAuthorized):
        replay(HookDelivery.objects.order_by("pk")[0])


def test_a_replay_says_nothing_about_its_clients_credentials(send: Send) -> None:
    send(body={"text": "x"})
    send(body={"text": ""})
    send(body={"text": "x"}, token="wrong")
    for delivery in list(HookDelivery.objects.all()):
        replay(delivery)
    assert FailedCredentials.objects.count() == 1


def test_a_replay_that_is_not_stored_says_so(send: Send, admin_client: Client) -> None:
    send(body={"text": "x"})
    delivery = only()
    selected = {"action": "replay", "_selected_action": [delivery.pk]}
    with connection.execute_wrapper(_without_records):
        with pytest.raises(StorageUnavailable, match="could not be stored now"):
            replay(delivery)
        page = admin_client.post("/admin/hooks/hookdelivery/", selected, follow=True)
    assert page.status_code == 200
    assert "could not be stored now" in page.content.decode()
    assert SystemEvent.objects.count() == HookDelivery.objects.count() == 1


def test_without_its_body_a_delivery_cannot_be_sent_again(send: Send) -> None:
    set_policy(keep_bodies="never")
    send(body={"text": "x"})
    with pytest.raises(NotReplayable, match="its body was not kept"):
        replay(only())


def test_allowed_agents_limit_where_hooks_go(send: Send) -> None:
    from hooks.models import HookPolicy
    from wake.models import Agent

    HookPolicy.ensure().allowed_agents.set([Agent.objects.create(id="ops")])
    assert send(body={"text": "x", "agentId": "ops"}).status_code == 200
    for body in ({"text": "x"}, {"text": "x", "agentId": "main"}):
        response = send(body=body)
        assert response.status_code == 400
        assert b"allowed agents in the hook policy" in response.content
