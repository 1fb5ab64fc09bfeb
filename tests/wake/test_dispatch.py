"""What a wake does: the table of docs/contract.md, at the front door that every way in shares.

The doors' own tests go through the same cells from outside.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from types import MappingProxyType

import pytest
from django.db import connection, transaction
from hypothesis import given
from hypothesis import strategies as st

from tests.claims import terms
from wake import configuration, queue
from wake.configuration import AgentConfiguration, GatewayConfiguration
from wake.dispatch import (
    Mode,
    Receipt,
    WakeRequest,
    dispatch,
    dispatch_batch,
    for_system_event,
    plan,
    session_to_read,
)
from wake.errors import (
    AgentError,
    QueueFull,
    Refused,
    SessionKeyError,
    StorageUnavailable,
    TextError,
)
from wake.models import Agent, DueReason, GatewaySettings, Heartbeat, Session, SystemEvent
from wake.schedule import Schedule, next_due

NOW = datetime(2026, 11, 22, 12, 0, 7, tzinfo=UTC)
AGENTS: Mapping[str, AgentConfiguration] = MappingProxyType(
    {
        "main": AgentConfiguration("main"),
        "ops": AgentConfiguration("ops", heartbeat_every=timedelta(0)),
        "old": AgentConfiguration("old", enabled=False),
    }
)
SNAPSHOT = GatewayConfiguration(AGENTS)
SCHEDULE = Schedule(timedelta(minutes=30))
SCHEDULED = queue.Due(next_due("main", SCHEDULE, NOW) or NOW, DueReason.SCHEDULE)
AT_ONCE = queue.Due(NOW, DueReason.WAKE)


def planned(
    mode: Mode, key: str | None, agent: str | None = None
) -> tuple[str, queue.Due, list[str]]:
    """Return the session, when it is due, and the sessions that are nudged."""
    entry = plan(WakeRequest("x", "cli", mode, key, agent), SNAPSHOT, NOW)
    return entry.session.key, entry.due, [key for _, key in entry.nudged]


def test_now_without_a_key_goes_to_the_default_main_session_and_nudges_every_enabled_agent() -> (
    None
):
    nudged = ["agent:main:main", "agent:ops:main"]
    assert planned(Mode.NOW, None) == ("agent:main:main", AT_ONCE, nudged)
    assert planned(Mode.NOW, "  ", " ") == ("agent:main:main", AT_ONCE, nudged)


def test_now_without_a_key_for_a_selected_agent_nudges_that_one_only() -> None:
    assert planned(Mode.NOW, None, "OPS") == ("agent:ops:main", AT_ONCE, ["agent:ops:main"])


def test_next_heartbeat_without_a_key_waits_for_the_main_sessions_schedule() -> None:
    assert planned(Mode.NEXT_HEARTBEAT, None) == ("agent:main:main", SCHEDULED, [])


def test_now_with_a_key_wakes_exactly_that_session() -> None:
    assert planned(Mode.NOW, "hook:x") == ("agent:main:hook:x", AT_ONCE, [])
    assert planned(Mode.NOW, "main") == ("agent:main:main", AT_ONCE, [])
    assert planned(Mode.NOW, "agent:ops:hook:x", "ops") == ("agent:ops:hook:x", AT_ONCE, [])


def test_next_heartbeat_with_a_key_waits_only_for_the_main_session() -> None:
    assert planned(Mode.NEXT_HEARTBEAT, "main") == ("agent:main:main", SCHEDULED, [])
    assert planned(Mode.NEXT_HEARTBEAT, "hook:x") == ("agent:main:hook:x", AT_ONCE, [])


def test_with_the_schedule_off_next_heartbeat_wakes_at_once() -> None:
    assert planned(Mode.NEXT_HEARTBEAT, None, "ops") == ("agent:ops:main", AT_ONCE, [])


def test_a_system_event_without_a_key_waits_and_nudges_nobody() -> None:
    request = for_system_event("x", " ", source="ws")
    entry = plan(request, SNAPSHOT, NOW)
    assert (entry.session.key, entry.due, entry.nudged) == ("agent:main:main", SCHEDULED, ())


def test_a_system_event_with_a_key_wakes_that_session() -> None:
    entry = plan(for_system_event("x", "hook:x", source="ws"), SNAPSHOT, NOW)
    assert (entry.session.key, entry.due, entry.nudged) == ("agent:main:hook:x", AT_ONCE, ())


def test_a_presence_lines_key_is_ignored() -> None:
    entry = plan(for_system_event(" Node: laptop", "hook:x", source="ws"), SNAPSHOT, NOW)
    assert (entry.session.key, entry.due) == ("agent:main:main", SCHEDULED)


@pytest.mark.parametrize(
    ("request_", "error", "text"),
    [
        (WakeRequest("x", "cli", agent_id="nobody"), AgentError, 'unknown agent "nobody"'),
        (WakeRequest("x", "cli", agent_id="old"), AgentError, 'agent "old" is disabled'),
        (WakeRequest("x", "cli", agent_id="a\n\x1b"), AgentError, r'unknown agent "a\n\x1b"'),
        (WakeRequest("x", "cli", session_key="agent:ops"), SessionKeyError, "malformed"),
        (WakeRequest("x", "cli", session_key="agent:ops:x"), SessionKeyError, "cross-agent"),
        (WakeRequest(" \n", "cli"), TextError, "text required"),
        (WakeRequest("é" * 32_769, "cli"), TextError, "65538 bytes long; at most 65536"),
        (WakeRequest("a\ud800", "cli"), TextError, "lone surrogate"),
        (WakeRequest("a\0b", "cli"), TextError, "NUL"),
    ],
)
@pytest.mark.django_db
def test_a_refusal_leaves_nothing_behind(
    request_: WakeRequest, error: type[Refused], text: str
) -> None:
    Agent.objects.create(id="ops")
    Agent.objects.create(id="old", enabled=False)
    with pytest.raises(error) as refused:
        dispatch(request_)
    assert text in str(refused.value)
    assert not Session.objects.exists()
    assert not SystemEvent.objects.exists()
    assert not Heartbeat.objects.exists()


@given(
    text=st.text(max_size=20),
    key=st.none()
    | st.text(max_size=30)
    | st.sampled_from(["agent:ops:x", "AGENT:main:MAIN", "main"]),
    agent=st.none() | st.text(max_size=10) | st.sampled_from(["ops", "OPS ", "old"]),
    mode=st.sampled_from(Mode),
)
def test_a_plan_stays_with_its_agent_and_fails_only_by_refusing(
    text: str, key: str | None, agent: str | None, mode: Mode
) -> None:
    try:
        entry = plan(WakeRequest(text, "cli", mode, key, agent), SNAPSHOT, NOW)
    except Refused:
        return
    chosen = (agent or "").strip().lower() or "main"
    assert entry.session.agent_id == chosen
    assert entry.session.key.startswith(f"agent:{chosen}:")
    assert entry.text == text.strip() != ""
    assert entry.due.at >= NOW
    if (key or "").strip():
        assert not entry.nudged, "a wake with a key nudges nobody else"


@pytest.mark.django_db
def test_a_receipt_says_what_happened() -> None:
    request = WakeRequest(" CI finished ", "cli", Mode.NOW, "Discord:Channel:123")
    first = dispatch(request)
    event = SystemEvent.objects.get()
    assert first == Receipt(Mode.NOW, "queued", "agent:main:discord:channel:123", event.uid)
    assert first.as_json() == {
        "ok": True,
        "mode": "now",
        "eventOutcome": "queued",
        "sessionKey": "agent:main:discord:channel:123",
        "eventId": str(event.uid),
    }
    assert event.text == "CI finished"
    again = dispatch(request)
    assert (again.event_outcome, again.event_id) == ("coalesced", event.uid)


@pytest.mark.django_db
def test_a_batch_gives_each_request_its_own_result() -> None:
    stored = GatewaySettings.ensure()
    stored.max_queued_events = 1
    stored.save()
    results = dispatch_batch(
        [
            WakeRequest("a", "cli", session_key="x"),
            WakeRequest("", "cli", session_key="x"),
            WakeRequest("b", "cli", session_key="x"),
            WakeRequest("c", "cli", session_key="agent:ops:x"),
            WakeRequest("d", "cli", session_key="y"),
        ]
    )
    kinds = [type(result) for result in results]
    assert kinds == [Receipt, TextError, QueueFull, SessionKeyError, Receipt]
    assert sorted(SystemEvent.objects.values_list("text", flat=True)) == ["a", "d"]


@pytest.mark.django_db
def test_a_database_that_cannot_store_is_said_so() -> None:
    configuration.gateway()
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE wake_systemevent RENAME TO gone")
    try:
        with pytest.raises(StorageUnavailable), transaction.atomic():
            dispatch(WakeRequest("a", "cli"))
    finally:
        if connection.vendor == "sqlite":
            with connection.cursor() as cursor:
                cursor.execute("ALTER TABLE gone RENAME TO wake_systemevent")


@pytest.mark.django_db
def test_fan_out_puts_the_event_in_one_session_and_wakes_both_agents() -> None:
    Agent.objects.create(id="ops")
    configuration.gateway.forget()
    dispatch(WakeRequest("everyone", "cli"))
    assert SystemEvent.objects.get().session.key == "agent:main:main"
    due = queue.claim(
        terms("main", "ops"),
        limit=9,
        owner="t",
        now=datetime.now(UTC),
        lease=timedelta(9),
    )
    found = {claim.session.key: len(claim.events) for claim in due}
    assert found == {"agent:main:main": 1, "agent:ops:main": 0}


# --- Looking at a session -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("key", "agent", "meant"),
    [
        ("hook:x", "", ("main", "agent:main:hook:x")),
        ("hook:x", " OPS ", ("ops", "agent:ops:hook:x")),
        ("agent:OPS:hook:x", "", ("ops", "agent:ops:hook:x")),
        ("agent:old:main", "", ("old", "agent:old:main")),
        ("  ", "old", ("old", "agent:old:main")),
    ],
)
def test_who_looks_names_any_agent_by_its_key(key: str, agent: str, meant: tuple[str, str]) -> None:
    assert session_to_read(key, agent, SNAPSHOT) == meant


@pytest.mark.parametrize("key", ["hook:x", "agent:ops:x", "agent:x", "::"])
def test_under_one_scope_every_key_means_the_agents_session(key: str) -> None:
    snapshot = replace(SNAPSHOT, scope="global")
    assert session_to_read(key, "", snapshot) == ("main", "global")
    assert session_to_read(key, "old", snapshot) == ("old", "global")


@pytest.mark.parametrize(
    ("key", "agent", "reason"),
    [
        ("agent:nobody:x", "", 'unknown agent "nobody"'),
        ("x", "nobody", 'unknown agent "nobody"'),
        ("agent:ops:x", "main", "cross-agent"),
        ("agent:x", "", 'malformed session key "agent:x"'),
    ],
)
def test_who_looks_is_refused_by_name(key: str, agent: str, reason: str) -> None:
    with pytest.raises(Refused, match=reason):
        session_to_read(key, agent, SNAPSHOT)
