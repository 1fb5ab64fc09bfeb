"""The check of a mapping while it is being written."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hooks import presets, samples, transforms
from hooks.checking import MAX_TEMPLATE_CHARACTERS, check
from hooks.configuration import HookConfiguration, MappingConfiguration, frozen
from hooks.models import HookMapping, SignatureScheme
from hooks.presets import PRESETS, Preset
from hooks.samples import Sample
from hooks.simulation import Line
from wake.configuration import AgentConfiguration, GatewayConfiguration

NOW = datetime(2026, 11, 22, 12, tzinfo=UTC)
GATEWAY = GatewayConfiguration(
    {name: AgentConfiguration(name, enabled=name != "off") for name in ("main", "off", "ops")}
)
SHUT = HookConfiguration()
OPEN = HookConfiguration(allow_request_session_key=True)
GENERIC = samples.find("generic")


def mapping(**values: Any) -> HookMapping:
    return HookMapping(**{"name": "ci", "match_path": "ci", "text_template": "{{text}}", **values})


def said(
    written: HookMapping,
    hooks: HookConfiguration = SHUT,
    *,
    earlier: list[MappingConfiguration] | None = None,
) -> dict[str, Line]:
    """Return what is said about the mapping itself, by title."""
    found = check(written, hooks, GATEWAY, now=NOW, earlier=earlier or [])
    assert found.sample == ()
    return {line.title: line for line in found.mapping}


def of_sample(
    written: HookMapping, hooks: HookConfiguration = SHUT, sample: Sample = GENERIC
) -> dict[str, Line]:
    """Return what is said about the sample, by title."""
    found = check(written, hooks, GATEWAY, now=NOW, sample=sample)
    return {line.title: line for line in found.sample}


@pytest.mark.parametrize(
    ("values", "title", "words"),
    [
        ({"text_template": "{{a"}, "Text template", "never closed by }} (at character 1)"),
        ({"text_template": "a\nb {{a}} {{b"}, "Text template", "(at character 11), in line 2"),
        ({"session_key": "hook:{{1+1}}"}, "Session key", "names no value"),
        ({"text_template": " "}, "Text template", "Write a text"),
        ({"transform": "nobody"}, "Transform", 'no transform is registered as "nobody"'),
        ({"match_path": "/wake/"}, "Match path", "endpoint of its own"),
        ({"text_template": "x" * (MAX_TEMPLATE_CHARACTERS + 1)}, "Text template", "longer than"),
    ],
)
def test_what_cannot_be_read_is_said_and_nothing_else(
    values: dict[str, Any], title: str, words: str
) -> None:
    found = check(mapping(**values), OPEN, GATEWAY, now=NOW, sample=GENERIC)
    (line,) = found.mapping
    assert (line.title, line.verdict, found.sample) == (title, "bad", ())
    assert words in line.detail


def test_what_a_mapping_takes_from_the_request_is_listed_once() -> None:
    written = mapping(text_template="{{a.b}} {{headers.x-e}} {{a.b}}", session_key="hook:{{id}}")
    assert said(written)["Taken from the request"].detail == "a.b, headers.x-e, id"


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"session_key": "Hook:CI"}, "fixed: agent:main:hook:ci"),
        ({"session_key": "agent:ops:x", "agent_id": "ops"}, "fixed: agent:ops:x"),
        ({}, "none: the main session of agent main, and every agent is nudged"),
        ({"mode": "next-heartbeat"}, "none: the main session of agent main"),
        ({"agent_id": "ops"}, "none: the main session of agent ops"),
        ({"action": "agent"}, "none: each turn has a session of its own, hook:<random id>"),
    ],
)
def test_a_key_that_no_payload_decides_is_shown_as_it_will_be(
    values: dict[str, Any], words: str
) -> None:
    lines = said(mapping(**values))
    assert lines["Session key"] == Line("Session key", words, "good")
    assert lines["Policy"].verdict == "good"


def test_a_turn_without_a_key_goes_to_the_policys_default_session() -> None:
    line = said(mapping(action="agent"), replace(SHUT, default_session_key="hook:t"))["Session key"]
    assert line.detail == "none: the policy's default session, agent:main:hook:t"


@pytest.mark.parametrize(
    ("values", "title", "words"),
    [
        ({"session_key": "agent:ops"}, "Session key", "malformed"),
        ({"session_key": "agent:ops:x"}, "Session key", "cross-agent"),
        ({"agent_id": "off"}, "Agent", 'agent "off" is disabled'),
        ({"agent_id": "nobody"}, "Agent", 'unknown agent "nobody"'),
        ({"session_key": "ci"}, "Policy", "none of the allowed session prefixes"),
        ({"action": "agent"}, "Policy", "none of the allowed session prefixes"),
        ({"session_key": "gh:x", "agent_id": "ops"}, "Policy", "not one of the allowed agents"),
    ],
)
def test_where_a_mapping_may_not_go_is_said_without_a_sample(
    values: dict[str, Any], title: str, words: str
) -> None:
    policy = replace(SHUT, prefixes=("gh:",), allowed_agents=frozenset({"main"}))
    line = said(mapping(**values), policy)[title]
    assert line.verdict == "bad"
    assert words in line.detail


@pytest.mark.parametrize(
    ("policy", "verdict", "words"),
    [
        (SHUT, "bad", "turn on allow_request_session_key"),
        (OPEN, "good", "allows every key"),
        (replace(OPEN, prefixes=("gh:", "hook:")), "good", "that starts with gh: or hook:"),
    ],
)
def test_a_key_from_outside_is_held_against_both_parts_of_the_policy(
    policy: HookConfiguration, verdict: str, words: str
) -> None:
    lines = said(mapping(session_key="hook:{{id}}"), policy)
    assert "from outside" in lines["Session key"].detail
    assert lines["Policy"].verdict == verdict
    assert words in lines["Policy"].detail


@pytest.mark.parametrize(
    ("first", "own", "verdict"),
    [
        ({"match_path": "/ci/"}, {}, "bad"),
        ({"match_path": ""}, {}, "bad"),
        ({}, {"match_source": "a"}, "bad"),
        ({"match_source": "a"}, {"match_source": "a"}, "bad"),
        ({}, {"signature_scheme": SignatureScheme.GITHUB}, "plain"),
        ({"match_source": "a"}, {}, None),
        ({"match_source": "a"}, {"match_source": "b"}, None),
        ({"match_path": "other"}, {}, None),
        ({}, {"match_path": ""}, None),
    ],
)
def test_an_earlier_mapping_that_takes_every_request_is_named(
    first: dict[str, Any], own: dict[str, Any], verdict: str | None
) -> None:
    lines = said(mapping(**own), earlier=[frozen(mapping(name="first", **first))])
    line = lines.get("Order")
    assert (line and line.verdict) == verdict
    if line:
        assert '"first" comes first' in line.detail


def test_a_sample_shows_text_key_and_what_the_policy_says_of_it() -> None:
    written = mapping(text_template="Said: {{text}}", session_key="Hook:{{id}}")
    lines = of_sample(written, replace(OPEN, prefixes=("hook:",)))
    assert lines["Text"].detail == "Said: The backup is done"
    assert lines["Session"].detail == "agent:main:hook:backup-42"
    assert lines["Policy"].verdict == "good"
    assert of_sample(written, replace(OPEN, prefixes=("x:",)))["Refused"].verdict == "bad"
    assert "turn on" in of_sample(written)["Refused"].detail


def test_what_a_sample_has_no_value_for_is_said() -> None:
    written = mapping(text_template="{{text}}{{nothing}}", session_key="hook:{{gone}}")
    lines = of_sample(written, OPEN)
    assert lines["Empty in this sample"].detail == "nothing, gone"
    assert "{{gone}} is empty" in lines["Refused"].detail


def test_a_sample_comes_to_a_mapping_whose_source_it_does_not_name() -> None:
    assert "Text" in of_sample(mapping(match_source="elsewhere"))


def test_each_of_the_first_items_is_shown_and_a_refusal_of_a_later_one() -> None:
    items = [{"n": 1}, {"n": 2}, {"n": 3}, {"n": 4}, {"n": None}]
    sample = Sample("s", "s", {"items": items})
    lines = of_sample(mapping(text_template="{{items[0].n}}", for_each="items"), SHUT, sample)
    texts = {title: line.detail for title, line in lines.items() if title.startswith("Text")}
    assert texts == {
        "Text (item 1 of 5)": "1",
        "Text (item 2 of 5)": "2",
        "Text (item 3 of 5)": "3",
    }
    assert "requires text" in lines["Refused (item 5 of 5)"].detail


def test_a_long_text_is_cut_and_a_longer_one_refused() -> None:
    sample = Sample("s", "s", {"text": "x" * 60_000})
    assert len(of_sample(mapping(), SHUT, sample)["Text"].detail) == 2001
    twice = mapping(text_template="{{text}}{{text}}")
    assert "at most 65536" in of_sample(twice, SHUT, sample)["Refused"].detail


def test_the_check_of_an_address_by_slack_is_answered() -> None:
    slack = presets.new_mapping(presets.find("slack"), taken_names=())
    lines = of_sample(slack, SHUT, samples.find("slack-challenge"))
    assert lines["Answer"].verdict == "good"


def test_a_transform_runs_on_the_sample_and_its_defect_is_told_without_detail() -> None:
    calls: list[Any] = []

    @transforms.register("checked")
    def checked(payload: Any, *_: Any) -> dict[str, str] | None:
        calls.append(payload)
        if payload.get("kind") == "nothing":
            return None
        return {"text": payload["text"].upper()}

    try:
        written = mapping(transform="checked")
        said(written)
        assert calls == []
        lines = of_sample(written)
        assert lines["Transform"].detail == "sets text"
        assert lines["Text"].detail == "THE BACKUP IS DONE"
        assert (
            "204"
            in of_sample(written, SHUT, Sample("n", "n", {"kind": "nothing"}))["Outcome"].detail
        )
        refused = of_sample(written, SHUT, Sample("n", "n", {}))["Refused"]
        assert refused.detail == "the transform of this hook failed"
    finally:
        del transforms._registered["checked"]


@pytest.mark.parametrize("preset", PRESETS, ids=lambda preset: preset.key)
def test_every_preset_is_well_and_understands_its_sample(preset: Preset) -> None:
    written = presets.new_mapping(preset, taken_names=())
    found = check(written, OPEN, GATEWAY, now=NOW, sample=samples.find(preset.sample))
    assert [line for line in (*found.mapping, *found.sample) if line.verdict == "bad"] == []
    assert any(line.title.startswith("Text") for line in found.sample)


_WRITTEN = st.text(st.sampled_from("ab:{}[]0. \n\0\ud800") | st.characters(), max_size=40)


@given(
    text=_WRITTEN,
    key=_WRITTEN,
    for_each=_WRITTEN,
    agent=st.none() | _WRITTEN,
    payload=st.recursive(
        st.none() | st.booleans() | st.integers() | _WRITTEN,
        lambda inner: st.lists(inner) | st.dictionaries(st.sampled_from("ab0"), inner),
        max_leaves=5,
    ),
)
def test_the_check_says_something_whatever_is_written(
    text: str, key: str, for_each: str, agent: str | None, payload: Any
) -> None:
    written = mapping(text_template=text, session_key=key, for_each=for_each, agent_id=agent)
    found = check(written, OPEN, GATEWAY, now=NOW, sample=Sample("s", "s", payload))
    assert found.mapping
    assert json.dumps([line.detail for line in (*found.mapping, *found.sample)])
