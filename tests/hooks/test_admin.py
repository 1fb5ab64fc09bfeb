"""The admin's pages of the HTTP door."""

from __future__ import annotations

import re
from typing import Any

import pytest
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse
from django.utils import timezone

from hooks import configuration, tokens
from hooks.admin.policy import policy_in_words
from hooks.models import AllowedSessionPrefix, HookMapping, HookPolicy, HookToken
from tests.admin_browser import (
    Response,
    assert_stored_nowhere,
    errors_of,
    page,
    said,
    signed_in,
)
from wake.configuration import AgentConfiguration, GatewayConfiguration
from wake.models import Agent

pytestmark = pytest.mark.django_db

GATEWAY = GatewayConfiguration({"main": AgentConfiguration("main")})
POLICY = "/admin/hooks/hookpolicy/1/change/"


# --- The policy ---------------------------------------------------------------------------------


def policy_form(*prefixes: str, **changes: str) -> dict[str, str]:
    """Return the policy's form with these prefixes as new rows; all switches off but `enabled`."""
    form = {
        "enabled": "on",
        "base_path": "/hooks",
        "max_body_bytes": "262144",
        "keep_bodies": "always",
        "keep_deliveries_days": "30",
        "keep_deliveries_count": "100000",
        "prefixes-TOTAL_FORMS": str(len(prefixes)),
        "prefixes-INITIAL_FORMS": "0",
        **changes,
    }
    for number, prefix in enumerate(prefixes):
        form[f"prefixes-{number}-prefix"] = prefix
        form[f"prefixes-{number}-policy"] = "1"
    return form


def refusals(response: Response) -> str:
    """Return what the form says about the prefixes."""
    (formset,) = response.context["inline_admin_formsets"]
    return " ".join(formset.formset.non_form_errors())


def test_the_policy_is_one_form_with_its_prefixes(admin_client: Client) -> None:
    changelist = reverse("admin:hooks_hookpolicy_changelist")
    assert admin_client.get(changelist).headers["Location"] == POLICY
    form = policy_form("hook:", "agent:ops:", allow_request_session_key="on")
    response = admin_client.post(POLICY, form, follow=True)
    assert HookPolicy.objects.get().allow_request_session_key
    assert configuration.hooks().prefixes == ("agent:ops:", "hook:")
    sentence = "Requests may choose a session key that starts with agent:ops: or hook:."
    assert sentence in response.content.decode()


def test_letting_requests_choose_any_key_must_be_confirmed(admin_client: Client) -> None:
    form = policy_form(allow_request_session_key="on")
    response = admin_client.post(POLICY, form)
    assert "no prefix limits which" in refusals(response)
    assert not HookPolicy.objects.get().allow_request_session_key
    admin_client.post(POLICY, {**form, "confirm_any_session_key": "on"})
    assert HookPolicy.objects.get().allow_request_session_key
    assert "any session key" in page(admin_client, "hooks_hookpolicy_change", 1)


def test_removing_the_last_prefix_must_be_confirmed_too(admin_client: Client) -> None:
    HookPolicy.objects.update(allow_request_session_key=True)
    prefix = AllowedSessionPrefix.objects.create(prefix="hook:")
    form = policy_form("hook:", allow_request_session_key="on") | {
        "prefixes-INITIAL_FORMS": "1",
        "prefixes-0-id": str(prefix.pk),
        "prefixes-0-DELETE": "on",
    }
    assert "no prefix limits which" in refusals(admin_client.post(POLICY, form))
    assert AllowedSessionPrefix.objects.exists()
    admin_client.post(POLICY, {**form, "confirm_any_session_key": "on"})
    assert not AllowedSessionPrefix.objects.exists()


@pytest.mark.parametrize("blank", ["", "   "])
def test_a_blank_prefix_limits_nothing(blank: str, admin_client: Client) -> None:
    admin_client.post(POLICY, policy_form(blank, allow_request_session_key="on"))
    assert not HookPolicy.objects.get().allow_request_session_key
    assert not AllowedSessionPrefix.objects.exists()


def test_a_prefix_is_listed_once(admin_client: Client) -> None:
    response = admin_client.post(POLICY, policy_form("hook:", " HOOK:"))
    assert "listed twice" in refusals(response)
    assert not AllowedSessionPrefix.objects.exists()


@pytest.mark.parametrize("path", ["/", "/admin/x", "hooks", "/hooks/"])
def test_a_bad_base_path_is_refused(path: str, admin_client: Client) -> None:
    assert "base_path" in errors_of(admin_client.post(POLICY, policy_form(base_path=path)))


def test_who_may_only_look_changes_nothing_of_the_policy(viewer: Client) -> None:
    form = policy_form("hook:", allow_request_session_key="on", confirm_any_session_key="on")
    assert viewer.post(POLICY, form).status_code == 403
    assert not HookPolicy.objects.get().allow_request_session_key
    assert not AllowedSessionPrefix.objects.exists()


def test_the_prefixes_go_with_the_policy_and_its_permission() -> None:
    user = User.objects.create_user("operator", is_staff=True)
    user.user_permissions.set(Permission.objects.filter(codename="change_hookpolicy"))
    client = signed_in(user)
    form = policy_form(allow_request_session_key="on")
    assert "no prefix limits which" in refusals(client.post(POLICY, form))
    client.post(POLICY, policy_form("hook:", allow_request_session_key="on"))
    assert configuration.hooks().prefixes == ("hook:",)


@pytest.mark.parametrize(
    ("enabled", "allows", "prefixes", "sentence"),
    [
        (False, True, [], "Hooks are off"),
        (True, True, ["hook:"], "may choose a session key that starts with hook:."),
        (True, True, ["a:", "b:"], "that starts with a: or b:."),
        (True, True, [], "may choose any session key"),
        (True, False, ["hook:"], "may not choose a session key. The fixed key of a mapping must"),
        (True, False, [], "may not choose a session key. A mapping may have any fixed key."),
    ],
)
def test_the_policy_in_words(
    enabled: bool, allows: bool, prefixes: list[str], sentence: str
) -> None:
    policy = HookPolicy(enabled=enabled, allow_request_session_key=allows)
    assert sentence in policy_in_words(policy, prefixes, GATEWAY)[0]


@pytest.mark.parametrize(
    ("default", "prefixes", "sentence"),
    [
        ("", [], "gets one of its own, hook:<random id>."),
        ("", ["hook:"], "gets one of its own, hook:<random id>."),
        ("", ["agent:main:hook:"], "gets one of its own, hook:<random id>."),
        ("", ["discord:"], "no listed prefix allows: it is refused. Set a default session"),
        ("", ["hook:1"], "no listed prefix allows"),
        ("Hook:Turns", ["HOOK:"], "goes to Hook:Turns."),
        ("turns", ["hook:"], "goes to turns, which no listed prefix allows"),
        ("agent:ops:x", ["agent:ops:"], "without that agent selected it is refused"),
    ],
)
def test_the_words_say_where_a_turn_without_a_session_goes(
    default: str, prefixes: list[str], sentence: str
) -> None:
    policy = HookPolicy(default_session_key=default)
    assert sentence in policy_in_words(policy, prefixes, GATEWAY)[1]


@pytest.mark.parametrize(
    ("values", "agents", "sentence"),
    [
        ({}, [], "Hooks reach every agent."),
        ({}, ["main"], "Hooks reach the agent main only."),
        ({}, ["ops", "main"], "Hooks reach these agents only: main, ops."),
        ({"keep_bodies": "always"}, [], "can be looked into and replayed. Deliveries are kept"),
        ({"keep_bodies": "failures"}, [], "kept only of failures"),
        ({"keep_bodies": "never"}, [], "nothing can be looked into or replayed"),
        ({"keep_deliveries_days": 1, "keep_deliveries_count": 5000}, [], "1 day, and 5,000 at"),
    ],
)
def test_the_words_name_the_agents_and_what_is_kept(
    values: dict[str, Any], agents: list[str], sentence: str
) -> None:
    assert sentence in " ".join(policy_in_words(HookPolicy(**values), [], GATEWAY, agents))


def test_the_page_says_what_every_setting_means_at_present(admin_client: Client) -> None:
    Agent.objects.create(id="ops")
    form = policy_form("hook:", keep_bodies="never", default_session_key="hook:turns")
    text = admin_client.post(POLICY, form | {"allowed_agents": "ops"}, follow=True).content.decode()
    assert "Hooks reach the agent ops only." in text
    assert "A turn that names no session goes to hook:turns." in text
    assert "What was sent is not kept" in text
    assert configuration.hooks().allowed_agents == {"ops"}


def test_another_base_path_must_be_confirmed(admin_client: Client) -> None:
    response = admin_client.post(POLICY, policy_form(base_path="/in"))
    assert "Senders use /hooks now." in errors_of(response)["confirm_base_path"][0]
    text = response.content.decode()
    assert 'data-stored="/hooks"' in text
    assert "Hooks answer below /hooks/" in text
    assert configuration.hooks().base_path == "/hooks"
    admin_client.post(POLICY, policy_form(base_path="/in", confirm_base_path="on"))
    assert configuration.hooks().base_path == "/in"


def test_the_same_base_path_needs_no_confirmation(admin_client: Client) -> None:
    admin_client.post(POLICY, policy_form(max_body_bytes="2048"))
    assert configuration.hooks().max_body_bytes == 2048


def test_who_may_only_look_is_asked_to_confirm_nothing(viewer: Client) -> None:
    text = page(viewer, "hooks_hookpolicy_change", 1)
    assert "Requests may not choose a session key." in text
    assert "confirm_" not in text


def test_a_request_can_be_tried_from_the_policy(admin_client: Client) -> None:
    text = page(admin_client, "hooks_hookpolicy_change", 1)
    assert "Try a request" in text
    assert f"{reverse('admin:hooks_simulator')}?path=wake" in text


# --- Tokens -------------------------------------------------------------------------------------


def test_a_hook_token_is_shown_once_with_a_line_that_works(
    admin_client: Client, client: Client
) -> None:
    HookPolicy.objects.update(base_path="/in")
    configuration.hooks.forget()
    response = admin_client.post(
        reverse("admin:hooks_hooktoken_add"), {"name": "ci", "expires_at_0": "", "expires_at_1": ""}
    )
    text = response.content.decode()
    found = re.search(r"och_[\w-]{40,}", text)
    assert found
    token = found[0]
    assert "curl http://testserver/in/wake" in text
    assert_stored_nowhere(token)
    assert token not in page(admin_client, "hooks_hooktoken_changelist")
    wake = client.post(
        "/in/wake",
        {"text": "Hello from outside"},
        content_type="application/json",
        headers={"Authorization": f"Bearer {token}"},
    )
    assert wake.status_code == 200


def test_a_name_that_is_taken_makes_no_second_token(admin_client: Client) -> None:
    tokens.create("ci")
    response = admin_client.post(reverse("admin:hooks_hooktoken_add"), {"name": "ci"})
    assert "name" in errors_of(response)
    assert HookToken.objects.count() == 1


def test_a_revoked_token_opens_nothing_from_then_on(admin_client: Client, client: Client) -> None:
    row, token = tokens.create("ci")
    assert configuration.hooks().tokens
    response = admin_client.post(
        reverse("admin:hooks_hooktoken_changelist"),
        {"action": "revoke", "_selected_action": str(row.pk)},
        follow=True,
    )
    assert said(response) == ["1 token revoked."]
    configuration.hooks.forget()
    headers = {"Authorization": f"Bearer {token}"}
    assert client.post("/hooks/wake", {"text": "x"}, headers=headers).status_code == 401


def test_who_may_only_look_neither_makes_nor_revokes_tokens(viewer: Client) -> None:
    row, _ = tokens.create("ci")
    assert viewer.post(reverse("admin:hooks_hooktoken_add"), {"name": "x"}).status_code == 403
    viewer.post(
        reverse("admin:hooks_hooktoken_changelist"),
        {"action": "revoke", "_selected_action": str(row.pk)},
    )
    assert list(HookToken.objects.values_list("name", "revoked_at")) == [("ci", None)]


def test_lists_ask_for_as_much_with_many_rows_as_with_few(
    admin_client: Client, django_assert_max_num_queries: Any
) -> None:
    HookToken.objects.bulk_create(
        HookToken(name=f"{n}", digest=f"{n:064x}", hint="och_x", created_at=timezone.now())
        for n in range(30)
    )
    HookMapping.objects.bulk_create(
        HookMapping(name=f"{n}", text_template="x", agent_id="main") for n in range(30)
    )
    for name in ("hooktoken", "hookmapping"):
        configuration.hooks()  # read now and then, whatever the page
        with django_assert_max_num_queries(8):
            page(admin_client, f"hooks_{name}_changelist")
