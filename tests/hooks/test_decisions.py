"""The decision over any request: a wake within the policy, or a refusal by name, never else."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any
from uuid import UUID

import msgspec
from hypothesis import assume, given
from hypothesis import strategies as st

from hooks import answers
from hooks.configuration import HookConfiguration, MappingConfiguration
from hooks.credentials import Credential
from hooks.decisions import decide, require_hook
from hooks.errors import NotAuthorized, TransformFailed, UnknownHook
from hooks.models import HookMapping
from hooks.simulation import Trial, simulate
from hooks.template import EMPTY, HookRequest, Template, TemplateError
from wake.configuration import AgentConfiguration, GatewayConfiguration
from wake.dispatch import plan, resolve_session
from wake.errors import Refused, TextError
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
        st.sampled_from(
            ("text", "message", "mode", "sessionKey", "agentId", "source", "a", "b", "deliver")
        ),
        values,
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


def transform(payload: Any, headers: Any, query: Any, path: str) -> Any:
    """Whatever the payload says: a text, a key, nothing, or a mistake."""
    fields = payload.get("b") if isinstance(payload, dict) else None
    return {"text": fields, "session_key": fields} if isinstance(fields, str) else fields


mappings = st.builds(
    MappingConfiguration,
    id=st.integers(1, 3),
    name=st.just("m"),
    action=st.sampled_from(HookMapping.Action),
    for_each=st.sampled_from(["", "", "a", "b"]),
    transform=st.sampled_from([None, None, transform]),
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
    default_session_key=st.sampled_from(["", "", "hook:turns", "main", "agent:ops:x"]),
    allowed_agents=st.sampled_from([frozenset[str](), frozenset({"main"}), frozenset({"ops"})]),
    mappings=st.lists(mappings, max_size=3).map(tuple),
)
requests = st.builds(
    HookRequest,
    path=st.sampled_from(["wake", "agent", "ci", "other"]),
    payload=payloads,
    now=st.just(NOW),
    uid=st.uuids(),
    all_headers=st.dictionaries(st.just("x"), st.text(max_size=3)),
    query=st.dictionaries(st.just("q"), st.text(max_size=3)),
)


def gateway(scope: Scope = "per-agent") -> GatewayConfiguration:
    return GatewayConfiguration(agents=AGENTS, scope=scope)


credentials = st.sampled_from([frozenset[int](), frozenset({1}), frozenset({1, 2, 3}), None]).map(
    lambda mappings: Credential("c", "c", mappings)
)

# What a sender is told; a defect of a transform is one of them (500).
NAMED = (Refused, UnknownHook, NotAuthorized, TransformFailed)


@given(requests, credentials, policies, st.sampled_from(["per-agent", "global"]))
def test_every_request_ends_in_wakes_or_a_named_refusal(
    request: HookRequest, credential: Credential, hooks: HookConfiguration, scope: Scope
) -> None:
    try:
        require_hook(request.path, hooks)
        decision = decide(request, credential, hooks, gateway(scope))
    except NAMED as error:
        refusal = str(error)
        assert refusal.encode()  # fit to be sent
        return
    assert decision.mapping is None or credential.opens(decision.mapping)
    for wake in decision.wakes:
        assert wake.external
        assert plan(wake, gateway(scope), NOW).text


@given(requests, credentials, policies)
def test_a_key_stays_within_the_policy_and_with_its_agent(
    request: HookRequest, credential: Credential, hooks: HookConfiguration
) -> None:
    try:
        decision = decide(request, credential, hooks, gateway())
    except NAMED:
        return
    for wake in decision.wakes:
        agent, session = resolve_session(wake.session_key, wake.agent_id, gateway())
        assert agent == (wake.agent_id or "main").strip().lower()
        assert not hooks.allowed_agents or agent in hooks.allowed_agents
        if decision.mapping:
            assert wake.agent_id == decision.mapping.agent_id
        if session is None:
            continue
        assert session.agent_id == agent
        assert session.key.startswith(f"agent:{agent}:")
        if request.path == "wake":
            assert hooks.allow_request_session_key
        if hooks.prefixes:
            assert wake.session_key
            spellings = (wake.session_key.strip().lower(), session.key.lower())
            assert any(key.startswith(hooks.prefixes) for key in spellings)


@given(requests, credentials, policies)
def test_the_simulator_comes_to_the_same_end(
    request: HookRequest, credential: Credential, hooks: HookConfiguration
) -> None:
    body = msgspec.json.encode(request.payload)
    trial = Trial(request.path, body, request.headers, request.query, credential)
    try:
        require_hook(request.path, hooks)
        expected = 200 if decide(request, credential, hooks, gateway()).wakes else 204
    except NAMED as error:
        expected = answers.of_error(error).status
    assert simulate(trial, hooks, gateway(), now=NOW).answer.status == expected


@given(values, values)
def test_a_template_never_ends_in_no_key_or_in_a_shared_one(a: Any, b: Any) -> None:
    mapping = MappingConfiguration(
        1, "m", session_key=Template.parse("hook:{{a}}:{{b}}"), text=Template.parse("x")
    )
    hooks = HookConfiguration(allow_request_session_key=True, mappings=(mapping,))
    request = HookRequest("ci", {"a": a, "b": b}, NOW, UUID(int=1))
    try:
        (wake,) = decide(request, Credential("c", "c"), hooks, gateway("global")).wakes
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
    mapping = MappingConfiguration(1, "m", session_key=EMPTY, text=template)
    request = HookRequest("ci", value, NOW, UUID(int=1))
    hooks = HookConfiguration(mappings=(mapping,))
    try:
        decide(request, Credential("c", "c"), hooks, gateway())
    except TextError:
        assert "\0" in text or "{{" in text
    except Refused as error:
        assert str(error) == "hook mapping requires text"  # noqa: PT017
        assert not text.strip() or "{{" in text
