"""The decision over any request: a wake within the policy, or a refusal by name, never else."""

from __future__ import annotations

import contextlib
from datetime import UTC, datetime
from typing import Any

from hypothesis import assume, given
from hypothesis import strategies as st

from hooks.configuration import HookConfiguration, MappingConfiguration
from hooks.decisions import decide, require_hook
from hooks.errors import UnknownHook
from hooks.template import EMPTY, HookRequest, Template, TemplateError
from wake.configuration import AgentConfiguration, GatewayConfiguration
from wake.dispatch import WakeRequest, plan, resolve_session
from wake.errors import Refused
from wake.session_keys import Scope

NOW = datetime(2026, 11, 22, tzinfo=UTC)
AGENTS = {"main": AgentConfiguration("main"), "ops": AgentConfiguration("ops")}

keys = st.lists(
    st.sampled_from(["agent", "main", "ops", "hook", "HOOK", ":", ":", "x", "", " ", "\u200b", "İ"])
    | st.text(max_size=2)
).map("".join)
values = keys | st.none() | st.integers() | st.booleans() | st.lists(keys, max_size=2)
payloads = (
    st.dictionaries(
        st.sampled_from(["text", "mode", "sessionKey", "agentId", "source", "a", "b"]), values
    )
    | values
)
templates = st.sampled_from(
    [
        "",
        "hook:{{a}}",
        "{{a}}",
        "hook:{{a}}:{{b}}",
        "{{headers.x}}{{query.q}}",
        "hook:fixed",
        "main",
    ]
)
mappings = st.builds(
    MappingConfiguration,
    name=st.just("m"),
    path=st.sampled_from(["", "ci"]),
    source=st.sampled_from(["", "main"]),
    agent_id=st.sampled_from([None, "main", "ops", "gone"]),
    session_key=templates.map(Template.parse),
    text=st.sampled_from(["x", "{{a}}", "{{payload}}", ""]).map(Template.parse),
    fault=st.sampled_from(["", "", "a fault"]),
)
policies = st.builds(
    HookConfiguration,
    allow_request_session_key=st.booleans(),
    prefixes=st.sampled_from([(), ("hook:",), ("agent:main:hook:",), ("hook:", "x")]),
    mappings=st.lists(mappings, max_size=3).map(tuple),
)
requests = st.builds(
    HookRequest,
    path=st.sampled_from(["wake", "ci", "other"]),
    payload=payloads,
    now=st.just(NOW),
    headers=st.dictionaries(st.just("x"), st.text(max_size=3)),
    query=st.dictionaries(st.just("q"), st.text(max_size=3)),
)


def gateway(scope: Scope = "per-agent") -> GatewayConfiguration:
    return GatewayConfiguration(agents=AGENTS, scope=scope)


@given(requests, policies, st.sampled_from(["per-agent", "global"]))
def test_every_request_ends_in_a_wake_or_a_named_refusal(
    request: HookRequest, hooks: HookConfiguration, scope: Scope
) -> None:
    try:
        require_hook(request.path, hooks)
        wake = decide(request, hooks, gateway(scope))
    except (Refused, UnknownHook) as error:
        refusal = str(error)
        assert refusal.encode()  # fit to be sent
        return
    assert isinstance(wake, WakeRequest)
    assert wake.external
    with contextlib.suppress(Refused):
        plan(wake, gateway(scope), NOW)


@given(requests, policies)
def test_a_key_stays_within_the_policy_and_with_its_agent(
    request: HookRequest, hooks: HookConfiguration
) -> None:
    try:
        wake = decide(request, hooks, gateway())
    except (Refused, UnknownHook):
        return
    agent, session = resolve_session(wake.session_key, wake.agent_id, gateway())
    assert agent == (wake.agent_id or "main").strip().lower()
    if session is None:
        return
    assert session.agent_id == agent
    assert session.key.startswith(f"agent:{agent}:")
    if request.path == "wake":
        assert hooks.allow_request_session_key
    if hooks.prefixes:
        assert wake.session_key
        spellings = (wake.session_key.strip().lower(), session.key.lower())
        assert any(key.startswith(hooks.prefixes) for key in spellings)


@given(values, values)
def test_a_template_never_ends_in_no_key_or_in_a_shared_one(a: Any, b: Any) -> None:
    mapping = MappingConfiguration(
        "m", session_key=Template.parse("hook:{{a}}:{{b}}"), text=Template.parse("x")
    )
    hooks = HookConfiguration(allow_request_session_key=True, mappings=(mapping,))
    request = HookRequest("ci", {"a": a, "b": b}, NOW)
    try:
        wake = decide(request, hooks, gateway("global"))
    except Refused:
        return
    assert wake.session_key
    segments = wake.session_key.split(":")
    assert len(segments) >= 3
    assert all(segment.strip() for segment in segments)


@given(st.text(), values)
def test_an_operators_template_of_any_kind_is_refused_or_renders(text: str, value: Any) -> None:
    try:
        template = Template.parse(text)
    except TemplateError:
        assume(False)
    mapping = MappingConfiguration("m", session_key=EMPTY, text=template)
    try:
        decide(HookRequest("ci", value, NOW), HookConfiguration(mappings=(mapping,)), gateway())
    except Refused as error:
        assert str(error) == "hook mapping requires text"  # noqa: PT017
        assert not text.strip() or "{{" in text
