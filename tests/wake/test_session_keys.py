"""The rules of session keys: docs/contract.md, "Session keys"."""

from __future__ import annotations

import contextlib
import re

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from wake.errors import SessionKeyError
from wake.session_keys import AGENT_ID_PATTERN, Scope, SessionKey, canonicalize, main_session_key

agent_ids = st.from_regex(AGENT_ID_PATTERN, fullmatch=True)
# Mostly what keys are made of, so that examples reach the rules, and anything at all beside it.
WORDS = "agent Agent main MAIN ops hook signal group matrix channel thread THREAD !AbC global İ ΑΣ"
parts = st.sampled_from([*WORDS.split(), "", " ", "x y"])
keys = st.one_of(st.lists(parts, max_size=8).map(":".join), st.text(max_size=600))
scopes = st.sampled_from(["per-agent", "global"])


@pytest.mark.parametrize("blank", [None, "", " ", "\t\n", "\u2003"])
@pytest.mark.parametrize("scope", ["per-agent", "global"])
def test_a_blank_key_is_no_key(blank: str | None, scope: Scope) -> None:
    assert canonicalize(blank, scope=scope) is None


@pytest.mark.parametrize(
    ("raw", "canonical"),
    [
        ("discord:channel:123", "agent:main:discord:channel:123"),
        ("  hook:my-session \n", "agent:main:hook:my-session"),
        ("agent:main:discord:channel:123", "agent:main:discord:channel:123"),
        ("AGENT:Main:Discord:Channel:ABC", "agent:main:discord:channel:abc"),
        ("main", "agent:main:main"),
        ("MAIN", "agent:main:main"),
        ("agent:main:main", "agent:main:main"),
        ("agent", "agent:main:agent"),
        ("global", "agent:main:global"),
        ("hook:agent:ops:x", "agent:main:hook:agent:ops:x"),
    ],
)
def test_a_key_belongs_to_the_default_agent(raw: str, canonical: str) -> None:
    assert canonicalize(raw) == SessionKey("main", canonical)


@pytest.mark.parametrize("raw", ["main", "agent:main:main", "agent:MAIN:Main", "work"])
def test_main_is_an_alias_of_the_main_session(raw: str) -> None:
    assert canonicalize(raw, main_key="work") == ("main", "agent:main:work")


def test_a_selected_agent_owns_the_key() -> None:
    for raw in ("hook:x", "agent:ops:hook:x", "agent:OPS:hook:x"):
        assert canonicalize(raw, selected_agent="ops") == ("ops", "agent:ops:hook:x")


@pytest.mark.parametrize(
    "raw",
    ["agent:ops", "agent:", "AGENT:ops", "agent::x", "agent:ops:", "agent:main:a::b", ":x", "a:"],
)
def test_malformed_keys_are_refused(raw: str) -> None:
    with pytest.raises(SessionKeyError, match=re.escape(f'malformed session key "{raw}"')):
        canonicalize(raw)


def test_another_agents_key_is_refused_and_never_rerouted() -> None:
    with pytest.raises(SessionKeyError) as refused:
        canonicalize("agent:ops:hook:x")
    assert str(refused.value) == (
        'session key "agent:ops:hook:x" targets agent "ops" but the default agent is "main"; '
        "cross-agent wake is not supported"
    )
    with pytest.raises(
        SessionKeyError, match='targets agent "main" but the selected agent is "ops"'
    ):
        canonicalize("agent:main:main", selected_agent="ops")


@pytest.mark.parametrize("raw", ["main", "agent:ops:x", "agent:ops", "x y", "a" * 9999])
def test_under_the_global_scope_every_key_is_global(raw: str) -> None:
    assert canonicalize(raw, scope="global") == ("main", "global")
    assert canonicalize(raw, scope="global", selected_agent="ops") == ("ops", "global")
    assert main_session_key("ops", scope="global") == ("ops", "global")


@pytest.mark.parametrize(
    ("raw", "rest"),
    [
        ("SIGNAL:Group:AbC=:Tail", "signal:group:AbC=:tail"),
        ("agent:main:signal:group:AbC=", "signal:group:AbC="),
        ("hook:Signal:GROUP:AbC", "hook:signal:group:AbC"),
        ("nosignal:group:AbC", "nosignal:group:abc"),
        ("Matrix:Channel:!RooM:Example.ORG", "matrix:channel:!RooM:Example.ORG"),
        ("matrix:group:!R:Ex.org:THREAD:$EvenT", "matrix:group:!R:Ex.org:thread:$EvenT"),
        ("matrix:direct:@User:Ex.org", "matrix:direct:@user:ex.org"),
        ("matrix:channel:Thread:x", "matrix:channel:Thread:x"),
    ],
)
def test_ids_of_chat_networks_keep_their_case(raw: str, rest: str) -> None:
    assert canonicalize(raw) == ("main", f"agent:main:{rest}")


@pytest.mark.parametrize(
    ("raw", "reason"),
    [
        ("hook:a b", "contains whitespace"),
        ("hook:a\u00a0b", "contains whitespace"),
        ("hook:a\nb", "contains whitespace"),
        ("hook:a\0b", r"contains a control character \(U\+0000\)"),
        ("hook:a\u202eb", r"contains a control character \(U\+202E\)"),
        ("hook:\ud800", r"contains a control character \(U\+D800\)"),
        ("x" * 502, "is 513 characters long; at most 512 are allowed"),
    ],
)
def test_characters_and_length_are_limited(raw: str, reason: str) -> None:
    with pytest.raises(SessionKeyError, match=reason) as refused:
        canonicalize(raw)
    assert str(refused.value).isprintable(), "the reason must fit one line of a terminal or a log"


def test_the_longest_key_is_accepted() -> None:
    accepted = canonicalize("x" * 501)
    assert accepted
    assert len(accepted.key) == 512


@given(keys, agent_ids, st.none() | agent_ids, agent_ids, scopes)
@example("agent:ops:main", "main", "ops", "work", "per-agent")
def test_canonicalizing_is_idempotent_keeps_the_agent_and_raises_only_its_own_error(
    raw: str, default: str, selected: str | None, main_key: str, scope: Scope
) -> None:
    def canonical(key: str) -> SessionKey | None:
        return canonicalize(
            key, selected_agent=selected, default_agent=default, main_key=main_key, scope=scope
        )

    first = None
    with contextlib.suppress(SessionKeyError):
        first = canonical(raw)
    if first is None:
        return
    agent = selected or default
    assert first.agent_id == agent
    assert len(first.key) <= 512
    if scope == "per-agent":
        assert first.key.startswith(f"agent:{agent}:")
        assert all(first.key.split(":"))
    assert canonical(first.key) == first
    assert canonical(f"  {raw}\t") == first


@given(keys)
def test_a_key_without_opaque_ids_compares_in_lower_case(raw: str) -> None:
    if "signal" in raw.lower() or "matrix" in raw.lower():
        return
    try:
        upper, lower = canonicalize(raw.upper()), canonicalize(raw.upper().lower())
    except SessionKeyError:
        return
    assert upper == lower
