"""The admin's pages of hook tokens: limited to mappings, and replaced without a gap."""

from __future__ import annotations

import re
import shlex
from datetime import timedelta
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from hooks import configuration, tokens
from hooks.models import HookMapping, HookToken
from tests.admin_browser import (
    Response,
    assert_stored_nowhere,
    page,
    said,
    signed_in,
    viewing_user,
)
from tests.hooks.conftest import Send, allow_keys
from wake.tokens import revoke

pytestmark = pytest.mark.django_db

ADD = "/admin/hooks/hooktoken/add/"


def mapping(name: str, **values: Any) -> HookMapping:
    given = {"match_path": name, "text_template": "{{id}}", **values}
    return HookMapping.objects.create(name=name, **given)


def form(name: str = "ci", *mappings: HookMapping, limited: bool = True) -> dict[str, Any]:
    return {
        "name": name,
        "expires_at_0": "",
        "expires_at_1": "",
        **({"limited": "on"} if limited else {}),
        "mappings": [str(one.pk) for one in mappings],
    }


def shown_token(response: Response) -> str:
    found = re.search(r"och_[\w-]{40,}", response.content.decode())
    assert found
    return found[0]


def rotate_url(row: HookToken) -> str:
    return reverse("admin:hooks_hooktoken_rotate", args=[row.pk])


def rotate(client: Client, row: HookToken, keep_old: str = "24h", name: str = "") -> Response:
    response = client.post(
        rotate_url(row), {"name": name or row.name, "keep_old": keep_old}, follow=True
    )
    configuration.hooks.forget()
    return response


# --- Limited tokens -----------------------------------------------------------------------------


def test_a_limited_token_opens_its_mappings_and_nothing_else(
    admin_client: Client, send: Send
) -> None:
    builds = mapping("builds")
    mapping("other")
    response = admin_client.post(ADD, form("ci", builds))
    token = shown_token(response)
    assert_stored_nowhere(token)
    for path, status in (("builds", 200), ("other", 401), ("wake", 401)):
        body = {"id": 1, "text": "x"}
        assert send(f"/hooks/{path}", body, token=token).status_code == status, path


def test_the_curl_line_of_a_limited_token_works(admin_client: Client, send: Send) -> None:
    allow_keys()
    disabled = mapping("a-off", enabled=False)
    nested = mapping(
        "b-on",
        match_path="ci/build",
        match_source="me",
        for_each="items",
        text_template="{{items[0].a}}",
        session_key="hook:{{payload.number}}",
    )
    response = admin_client.post(ADD, form("ci", disabled, nested))
    token = shown_token(response)
    words = shlex.split(response.context["example"].replace("\\\n", ""))
    assert words[1] == "http://testserver/hooks/ci/build"
    assert f"Authorization: Bearer {token}" in words
    body = words[words.index("--data-raw") + 1].encode()
    assert send("/hooks/ci/build", body, token=token).status_code == 200


def test_a_limited_token_without_mappings_says_that_it_opens_nothing(
    admin_client: Client, send: Send
) -> None:
    response = admin_client.post(ADD, form("ci"))
    assert "Token ci opens nothing" in response.content.decode()
    assert "curl" not in response.context["example"]
    assert send("/hooks/wake", {"text": "x"}, token=shown_token(response)).status_code == 401
    listed = page(admin_client, "hooks_hooktoken_changelist")
    assert "none is chosen" in listed


def test_mappings_of_a_token_that_is_not_limited_do_not_limit_it(
    admin_client: Client, send: Send
) -> None:
    response = admin_client.post(ADD, form("ci", mapping("builds"), limited=False))
    assert "opens nothing" not in response.content.decode()
    assert send("/hooks/wake", {"text": "x"}, token=shown_token(response)).status_code == 200


def test_a_change_of_what_a_token_opens_counts_at_once(admin_client: Client, send: Send) -> None:
    builds, other = mapping("builds"), mapping("other")
    row, token = tokens.create("ci", mappings=[builds])
    assert send("/hooks/builds", {"id": 1}, token=token).status_code == 200
    change = reverse("admin:hooks_hooktoken_change", args=[row.pk])
    admin_client.post(change, form("ci", other))
    configuration.hooks.forget()
    assert send("/hooks/builds", {"id": 1}, token=token).status_code == 401
    assert send("/hooks/other", {"id": 1}, token=token).status_code == 200


def test_the_list_says_what_each_token_opens(
    admin_client: Client, django_assert_max_num_queries: Any
) -> None:
    mappings = [mapping(f"hook-{number}") for number in range(5)]
    tokens.create("all")
    for number in range(10):
        tokens.create(f"some-{number}", mappings=mappings)
    configuration.hooks()  # held from here on, and not read within what is counted
    with django_assert_max_num_queries(8):
        text = page(admin_client, "hooks_hooktoken_changelist")
    assert "every hook" in text
    assert "hook-2</a> and 2 more" in text
    assert "hook-3" not in text


def test_who_may_only_look_sees_what_a_token_opens() -> None:
    row, _ = tokens.create("ci", mappings=[mapping("builds")])
    assert "builds" in page(signed_in(viewing_user()), "hooks_hooktoken_change", row.pk)


def test_the_boxes_of_the_mappings_are_ticked_each_for_itself(admin_client: Client) -> None:
    row, _ = tokens.create("ci", mappings=[mapping("builds")])
    mapping("other")
    source = page(admin_client, "hooks_hooktoken_change", row.pk)
    boxes = re.findall(r'<input[^>]*name="mappings"[^>]*>', source)
    ticked = [bool(re.search(r"\schecked[\s>]", box)) for box in boxes]
    assert ticked == [True, False]
    # A list, to Unfold's script; else one box would tick and clear all of them.
    assert '"mappings": []' in source


# --- Rotation -----------------------------------------------------------------------------------


def test_a_rotated_token_is_shown_once_and_both_work_for_the_chosen_time(
    admin_client: Client, send: Send
) -> None:
    builds = mapping("builds")
    row, old = tokens.create("ci", mappings=[builds])
    assert "24 hours" in admin_client.get(rotate_url(row)).content.decode()
    before = timezone.now()
    response = rotate(admin_client, row, "7d")
    new = shown_token(response)
    assert "/hooks/builds" in response.context["example"]
    assert_stored_nowhere(new)
    for token in (old, new):
        assert send("/hooks/builds", {"id": 1}, token=token).status_code == 200
        assert send("/hooks/wake", {"text": "x"}, token=token).status_code == 401
    row.refresh_from_db()
    assert row.expires_at
    assert before <= row.expires_at - timedelta(days=7) <= timezone.now()
    assert HookToken.objects.get(name="ci").expires_at is None
    entry = LogEntry.objects.get()
    assert entry.change_message == "Rotated: the old token works for 7d more."


def test_an_old_token_that_is_not_kept_is_revoked_at_once(admin_client: Client, send: Send) -> None:
    row, old = tokens.create("ci")
    new = shown_token(rotate(admin_client, row, "0"))
    assert send(body={"text": "x"}, token=old).status_code == 401
    assert send(body={"text": "x"}, token=new).status_code == 200


def test_the_button_asks_how_long_the_old_token_is_to_work(admin_client: Client) -> None:
    row, _ = tokens.create("ci")
    response = admin_client.post(
        reverse("admin:hooks_hooktoken_changelist"),
        {"action": "rotate", "_selected_action": str(row.pk), "stay": "1"},
    )
    assert f'action="{rotate_url(row)}"' in response.content.decode()
    assert HookToken.objects.count() == 1


def test_two_clicks_rotate_once(admin_client: Client) -> None:
    row, _ = tokens.create("ci")
    rotate(admin_client, row, name="ci")
    response = rotate(admin_client, row, name="ci")
    assert said(response) == ["Token ci was replaced or revoked already."]
    assert HookToken.objects.count() == 2


@pytest.mark.parametrize("keep_old", ["", "1y", "999999d"])
def test_only_the_times_offered_can_be_chosen(keep_old: str, admin_client: Client) -> None:
    row, _ = tokens.create("ci")
    response = rotate(admin_client, row, keep_old)
    assert "keep_old" in response.context["form"].errors
    assert HookToken.objects.count() == 1


def test_a_revoked_token_is_not_rotated(admin_client: Client) -> None:
    row, _ = tokens.create("ci")
    revoke(HookToken.objects.filter(name="ci"), timezone.now())
    assert "was replaced or revoked already" in said(rotate(admin_client, row))[0]
    action = {"action": "rotate", "_selected_action": str(row.pk)}
    response = admin_client.post(reverse("admin:hooks_hooktoken_changelist"), action, follow=True)
    assert said(response) == ["Token ci is revoked: add one."]
    assert 'value="rotate"' not in page(admin_client, "hooks_hooktoken_change", row.pk)


def test_several_are_not_rotated_at_once(admin_client: Client) -> None:
    keys = [str(tokens.create(name)[0].pk) for name in ("one", "two")]
    response = admin_client.post(
        reverse("admin:hooks_hooktoken_changelist"),
        {"action": "rotate", "_selected_action": keys},
        follow=True,
    )
    assert said(response) == ["Choose one token: the new one is shown once."]


@pytest.mark.parametrize("codenames", [["view_hooktoken"], ["view_hooktoken", "change_hooktoken"]])
def test_who_may_not_make_tokens_rotates_none(codenames: list[str]) -> None:
    user = User.objects.create_user("somebody", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename__in=codenames))
    client = signed_in(user)
    row, _ = tokens.create("ci")
    assert rotate(client, row).status_code == 403
    assert client.get(rotate_url(row)).status_code == 403
    assert 'value="rotate"' not in page(client, "hooks_hooktoken_change", row.pk)
    assert HookToken.objects.count() == 1


def test_a_token_that_does_not_exist_is_not_rotated(admin_client: Client) -> None:
    assert admin_client.get("/admin/hooks/hooktoken/7/rotate/").status_code == 404
    assert admin_client.get("/admin/hooks/hooktoken/nope/rotate/").status_code == 404
