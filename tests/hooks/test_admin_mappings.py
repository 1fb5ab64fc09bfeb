"""The admin's pages of the mappings: their list and its order, form, secrets, presets and check."""

from __future__ import annotations

import re
from datetime import UTC, datetime
from typing import Any

import pytest
from django.contrib.admin.models import LogEntry
from django.contrib.auth.models import Permission, User
from django.test import Client
from django.urls import reverse
from hypothesis import given
from hypothesis import strategies as st

from hooks import configuration, presets, transforms
from hooks.admin.mappings import reordered
from hooks.models import HookMapping, HookPolicy
from hooks.presets import PRESETS, Preset
from hooks.signatures import SignatureConfiguration, is_signed, sign
from tests.admin_browser import (
    Response,
    assert_stored_nowhere,
    errors_of,
    page,
    said,
    signed_in,
)
from tests.hooks.conftest import allow_keys

pytestmark = pytest.mark.django_db

ADD = "/admin/hooks/hookmapping/add/"
LIST = "/admin/hooks/hookmapping/"
CHECK = "/admin/hooks/hookmapping/check/"
OLD = "the-old-secret-of-this-mapping"
TYPED = "another-secret-that-was-typed"


def mapping_form(**changes: str) -> dict[str, str]:
    """Return the form of a mapping as a browser sends it."""
    return {
        "name": "github",
        "enabled": "on",
        "match_path": "/github/",
        "match_source": "",
        "signature_scheme": "",
        "signing_secret": "",
        "signature_header": "",
        "signature_prefix": "",
        "signature_digest": "sha256",
        "signature_encoding": "hex",
        "action": "wake",
        "mode": "now",
        "agent": "",
        "session_key": "hook:gh:{{payload.id}}",
        "text_template": "{{payload.action}}",
        "transform": "",
        "for_each": "",
        "deliver": "on",
        "timeout_seconds": "",
        "sample": "github-push",
        **changes,
    }


def make(name: str = "github", **values: Any) -> HookMapping:
    return HookMapping.objects.create(**{"name": name, "text_template": "x", **values})


def signed(**values: Any) -> HookMapping:
    """Store a mapping that is signed as GitHub does it."""
    values = {"signature_scheme": "github", "signing_secret": OLD, "match_path": "gh", **values}
    return make(**values)


def change(mapping: HookMapping) -> str:
    return reverse("admin:hooks_hookmapping_change", args=[mapping.pk])


def secrets_of(mapping: HookMapping) -> tuple[str, str]:
    mapping.refresh_from_db()
    return mapping.signing_secret, mapping.previous_signing_secret


def act(client: Client, action: str, *mappings: HookMapping) -> Response:
    return client.post(
        LIST,
        {"action": action, "_selected_action": [str(mapping.pk) for mapping in mappings]},
        follow=True,
    )


def shown_secret(response: Response) -> str:
    """Return the secret that a page shows this once."""
    text = response.content.decode()
    assert "shown this once" in text
    found = re.search(r'id="secret">([^<]+)<', text)
    assert found
    return found[1]


# --- A mapping is made and changed --------------------------------------------------------------


def test_a_mapping_is_made_and_listed(admin_client: Client) -> None:
    admin_client.post(ADD, mapping_form(), follow=True)
    assert HookMapping.objects.get().match_path == "github"
    text = page(admin_client, "hooks_hookmapping_changelist")
    assert "{{payload.id}}" in text
    assert "wake, now" in text


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("text_template", ""),
        ("text_template", "{{payload."),
        ("session_key", "hook:{{"),
        ("session_key", "agent:ops"),
        ("match_path", "wake"),
        ("agent", "nobody"),
        ("transform", "os.system"),
        ("for_each", "a b"),
    ],
)
def test_a_mapping_that_could_not_work_is_refused_at_its_field(
    field: str, value: str, admin_client: Client
) -> None:
    response = admin_client.post(ADD, mapping_form(**{field: value}))
    assert field in errors_of(response)
    assert not HookMapping.objects.exists()


@pytest.mark.parametrize(
    ("field", "value", "shown_with"),
    [
        ("timeout_seconds", "0", {"action": "agent"}),
        ("signature_header", "no header", {"signature_scheme": "hmac"}),
    ],
)
def test_only_what_the_page_shows_can_be_wrong(
    field: str, value: str, shown_with: dict[str, str], admin_client: Client
) -> None:
    wrong = {field: value}
    assert field in errors_of(admin_client.post(ADD, mapping_form(**wrong, **shown_with)))
    admin_client.post(ADD, mapping_form(**wrong))
    assert not getattr(HookMapping.objects.get(), field)


def test_fields_are_only_shown_where_action_and_scheme_need_them(admin_client: Client) -> None:
    text = page(admin_client, "hooks_hookmapping_add")
    found = re.findall(r'x-show="([^"]*)"(?:(?!x-show=).)*?name="(\w+)"', text, re.DOTALL)
    conditions = {field: condition for condition, field in found}
    assert "signature_scheme" in conditions["signing_secret"]
    assert "hmac" in conditions["signature_header"]
    assert "action" in conditions["timeout_seconds"]
    assert conditions["session_key"] == conditions["name"]


def test_transforms_are_chosen_by_name_and_described(admin_client: Client) -> None:
    @transforms.register("described")
    def described(*_: Any) -> None:
        """One line for each deploy."""

    try:
        text = page(admin_client, "hooks_hookmapping_add")
        assert '<option value="described">described: One line for each deploy.</option>' in text
        admin_client.post(ADD, mapping_form(transform="described", text_template=""))
        mapping = HookMapping.objects.get()
        assert mapping.transform == "described"
    finally:
        del transforms._registered["described"]
    text = page(admin_client, "hooks_hookmapping_change", mapping.pk)
    assert "described (not registered any more)" in text
    response = admin_client.post(change(mapping), mapping_form(transform="described"))
    assert "transform" in errors_of(response)


def test_mappings_are_enabled_only_if_they_work_and_always_disabled(admin_client: Client) -> None:
    good = make("good", enabled=False)
    bad = make("bad", enabled=False, text_template="{{payload.")
    messages = said(act(admin_client, "enable", good, bad))
    assert messages[0].startswith("bad stays disabled: ")
    assert messages[1] == "1 mapping enabled."
    assert [mapping.name for mapping in configuration.hooks().mappings] == ["good"]
    HookMapping.objects.update(enabled=True)
    assert said(act(admin_client, "disable", good, bad)) == ["2 mappings disabled."]
    configuration.hooks.forget()
    assert configuration.hooks().mappings == ()


def test_a_mappings_page_leads_to_its_simulation(admin_client: Client) -> None:
    mapping = make()
    text = page(admin_client, "hooks_hookmapping_change", mapping.pk)
    assert f"{reverse('admin:hooks_simulator')}?mapping={mapping.pk}" in text


@pytest.mark.parametrize(
    ("match_path", "address"), [("ci/build", "ci/build"), ("", "…"), ("a b?", "a%20b%3F")]
)
def test_a_mappings_page_shows_the_address_for_senders(
    match_path: str, address: str, admin_client: Client
) -> None:
    HookPolicy.objects.update(base_path="/in")
    configuration.hooks.forget()
    text = page(admin_client, "hooks_hookmapping_change", make(match_path=match_path).pk)
    assert f"http://testserver/in/{address}</span>" in text


def test_who_may_only_look_changes_no_mapping(viewer: Client) -> None:
    mapping = signed()
    for action in ("disable", "move_last", "make_secret", "drop_old_secret"):
        act(viewer, action, mapping)
    assert viewer.post(change(mapping), mapping_form()).status_code == 403
    assert viewer.get(reverse("admin:hooks_hookmapping_presets")).status_code == 403
    mapping.refresh_from_db()
    assert (mapping.enabled, mapping.text_template, mapping.signing_secret) == (True, "x", OLD)


# --- The order ----------------------------------------------------------------------------------


def names() -> list[str]:
    return list(HookMapping.objects.order_by("position", "pk").values_list("name", flat=True))


def dragged(*order: HookMapping) -> dict[str, str]:
    """Return what the list sends when its rows, in the order of their keys, were dragged so."""
    form = {"_save": "Save", "form-TOTAL_FORMS": str(len(order))}
    form["form-INITIAL_FORMS"] = form["form-TOTAL_FORMS"]
    for number, mapping in enumerate(sorted(order, key=lambda mapping: mapping.pk)):
        form[f"form-{number}-id"] = str(mapping.pk)
        form[f"form-{number}-position"] = str(order.index(mapping))
    return form


def test_new_mappings_go_last(admin_client: Client) -> None:
    make("first", position=7)
    for name in ("second", "third"):
        admin_client.post(ADD, mapping_form(name=name))
    assert names() == ["first", "second", "third"]
    assert HookMapping.objects.get(name="third").position == 9


@pytest.mark.parametrize("count", [0, 1, 200])
def test_the_list_is_dragged_into_another_order(count: int, admin_client: Client) -> None:
    HookMapping.objects.bulk_create(
        HookMapping(name=f"{number}", text_template="x") for number in range(count)
    )
    mappings = list(HookMapping.objects.order_by("pk"))
    assert page(admin_client, "hooks_hookmapping_changelist").count("x-sort:handle") == count
    response = admin_client.post(LIST, dragged(*reversed(mappings)), follow=True)
    assert said(response) == ["The order is saved."]
    assert names() == [str(number) for number in reversed(range(count))]


def test_what_a_filter_hides_keeps_its_place(admin_client: Client) -> None:
    a, b, c, d = (make(name, position=1) for name in "abcd")
    admin_client.post(f"{LIST}?q=x", dragged(d, c, a))
    assert names() == ["d", "b", "c", "a"]
    assert b.pk < c.pk


def test_the_new_order_is_in_force_at_once(admin_client: Client) -> None:
    a, b = make("a"), make("b")
    assert [mapping.name for mapping in configuration.hooks().mappings] == ["a", "b"]
    admin_client.post(LIST, dragged(b, a))
    assert [mapping.name for mapping in configuration.hooks().mappings] == ["b", "a"]


def test_a_broken_mapping_can_be_dragged_too(admin_client: Client) -> None:
    broken, good = make("broken", text_template="{{"), make("good")
    admin_client.post(LIST, dragged(good, broken))
    assert names() == ["good", "broken"]


def test_an_order_that_makes_no_sense_changes_nothing(admin_client: Client) -> None:
    make("a"), make("b")
    nonsense = {
        "form-0-id": "x",
        "form-0-position": "1",
        "form-1-id": "9" * 18,
        "form-1-position": "0",
        "form-2-id": "1",
        "form-2-position": "-1",
        "form-3-id": "9" * 5000,
        "form-3-position": "1",
        "form-x-id": "2",
    }
    assert admin_client.post(LIST, {"_save": "Save", **nonsense}).status_code == 302
    assert names() == ["a", "b"]


def test_who_may_only_look_cannot_change_the_order(viewer: Client, admin_client: Client) -> None:
    a, b = make("a"), make("b")
    assert viewer.post(LIST, dragged(b, a)).status_code == 403
    assert names() == ["a", "b"]
    row = 'name="form-0-position"'
    assert row in page(admin_client, "hooks_hookmapping_changelist")
    assert row not in page(viewer, "hooks_hookmapping_changelist")


def test_mappings_are_moved_without_a_mouse(admin_client: Client) -> None:
    a, b, c, d = (make(name) for name in "abcd")
    act(admin_client, "move_first", c, d)
    assert names() == ["c", "d", "a", "b"]
    act(admin_client, "move_last", d, a)
    assert names() == ["c", "b", "d", "a"]
    assert b.pk


@given(st.lists(st.integers(0, 20), unique=True), st.lists(st.integers(0, 20)))
def test_reordering_loses_and_invents_nothing(present: list[int], wanted: list[int]) -> None:
    after = reordered(present, wanted)
    assert sorted(after) == sorted(present)
    known = [key for key in dict.fromkeys(wanted) if key in present]
    assert [key for key in after if key in known] == known
    assert all(after[place] == key for place, key in enumerate(present) if key not in known)


# --- Secrets ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("scheme", "looks_like"),
    [
        ("github", r"[\w-]{43}"),
        ("standard-webhooks", r"whsec_[\w+/]{43}="),
        ("hmac", r"[\w-]{43}"),
    ],
)
def test_a_signed_mapping_without_a_secret_gets_one_that_is_shown_once(
    scheme: str, looks_like: str, admin_client: Client
) -> None:
    form = mapping_form(signature_scheme=scheme, signature_header="X-Signature")
    response = admin_client.post(ADD, form)
    secret = shown_secret(response)
    assert re.fullmatch(looks_like, secret)
    assert "http://testserver/hooks/github" in response.content.decode()
    assert secrets_of(HookMapping.objects.get()) == (secret, "")
    assert_stored_nowhere(secret)
    key = HookMapping.objects.get().pk
    assert secret not in page(admin_client, "hooks_hookmapping_change", key)
    assert secret not in page(admin_client, "hooks_hookmapping_history", key)


def test_a_secret_that_was_made_opens_the_mapping_to_its_sender(
    admin_client: Client, client: Client
) -> None:
    form = mapping_form(signature_scheme="github", session_key="")
    secret = shown_secret(admin_client.post(ADD, form))
    body = b'{"action": "opened"}'
    headers = sign(SignatureConfiguration("github", (secret,)), body, datetime.now(UTC))
    response = client.post("/hooks/github", body, content_type="application/json", headers=headers)
    assert response.status_code == 200


@pytest.mark.parametrize(
    "values",
    [
        {"signature_scheme": "stripe"},
        {"signature_scheme": "slack"},
        {"signature_scheme": "hmac", "signature_header": "Sentry-Hook-Signature"},
    ],
)
def test_a_secret_that_the_sender_makes_must_be_pasted(
    values: dict[str, str], admin_client: Client
) -> None:
    assert "signing_secret" in errors_of(admin_client.post(ADD, mapping_form(**values)))
    admin_client.post(ADD, mapping_form(**values, signing_secret=TYPED))
    mapping = HookMapping.objects.get()
    assert secrets_of(mapping) == (TYPED, "")
    assert "New signing secret" not in page(admin_client, "hooks_hookmapping_change", mapping.pk)
    assert "its sender makes it" in said(act(admin_client, "make_secret", mapping))[0]


def test_an_empty_field_keeps_the_secret_and_a_typed_one_keeps_the_old_one_valid(
    admin_client: Client,
) -> None:
    mapping = signed()
    form = mapping_form(signature_scheme="github")
    admin_client.post(change(mapping), form)
    assert secrets_of(mapping) == (OLD, "")
    admin_client.post(change(mapping), form | {"signing_secret": TYPED})
    assert secrets_of(mapping) == (TYPED, OLD)
    text = page(admin_client, "hooks_hookmapping_change", mapping.pk)
    assert "A secret is set; the previous one still works." in text
    admin_client.post(change(mapping), form | {"signing_secret": TYPED})
    assert secrets_of(mapping) == (TYPED, OLD)
    assert_stored_nowhere(TYPED)


def test_the_history_tells_of_a_changed_secret_only_if_it_changed(admin_client: Client) -> None:
    mapping = signed()
    form = mapping_form(signature_scheme="github")
    admin_client.post(change(mapping), form)
    assert "Signing secret" not in LogEntry.objects.latest("pk").change_message
    admin_client.post(change(mapping), form | {"signing_secret": TYPED})
    assert "Signing secret" in LogEntry.objects.latest("pk").change_message


@pytest.mark.parametrize("wrong", [{}, {"name": ""}])
def test_no_page_ever_renders_a_stored_or_typed_secret(
    wrong: dict[str, str], admin_client: Client, viewer: Client
) -> None:
    mapping = signed(previous_signing_secret="the-one-before-the-old-one")
    form = mapping_form(signature_scheme="github", signing_secret=TYPED, **wrong)
    texts = [
        page(browser, name, *args)
        for browser in (admin_client, viewer)
        for name, *args in (
            ("hooks_hookmapping_changelist",),
            ("hooks_hookmapping_change", mapping.pk),
            ("hooks_hookmapping_history", mapping.pk),
        )
    ]
    texts.append(admin_client.post(change(mapping), form, follow=True).content.decode())
    for text in texts:
        for secret in (OLD, TYPED, "the-one-before-the-old-one"):
            assert secret not in text


def test_a_new_secret_leaves_the_old_one_valid_until_it_is_dropped(admin_client: Client) -> None:
    mapping = signed()
    text = page(admin_client, "hooks_hookmapping_change", mapping.pk)
    assert "New signing secret" in text
    assert 'value="drop_old_secret"' not in text
    new = shown_secret(act(admin_client, "make_secret", mapping))
    body = b"{}"
    now = datetime.now(UTC)
    (stored,) = configuration.hooks().mappings
    assert stored.signature
    for secret in (OLD, new):
        headers = sign(SignatureConfiguration("github", (secret,)), body, now)
        lower = {name.lower(): value for name, value in headers.items()}
        assert is_signed(stored.signature, lower, body, now)
    assert 'value="drop_old_secret"' in page(admin_client, "hooks_hookmapping_change", mapping.pk)
    assert said(act(admin_client, "drop_old_secret", mapping)) == ["1 old secret dropped."]
    assert secrets_of(mapping) == (new, "")
    assert_stored_nowhere(new)


@pytest.mark.parametrize("count", [0, 2])
def test_a_new_secret_is_made_for_one_mapping_at_a_time(count: int, admin_client: Client) -> None:
    mappings = [signed(name=str(number)) for number in range(count)]
    unsigned = make("unsigned")
    act(admin_client, "make_secret", *mappings)
    assert "needs no secret" in said(act(admin_client, "make_secret", unsigned))[0]
    assert [secrets_of(mapping) for mapping in mappings] == [(OLD, "")] * count
    assert secrets_of(unsigned) == ("", "")


def test_a_form_that_is_refused_claims_no_secret(admin_client: Client) -> None:
    form = mapping_form(signature_scheme="github", name="")
    assert "None is set yet." in admin_client.post(ADD, form).content.decode()
    mapping = signed()
    response = admin_client.post(change(mapping), form | {"signing_secret": TYPED})
    assert "the previous one still works" not in response.content.decode()
    assert secrets_of(mapping) == (OLD, "")


def test_a_copy_has_a_secret_of_its_own(admin_client: Client) -> None:
    mapping = signed()
    form = mapping_form(name="copy", signature_scheme="github", _saveasnew="Save as new")
    new = shown_secret(admin_client.post(change(mapping), form))
    assert new != OLD
    assert secrets_of(HookMapping.objects.get(name="copy")) == (new, "")


def test_a_copy_whose_sender_makes_the_secret_is_refused_without_it(admin_client: Client) -> None:
    mapping = signed(signature_scheme="stripe")
    form = mapping_form(name="copy", signature_scheme="stripe", _saveasnew="Save as new")
    response = admin_client.post(change(mapping), form)
    assert "signing_secret" in errors_of(response)
    assert OLD not in response.content.decode()
    assert HookMapping.objects.count() == 1


def test_another_scheme_keeps_no_secret_that_cannot_be_its_own(admin_client: Client) -> None:
    mapping = signed(previous_signing_secret="the-one-before-the-old-one")
    form = mapping_form(signature_scheme="standard-webhooks")
    new = shown_secret(admin_client.post(change(mapping), form))
    assert new.startswith("whsec_")
    assert secrets_of(mapping) == (new, "")
    response = admin_client.post(change(mapping), form | {"signature_scheme": "stripe"})
    assert "signing_secret" in errors_of(response)


def test_a_mapping_without_a_scheme_keeps_no_secret(admin_client: Client) -> None:
    mapping = signed(previous_signing_secret="the-one-before-the-old-one")
    admin_client.post(change(mapping), mapping_form(signing_secret=TYPED))
    assert secrets_of(mapping) == ("", "")


@pytest.mark.parametrize(("scheme", "secret"), [("github", "short"), ("standard-webhooks", OLD)])
def test_a_secret_that_cannot_be_one_is_refused(
    scheme: str, secret: str, admin_client: Client
) -> None:
    form = mapping_form(signature_scheme=scheme, signing_secret=secret)
    assert "signing_secret" in errors_of(admin_client.post(ADD, form))


# --- Presets ------------------------------------------------------------------------------------


def filled_in(response: Response) -> dict[str, Any]:
    """Return the form's values as a browser sends them back."""
    form = response.context["adminform"].form
    values = {name: form[name].value() for name in form.fields}
    return {name: value for name, value in values.items() if value not in (None, False)}


def test_the_presets_are_one_click_from_the_list(admin_client: Client) -> None:
    chooser = reverse("admin:hooks_hookmapping_presets")
    assert chooser in page(admin_client, "hooks_hookmapping_changelist")
    text = admin_client.get(chooser).content.decode()
    for preset in PRESETS:
        assert f"{ADD}?preset={preset.key}" in text
        assert preset.title in text


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.key)
def test_a_preset_is_a_mapping_in_two_clicks(preset: Preset, admin_client: Client) -> None:
    allow_keys("hook:")
    address = f"{ADD}?preset={preset.key}"
    response = admin_client.get(address)
    text = response.content.decode()
    assert f"http://testserver/hooks/{preset.values['match_path']}" in text
    form = filled_in(response)
    if preset.key in {"stripe", "slack", "sentry"}:
        assert "signing_secret" in errors_of(admin_client.post(address, form))
        form["signing_secret"] = TYPED
    saved = admin_client.post(address, form)
    if preset.key == "github":
        assert shown_secret(saved)
        assert "Payload URL" in saved.content.decode()
    stored = HookMapping.objects.get()
    expected = presets.new_mapping(preset, taken_names=())
    for name in ("name", *preset.values):
        assert getattr(stored, name) == getattr(expected, name), name


def test_a_second_mapping_of_a_preset_has_its_own_name_and_path(admin_client: Client) -> None:
    make("GitHub", match_path="github")
    form = filled_in(admin_client.get(f"{ADD}?preset=github"))
    assert (form["name"], form["match_path"]) == ("GitHub 2", "github-2")


def test_an_unknown_preset_is_an_empty_form(admin_client: Client) -> None:
    assert "name" not in filled_in(admin_client.get(f"{ADD}?preset=nobody"))


# --- The check ----------------------------------------------------------------------------------


def checked(client: Client, query: str = "", **changes: str) -> str:
    response = client.post(f"{CHECK}{query}", mapping_form(**changes))
    assert response.status_code == 200
    return response.content.decode()


def test_the_form_has_the_check_with_the_preset_s_sample_chosen(admin_client: Client) -> None:
    text = admin_client.get(f"{ADD}?preset=stripe").content.decode()
    assert f'data-address="{CHECK}"' in text
    assert re.search(r'value="stripe-payment-succeeded"\s+selected', text)
    mapping = make(match_path="slack")
    text = page(admin_client, "hooks_hookmapping_change", mapping.pk)
    assert f'data-address="{CHECK}?mapping={mapping.pk}"' in text
    assert re.search(r'value="slack-mention"\s+selected', text)


def test_the_check_speaks_of_the_values_in_the_form(admin_client: Client) -> None:
    text = checked(
        admin_client, session_key="Hook:CI", text_template="Hi {{text}}", sample="generic"
    )
    assert "fixed: agent:main:hook:ci" in text
    assert "Hi The backup is done" in text
    assert "With the sample" not in checked(admin_client, sample="")
    assert not HookMapping.objects.exists()


def test_the_check_holds_the_key_against_the_present_policy(admin_client: Client) -> None:
    assert "turn on allow_request_session_key" in checked(admin_client)
    allow_keys("other:")
    assert "a key that starts with other:" in checked(admin_client)


def test_the_check_escapes_what_it_repeats(admin_client: Client) -> None:
    hostile = "<script>alert(1)</script>"
    text = checked(admin_client, text_template=f"{{{{{hostile}}}}}", session_key=hostile)
    assert "&lt;script&gt;" in text
    assert "<script>" not in text


@pytest.mark.parametrize("position", [0, 1])
def test_the_check_names_the_earlier_mapping_that_hides_this_one(
    position: int, admin_client: Client
) -> None:
    first = make("first", match_path="ci", position=0)
    second = make("second", match_path="ci", position=position)
    hidden = "&quot;first&quot; comes first"
    assert hidden in checked(admin_client, match_path="/ci/")
    assert hidden in checked(admin_client, f"?mapping={second.pk}", match_path="ci")
    assert "comes first" not in checked(admin_client, f"?mapping={first.pk}", match_path="ci")
    assert "comes first" not in checked(admin_client, match_path="other")


@pytest.mark.parametrize("key", ["", "x", "-1", "9" * 30])
def test_the_check_of_a_mapping_that_is_none_is_that_of_a_new_one(
    key: str, admin_client: Client
) -> None:
    make("first", match_path="ci")
    assert "comes first" in checked(admin_client, f"?mapping={key}", match_path="ci")


def test_the_check_takes_no_value_for_granted(admin_client: Client) -> None:
    response = admin_client.post(CHECK, {"action": "fly", "mode": "", "signature_scheme": "\x01"})
    assert "Write a text" in response.content.decode()


def test_the_check_neither_needs_nor_repeats_a_secret(admin_client: Client) -> None:
    mapping = signed()
    text = checked(
        admin_client, f"?mapping={mapping.pk}", signature_scheme="github", signing_secret=TYPED
    )
    assert TYPED not in text
    assert OLD not in text


def test_the_check_is_for_those_who_see_mappings(client: Client, viewer: Client) -> None:
    assert checked(viewer)
    assert client.post(CHECK, mapping_form()).status_code == 302
    stranger = signed_in(User.objects.create_user("stranger", is_staff=True))
    assert stranger.post(CHECK, mapping_form()).status_code == 403
    author = User.objects.create_user("author", is_staff=True)
    author.user_permissions.set(Permission.objects.filter(codename="add_hookmapping"))
    assert checked(signed_in(author))


def test_the_check_is_asked_by_post_alone(admin_client: Client) -> None:
    assert admin_client.get(CHECK).status_code == 405


def test_a_typed_secret_is_asked_for_again_when_something_else_is_wrong(
    admin_client: Client,
) -> None:
    row = make(signature_scheme="stripe", signing_secret=OLD)
    form = mapping_form(signature_scheme="stripe", signing_secret=TYPED, session_key="")
    refused = admin_client.post(f"{LIST}{row.pk}/change/", {**form, "text_template": "{{x"})
    assert errors_of(refused)["signing_secret"] == ["Type it again: nothing was saved."]
    assert TYPED not in refused.content.decode()
    row.refresh_from_db()
    assert (row.signing_secret, row.previous_signing_secret) == (OLD, "")


def test_after_an_error_the_page_still_tells_the_address(admin_client: Client) -> None:
    form = mapping_form(signature_scheme="stripe", match_path="stripe")
    refused = admin_client.post(f"{ADD}?preset=stripe", form)
    assert "/hooks/stripe</span>" in refused.content.decode()


@pytest.mark.parametrize("key", ["abc", "\0", "9" * 30])
def test_an_action_on_a_row_that_cannot_be_is_refused(admin_client: Client, key: str) -> None:
    for action in ("drop_old_secret", "move_first"):
        forged = admin_client.post(LIST, {"action": action, "_selected_action": key})
        assert forged.status_code == 400
