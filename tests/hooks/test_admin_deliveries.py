"""The admin's pages of what came in: looking into deliveries, and replaying them."""

from __future__ import annotations

import html
import json
import re
from datetime import UTC, datetime, timedelta
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.contrib.admin.models import LogEntry
from django.test import Client
from django.urls import reverse
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st

from hooks import configuration, throttling, tokens
from hooks.admin.deliveries import SHOWN_CHARACTERS, body_in_words, event_ids, visible
from hooks.models import FailedCredentials, HookDelivery, HookMapping, KeepBodies
from tests.admin_browser import page, said
from tests.hooks.conftest import Send, rows, set_policy
from wake.models import SystemEvent

pytestmark = pytest.mark.django_db

LIST = "hooks_hookdelivery_changelist"


def deliver(send: Send, body: Any, path: str = "wake", **values: Any) -> HookDelivery:
    """Send a hook and return the record of it."""
    send(f"/hooks/{path}", body, **values)
    return HookDelivery.objects.latest("pk")


def opened(client: Client, delivery: HookDelivery) -> str:
    return page(client, "hooks_hookdelivery_change", delivery.pk)


def plain(text: str) -> str:
    """Return a page without its marks."""
    return " ".join(html.unescape(re.sub(r"<[^>]+>", " ", text)).split())


def listed(client: Client, query: str = "") -> list[int]:
    """Return which deliveries the list shows, newest first."""
    response = client.get(reverse(f"admin:{LIST}") + query)
    assert response.status_code == 200
    return [row.pk for row in response.context["cl"].result_list]


def replay(client: Client, *deliveries: HookDelivery) -> list[str]:
    """Replay deliveries from the list and return what the page says then."""
    response = client.post(
        reverse(f"admin:{LIST}"),
        {"action": "replay", "_selected_action": [str(one.pk) for one in deliveries]},
        follow=True,
    )
    return said(response)


# --- The list -----------------------------------------------------------------------------------


def test_the_list_shows_what_came_of_each_request(admin_client: Client, send: Send) -> None:
    mapping = HookMapping.objects.create(name="builds", match_path="ci", text_template="x")
    deliver(send, {"text": "hello"})
    deliver(send, {}, "ci")
    deliver(send, {"text": ""})
    text = plain(page(admin_client, LIST))
    for words in ("queued", "refused", "builds", "token tests", "127.0.0.1", "400"):
        assert words in text
    change = reverse("admin:hooks_hookmapping_change", args=[mapping.pk])
    assert change in page(admin_client, LIST)


def test_the_list_never_loads_what_was_sent(
    admin_client: Client,
    send: Send,
    django_assert_max_num_queries: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for number in range(12):
        deliver(send, {"text": f"{number}"})
    # Held from here on, however slow the machine, and not read within what is counted.
    monkeypatch.setattr(configuration.hooks, "_max_age", 60.0)
    configuration.hooks()
    with django_assert_max_num_queries(9) as captured:
        page(admin_client, LIST)
    for query in captured.captured_queries:
        assert '"body"' not in query["sql"]


def test_filters_by_outcome_mapping_client_and_age(admin_client: Client, send: Send) -> None:
    mapping = HookMapping.objects.create(name="builds", match_path="ci", text_template="x")
    good = deliver(send, {}, "ci")
    bad = deliver(send, {"text": ""})
    HookDelivery.objects.filter(pk=bad.pk).update(
        client="2001:db8::1", received_at=timezone.now() - timedelta(days=2)
    )
    assert listed(admin_client, "?outcome__exact=refused") == [bad.pk]
    assert listed(admin_client, f"?mapping__id__exact={mapping.pk}") == [good.pk]
    assert listed(admin_client, "?client=2001:db8::1") == [bad.pk]
    assert listed(admin_client, "?client=192.0.2.1") == []
    assert listed(admin_client, "?since=day") == [good.pk]
    assert "2001:db8::1" in page(admin_client, LIST)


def test_the_search_finds_by_id_client_path_key_and_event(admin_client: Client, send: Send) -> None:
    HookMapping.objects.create(
        name="all", match_path="all", for_each="items", text_template="{{items}}"
    )
    other = deliver(send, {"text": "other"})
    found = deliver(send, {"items": [1, 2]}, "all", headers={"Idempotency-Key": "key-1"})
    HookDelivery.objects.filter(pk=found.pk).update(client="192.0.2.7")
    _, second = SystemEvent.objects.filter(source="hook:all").order_by("pk")
    for term in (str(found.uid), "192.0.2.7", "all", "key-1", str(second.uid), second.uid.hex):
        assert listed(admin_client, f"?q={term}") == [found.pk], term
    again = deliver(send, {"items": [1, 2]}, "all", headers={"Idempotency-Key": "key-1"})
    assert listed(admin_client, f"?q={second.uid}") == [again.pk, found.pk]
    assert listed(admin_client, f"?q={uuid4()}") == []
    assert listed(admin_client, f"?q={UUID(int=2**128 - 1)}") == []
    assert other.pk in listed(admin_client)


# --- One delivery -------------------------------------------------------------------------------


def test_a_delivery_shows_what_was_sent_and_what_came_of_it(
    admin_client: Client, send: Send
) -> None:
    delivery = deliver(send, {"text": "<b>hi</b>", "n": 1.10}, headers={"X-Event": "<i>push"})
    event = SystemEvent.objects.get()
    source = opened(admin_client, delivery)
    text = plain(source)
    assert '"n": 1.1' in text
    assert "x-event: <i>push" in text
    assert "<b>hi</b>" not in source
    assert reverse("admin:wake_systemevent_change", args=[event.pk]) in source
    assert reverse("admin:hooks_simulator") + f"?delivery={delivery.uid}" in source
    assert "It may hold private data." in text


def test_todays_configuration_is_told_on_its_page_and_stores_nothing(
    admin_client: Client, send: Send
) -> None:
    mapping = HookMapping.objects.create(name="builds", match_path="ci", text_template="{{id}}")
    delivery = deliver(send, {"id": 7}, "ci")
    before = rows()
    assert "taken for granted: token tests" in plain(opened(admin_client, delivery))
    mapping.text_template = "{{nothing}}"
    mapping.save()
    assert "400: hook mapping requires text" in plain(opened(admin_client, delivery))
    assert rows() == before


def test_a_delivery_without_its_body_says_so_and_offers_no_replay(
    admin_client: Client, send: Send
) -> None:
    set_policy(keep_bodies=KeepBodies.NEVER)
    delivery = deliver(send, {"text": "private"})
    source = opened(admin_client, delivery)
    assert "Its body was not kept" in plain(source)
    assert 'value="replay"' not in source
    assert f"?delivery={delivery.uid}" not in source
    messages = replay(admin_client, delivery)
    assert messages == ["1 delivery was skipped: without a body there is nothing to replay."]
    assert HookDelivery.objects.count() == 1


def test_a_refused_delivery_says_why(admin_client: Client, send: Send) -> None:
    delivery = deliver(send, b"{nope")
    text = plain(opened(admin_client, delivery))
    assert "Refused: the body is not valid JSON" in text
    assert "no JSON." in text


def test_bytes_that_are_no_text_are_shown_safely(admin_client: Client, send: Send) -> None:
    delivery = deliver(send, b"\xff\x00\x1b[31m<script>")
    assert r"\xff\x00\x1b[31m&lt;script&gt;" in opened(admin_client, delivery)


def test_a_large_body_is_cut_off_with_its_size(admin_client: Client, send: Send) -> None:
    set_policy(max_body_bytes=4 * 1024 * 1024)
    body = json.dumps({"text": "x" * 3_000_000}).encode()
    text = opened(admin_client, deliver(send, body))
    assert f"{len(body):,} bytes. Only the beginning is shown." in text
    assert len(text) < 400_000


@given(st.binary(max_size=300) | st.text(max_size=100).map(str.encode))
def test_no_body_shows_a_control_character(body: bytes) -> None:
    text, about = body_in_words(body)
    assert all(
        character.isprintable() or character in "\n\t"
        for character in visible(text)
        if ord(character) < 0xA0
    )
    assert about.startswith(f"{len(body):,} byte")


@pytest.mark.parametrize("character", ["a", "é", "€", "😀"])
def test_a_cut_goes_through_no_character(character: str) -> None:
    body = (character * 400_000).encode()
    text, about = body_in_words(body)
    assert text == character * SHOWN_CHARACTERS
    assert "Only the beginning" in about


def test_json_that_is_nested_too_deep_is_shown_as_it_came() -> None:
    text, about = body_in_words(b"[" * 5_000)
    assert (text, about) == ("[" * 5_000, "5,000 bytes, no JSON.")


def test_the_events_that_an_answer_names() -> None:
    assert event_ids(None) == []
    assert event_ids({"ok": True, "eventId": "a"}) == ["a"]
    assert event_ids({"ok": True, "runId": "b"}) == ["b"]
    assert event_ids({"ok": True, "results": [{"eventId": "a"}, {"runId": "b"}]}) == ["a", "b"]


def test_a_delivery_of_a_mapping_that_is_gone(admin_client: Client, send: Send) -> None:
    mapping = HookMapping.objects.create(name="builds", match_path="ci", text_template="x")
    delivery = deliver(send, {}, "ci")
    mapping.delete()
    text = plain(opened(admin_client, delivery))
    assert "builds (deleted)" in text
    assert "404: no hook mapping matches" in text


# --- Replay -------------------------------------------------------------------------------------


def test_a_replay_goes_through_todays_configuration_and_is_linked_both_ways(
    admin_client: Client, send: Send
) -> None:
    mapping = HookMapping.objects.create(name="builds", match_path="ci", text_template="{{id}}")
    delivery = deliver(send, {"id": 7}, "ci", headers={"Idempotency-Key": "once"})
    mapping.text_template = "again {{id}}"
    mapping.save()
    response = admin_client.post(
        reverse(f"admin:{LIST}"),
        {"action": "replay", "_selected_action": str(delivery.pk), "stay": "1"},
        follow=True,
    )
    assert said(response) == ["Replayed: 1 queued."]
    again = delivery.replays.get()
    assert list(SystemEvent.objects.order_by("pk").values_list("text", flat=True)) == [
        "7",
        "again 7",
    ]
    assert response.request["PATH_INFO"] == reverse(
        "admin:hooks_hookdelivery_change", args=[delivery.pk]
    )
    assert str(again.uid) in response.content.decode()
    assert str(delivery.uid) in opened(admin_client, again)
    entry = LogEntry.objects.get()
    assert (entry.object_id, entry.change_message) == (str(delivery.pk), "Replayed.")


def test_many_are_replayed_in_the_order_in_which_they_came(
    admin_client: Client, send: Send
) -> None:
    first, second, third = (deliver(send, {"text": word}) for word in ("one", "two", "three"))
    # Stored second, and yet the first that came.
    HookDelivery.objects.filter(pk=second.pk).update(
        received_at=first.received_at - timedelta(seconds=1)
    )
    assert replay(admin_client, first, second, third) == ["Replayed: 3 queued."]
    texts = list(SystemEvent.objects.order_by("pk").values_list("text", flat=True))
    assert texts == ["one", "two", "three", "two", "one", "three"]


def test_the_message_counts_what_came_of_the_replays(admin_client: Client, send: Send) -> None:
    mapping = HookMapping.objects.create(name="builds", match_path="ci", text_template="{{id}}")
    deliveries = [deliver(send, {"id": number}, "ci") for number in range(2)]
    deliveries.append(deliver(send, {"text": ""}))
    set_policy(keep_bodies=KeepBodies.NEVER)
    deliveries.append(deliver(send, {"text": "gone"}))
    assert mapping.pk
    assert replay(admin_client, *deliveries) == [
        "Replayed: 2 queued, 1 refused: text required.",
        "1 delivery was skipped: without a body there is nothing to replay.",
    ]


def test_a_replay_opens_no_more_than_the_credential_that_came(
    admin_client: Client, send: Send
) -> None:
    mapping = HookMapping.objects.create(name="old", match_path="ci", text_template="x")
    _, token = tokens.create("limited", mappings=[mapping])
    configuration.hooks.forget()
    delivery = deliver(send, {}, "ci", token=token)
    mapping.delete()
    HookMapping.objects.create(name="new", match_path="ci", text_template="x")
    assert replay(admin_client, delivery) == [
        "Replayed: 1 refused: the credential does not open this hook."
    ]
    assert SystemEvent.objects.count() == 1


def test_too_many_at_once_are_refused_as_a_whole(
    admin_client: Client, send: Send, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("hooks.admin.deliveries.MAX_REPLAYS", 2)
    deliveries = [deliver(send, {"text": f"{number}"}) for number in range(3)]
    assert replay(admin_client, *deliveries) == ["At most 2 are replayed at once: choose fewer."]
    assert HookDelivery.objects.count() == 3


def test_who_may_only_look_replays_nothing(viewer: Client, send: Send) -> None:
    delivery = deliver(send, {"text": "x"})
    source = opened(viewer, delivery)
    assert 'value="replay"' not in source
    replay(viewer, delivery)
    assert HookDelivery.objects.count() == 1


def test_nothing_is_written_or_deleted_by_a_form(admin_client: Client, send: Send) -> None:
    delivery = deliver(send, {"text": "x"})
    change = reverse("admin:hooks_hookdelivery_change", args=[delivery.pk])
    assert admin_client.post(change, {"path": "other"}).status_code == 403
    delete = reverse("admin:hooks_hookdelivery_delete", args=[delivery.pk])
    assert admin_client.post(delete, {"post": "yes"}).status_code == 403
    assert admin_client.get(reverse("admin:hooks_hookdelivery_add")).status_code == 403


# --- Failed credentials -------------------------------------------------------------------------


def test_failed_credentials_are_listed_and_cleared(admin_client: Client, send: Send) -> None:
    now = timezone.now()
    for _ in range(throttling.FAILURES):
        throttling.note_failure("2001:db8::1", now)
    throttling.note_failure("192.0.2.1", now)
    FailedCredentials.objects.create(
        client="192.0.2.2", failed_at=[0.0], updated_at=datetime(2026, 1, 1, tzinfo=UTC)
    )
    text = plain(page(admin_client, "hooks_failedcredentials_changelist"))
    assert "20: answered with 429" in text
    assert "192.0.2.2" in text
    blocked = FailedCredentials.objects.get(client__startswith="2001")
    response = admin_client.post(
        reverse("admin:hooks_failedcredentials_changelist"),
        {"action": "clear", "_selected_action": blocked.pk},
        follow=True,
    )
    assert said(response) == ["1 client cleared."]
    assert throttling.note_failure("2001:db8::1", now) is None
    assert FailedCredentials.objects.filter(client="192.0.2.1").exists()


def test_who_may_only_look_clears_nothing(viewer: Client) -> None:
    throttling.note_failure("192.0.2.1", timezone.now())
    viewer.post(
        reverse("admin:hooks_failedcredentials_changelist"),
        {"action": "clear", "_selected_action": "192.0.2.1"},
    )
    assert FailedCredentials.objects.exists()
