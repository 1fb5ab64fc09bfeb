"""The same request again is answered again and stored once."""

from __future__ import annotations

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest
from django.db import OperationalError, connection
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from hooks import idempotency, tokens
from hooks.errors import PayloadError
from hooks.models import HookDelivery, HookMapping, IdempotencyKey
from tests.hooks.conftest import Send, allow_keys, error_of, rows, set_policy
from tests.live import LiveGateway
from wake.models import GatewaySettings, SystemEvent

WAKE = {"text": "paid"}
KEY = {"Idempotency-Key": "order-1"}


def receipt(response: Any) -> dict[str, Any]:
    assert response.status_code == 200, response.content
    answer: dict[str, Any] = json.loads(response.content)
    return answer


@pytest.mark.django_db
def test_the_first_receipt_is_given_again(send: Send) -> None:
    first = receipt(send(body=WAKE, headers=KEY))
    again = receipt(send(body={"text": "something else"}, headers=KEY))
    assert again == {**first, "eventOutcome": "replayed"}
    assert SystemEvent.objects.get().text == "paid"


@pytest.mark.django_db
@pytest.mark.parametrize(
    ("headers", "body"),
    [
        ({"Idempotency-Key": "k"}, {}),
        ({"X-OpenClaw-Idempotency-Key": "k"}, {}),
        ({}, {"idempotencyKey": "k"}),
        ({}, {"idempotencyKey": 17}),
        ({"X-GitHub-Delivery": "72d3162e-cc78-11e3-81ab-4c9367dc0958"}, {}),
        ({"webhook-id": "msg_1"}, {}),
        ({"Stripe-Signature": "t=1"}, {"id": "evt_1"}),
        ({"X-Slack-Signature": "v0="}, {"event_id": "Ev08"}),
    ],
    ids=str,
)
def test_every_way_to_give_a_key(send: Send, headers: dict[str, str], body: dict[str, Any]) -> None:
    outcomes = [
        receipt(send(body={"text": text, **body}, headers=headers))["eventOutcome"]
        for text in ("a", "b", "c")
    ]
    assert outcomes == ["queued", "replayed", "replayed"]
    assert SystemEvent.objects.count() == 1


@pytest.mark.django_db
@pytest.mark.parametrize("body", [{"id": "evt_1"}, {"idempotencyKey": " "}, {"event_id": "Ev1"}])
def test_what_is_no_key(send: Send, body: dict[str, Any]) -> None:
    for text in ("a", "b"):
        answer = receipt(send(body={"text": text, **body}, headers={"Idempotency-Key": " "}))
        assert answer["eventOutcome"] == "queued"


@pytest.mark.django_db
def test_a_key_of_the_wrong_type_is_refused(send: Send) -> None:
    response = send(body={**WAKE, "idempotencyKey": ["k"]})
    assert (response.status_code, error_of(response)) == (400, "idempotencyKey must be a string")


@pytest.mark.django_db
def test_a_key_counts_for_its_credential_and_its_path_alone(send: Send) -> None:
    _, other = tokens.create("other")
    HookMapping.objects.create(name="ci", match_path="ci", text_template="x")
    answers = [
        receipt(send(body={"text": "a"}, headers=KEY)),
        receipt(send(body={"text": "b"}, headers=KEY, token=other)),
        receipt(send("/hooks/ci", {"text": "c"}, headers=KEY)),
    ]
    assert [answer["eventOutcome"] for answer in answers] == ["queued"] * 3


@pytest.mark.django_db
def test_after_a_day_a_key_is_new(send: Send) -> None:
    first = receipt(send(body={"text": "a"}, headers=KEY))
    IdempotencyKey.objects.update(created_at=timezone.now() - timedelta(hours=23, minutes=59))
    assert receipt(send(body={"text": "b"}, headers=KEY))["eventId"] == first["eventId"]
    IdempotencyKey.objects.update(created_at=timezone.now() - timedelta(hours=24))
    second = receipt(send(body={"text": "b"}, headers=KEY))
    assert second["eventOutcome"] == "queued"
    assert receipt(send(body={"text": "c"}, headers=KEY))["eventId"] == second["eventId"]


@pytest.mark.django_db
def test_what_was_refused_or_could_not_be_stored_may_come_again(send: Send) -> None:
    GatewaySettings.objects.update(max_queued_events=0)
    assert send(body=WAKE, headers=KEY).status_code == 429
    GatewaySettings.objects.update(max_queued_events=10)

    def fail(execute: Any, sql: str, *arguments: Any) -> Any:
        if "INTO hooks_hookdelivery" in sql:
            raise OperationalError("disk full")
        return execute(sql, *arguments)

    from wake import configuration

    configuration.gateway.forget()
    with connection.execute_wrapper(fail):
        assert send(body=WAKE, headers=KEY).status_code == 503
    assert rows() == (0, 0, 0)
    assert receipt(send(body=WAKE, headers=KEY))["eventOutcome"] == "queued"


@pytest.mark.django_db
def test_what_was_accepted_once_is_not_refused_when_it_comes_again(send: Send) -> None:
    allow_keys("hook:")
    body = {"text": "a", "sessionKey": "hook:a"}
    first = receipt(send(body=body, headers=KEY))
    set_policy(allow_request_session_key=False)
    assert receipt(send(body=body, headers=KEY))["eventId"] == first["eventId"]
    assert send(body=body).status_code == 400


@pytest.mark.django_db
def test_a_replay_is_recorded_too_and_shows_the_key(send: Send) -> None:
    for _ in range(2):
        send(body=WAKE, headers=KEY)
    outcomes = HookDelivery.objects.order_by("pk").values_list("outcome", "idempotency_key")
    assert list(outcomes) == [("queued", "order-1"), ("replayed", "order-1")]


@given(st.text(), st.text(), st.text(), st.text())
def test_keys_are_told_apart(path: str, key: str, other_path: str, other_key: str) -> None:
    same = (path, key) == (other_path, other_key)
    digests = {
        idempotency.digest_of("c", path, key),
        idempotency.digest_of("c", other_path, other_key),
    }
    assert (len(digests) == 1) is same


@given(
    st.dictionaries(st.sampled_from(["idempotency-key", "webhook-id"]), st.text()),
    st.recursive(st.none() | st.text() | st.integers(), lambda v: st.dictionaries(st.text(), v)),
)
def test_any_request_has_a_key_or_none(headers: dict[str, str], payload: Any) -> None:
    try:
        key = idempotency.key_of(headers, payload)
    except PayloadError:
        return
    assert key is None or key.strip() == key != ""


def test_of_fifty_at_once_over_two_processes_one_is_stored(
    live_gateway: LiveGateway, tmp_path: Path
) -> None:
    headers = {"Authorization": f"Bearer {live_gateway.hook_token}", **KEY}
    with LiveGateway(tmp_path, arguments=("--no-heartbeats",), beside=live_gateway) as second:
        urls = [f"{gateway.url}/hooks/wake" for gateway in (live_gateway, second)] * 25

        def post(url: str) -> dict[str, Any]:
            return receipt(httpx.post(url, json=WAKE, headers=headers, timeout=30))

        with ThreadPoolExecutor(50) as senders:
            answers = list(senders.map(post, urls))
    assert Counter(answer["eventOutcome"] for answer in answers) == {"queued": 1, "replayed": 49}
    assert len({answer["eventId"] for answer in answers}) == 1
    assert live_gateway.events() == 1
    live_gateway.stop()
    live_gateway.start()
    again = post(f"{live_gateway.url}/hooks/wake")
    assert (again["eventOutcome"], again["eventId"]) == ("replayed", answers[0]["eventId"])


@pytest.mark.django_db
def test_a_key_that_is_pruned_while_it_is_claimed_is_new() -> None:
    now = timezone.now()
    IdempotencyKey.objects.create(digest="d", answer={}, created_at=now - timedelta(hours=25))
    pruned: list[Any] = []

    def prune(execute: Any, sql: str, *arguments: Any) -> Any:
        result = execute(sql, *arguments)
        if sql.startswith("INSERT") and not pruned:
            pruned.append(IdempotencyKey.objects.all().delete())
        return result

    with connection.execute_wrapper(prune):
        assert idempotency.claim("d", now) is None
    assert IdempotencyKey.objects.get().created_at == now


@pytest.mark.django_db
def test_a_key_from_a_clock_that_ran_ahead_does_not_count_for_ever(send: Send) -> None:
    send(body={"text": "a"}, headers=KEY)
    IdempotencyKey.objects.update(created_at=timezone.now() + timedelta(days=365))
    assert receipt(send(body={"text": "b"}, headers=KEY))["eventOutcome"] == "queued"
