"""What the policy and the mappings refuse to be set to."""

from __future__ import annotations

from typing import Any

import pytest
from django.core.exceptions import ValidationError
from django.core.management import call_command
from django.core.management.base import SystemCheckError
from django.db import IntegrityError
from django.urls import URLPattern, URLResolver, get_resolver

from hooks.models import RESERVED_PATHS, AllowedSessionPrefix, HookMapping, HookPolicy
from tests.hooks.conftest import set_policy
from wake.models import Agent

pytestmark = pytest.mark.django_db


def policy_at(path: str) -> HookPolicy:
    policy = HookPolicy.ensure()
    policy.base_path = path
    return policy


@pytest.mark.parametrize("path", ["/hooks", "/a/b-c/D_1", "/adminhooks", "/x/admin"])
def test_a_base_path_may_be_anywhere(path: str) -> None:
    policy_at(path).full_clean()


@pytest.mark.parametrize(
    "path",
    [
        "",
        "/",
        "hooks",
        "/hooks/",
        "//hooks",
        "/hooks//x",
        "/a b",
        "/hooks?",
        "/ho\u00f6ks",
        "/x\ny",
    ]
    + [f"/{reserved}" for reserved in sorted(RESERVED_PATHS)]
    + ["/Admin", "/admin/x"],
)
def test_a_base_path_must_be_a_path_of_its_own(path: str) -> None:
    with pytest.raises(ValidationError) as caught:
        policy_at(path).full_clean()
    assert set(caught.value.message_dict) == {"base_path"}


def test_every_other_address_of_the_site_is_reserved() -> None:
    def route(entry: URLPattern | URLResolver) -> str:
        return str(entry.pattern).partition("/")[0]

    routes = {route(entry) for entry in get_resolver().url_patterns}
    assert {name for name in routes if name and not name.startswith("<hook_path")} <= RESERVED_PATHS


def test_there_is_one_policy() -> None:
    assert HookPolicy.ensure() == HookPolicy.objects.get()
    with pytest.raises(IntegrityError):
        HookPolicy.objects.create(id=2)


def test_a_prefix_is_not_blank_and_listed_once() -> None:
    with pytest.raises(ValidationError):
        AllowedSessionPrefix(prefix="  ").full_clean()
    AllowedSessionPrefix.objects.create(prefix="hook:")
    with pytest.raises(ValidationError):
        AllowedSessionPrefix(prefix="HOOK:").full_clean()


@pytest.mark.parametrize(
    ("values", "fields"),
    [
        ({"match_path": "wake"}, {"match_path"}),
        ({"match_path": "/agent/"}, {"match_path"}),
        ({"text_template": ""}, {"text_template"}),
        ({"text_template": "{{a"}, {"text_template"}),
        ({"session_key": "hook:{{a b}}"}, {"session_key"}),
        ({"session_key": "agent:ops"}, {"session_key"}),
        ({"session_key": "agent:ops:x"}, {"session_key"}),
        ({"session_key": "{{", "text_template": "{{"}, {"session_key", "text_template"}),
        ({"name": ""}, {"name"}),
    ],
)
def test_a_mapping_that_could_never_work_is_refused(
    values: dict[str, Any], fields: set[str]
) -> None:
    with pytest.raises(ValidationError) as caught:
        HookMapping(
            **{"name": "m", "match_path": "ci", "text_template": "x", **values}
        ).full_clean()
    assert set(caught.value.message_dict) == fields


@pytest.mark.parametrize("key", ["", "hook:x", "main", "agent:ops:x", "hook:{{payload.id}}"])
def test_a_mapping_that_can_work_is_taken(key: str) -> None:
    ops = Agent.objects.create(id="ops")
    mapping = HookMapping(
        name="m", match_path="/ci/build/", session_key=key, agent=ops, text_template="{{a.b}}"
    )
    mapping.full_clean()
    assert mapping.match_path == "ci/build"


@pytest.mark.parametrize(
    ("policy", "prefixes", "reported"),
    [
        ({"allow_request_session_key": True}, [], True),
        ({"allow_request_session_key": True}, ["hook:"], False),
        ({"allow_request_session_key": False}, [], False),
        ({"allow_request_session_key": True, "enabled": False}, [], False),
    ],
)
def test_the_deployment_check_reports_an_open_policy(
    policy: dict[str, bool], prefixes: list[str], reported: bool
) -> None:
    set_policy(**policy)
    for prefix in prefixes:
        AllowedSessionPrefix.objects.create(prefix=prefix)
    try:
        call_command("check", "--deploy", "--fail-level", "WARNING")
        report = ""
    except SystemCheckError as error:
        report = str(error)
    assert ("hooks.W001" in report) == reported


@pytest.mark.django_db
def test_a_default_session_of_an_agent_that_is_not_there_is_refused() -> None:
    policy = HookPolicy.ensure()
    for key, accepted in (("agent:main:x", True), ("hook:x", True), ("agent:zz:x", False)):
        policy.default_session_key = key
        if accepted:
            policy.full_clean()
        else:
            with pytest.raises(ValidationError, match='unknown agent "zz"'):
                policy.full_clean()
