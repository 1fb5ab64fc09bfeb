"""The gateway's methods over a real socket: what they take, answer and leave in the database."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from uuid import uuid4

import pytest
from django.db import connection
from django.utils import timezone

from tests.wake.gateway_server import Json, Wire, connected
from wake import configuration
from wake.gateway.connection import MAX_REQUESTS_IN_FLIGHT
from wake.gateway.frames import Frame
from wake.gateway.methods import METHODS, Caller, Method, NoParams
from wake.models import (
    Agent,
    DueReason,
    EventState,
    GatewaySettings,
    Heartbeat,
    HeartbeatStatus,
    PresenceEntry,
    Session,
    SystemEvent,
)

MAIN = "agent:main:main"
OPS = "agent:ops:main"
CHANNEL = "agent:main:discord:channel:123"


@pytest.fixture
def ops(transactional_db: None) -> Agent:
    return Agent.objects.create(id="ops")


def texts(key: str) -> list[str]:
    """Return the texts queued in a session."""
    queued = SystemEvent.objects.filter(session__key=key, state=EventState.QUEUED)
    return list(queued.order_by("pk").values_list("text", flat=True))


def woken_now() -> set[str]:
    """Return the keys of the sessions whose heartbeat is requested now."""
    due = Session.objects.filter(due_at__lte=timezone.now(), due_reason=DueReason.WAKE)
    return set(due.values_list("key", flat=True))


def waiting_for_schedule() -> set[str]:
    """Return the keys of the sessions that wait for their scheduled heartbeat."""
    due = Session.objects.filter(due_at__gt=timezone.now(), due_reason=DueReason.SCHEDULE)
    return set(due.values_list("key", flat=True))


# --- wake: the contract's table -------------------------------------------------------------------


def test_wake_without_key_now_nudges_every_enabled_agent(wire: Wire, ops: Agent) -> None:
    Agent.objects.create(id="off", enabled=False)
    receipt = wire.payload("wake", {"mode": "now", "text": " hello "})
    event = SystemEvent.objects.get()
    assert receipt == {
        "ok": True,
        "mode": "now",
        "eventOutcome": "queued",
        "sessionKey": MAIN,
        "eventId": str(event.uid),
    }
    assert (event.text, event.source, event.external) == ("hello", "ws", False)
    assert texts(MAIN) == ["hello"]
    assert woken_now() == {MAIN, OPS}


def test_wake_without_key_now_nudges_only_the_selected_agent(wire: Wire, ops: Agent) -> None:
    receipt = wire.payload("wake", {"mode": "now", "text": "hello", "agentId": "ops"})
    assert receipt["sessionKey"] == OPS
    assert texts(OPS) == ["hello"]
    assert woken_now() == {OPS}


def test_wake_without_key_next_heartbeat_waits_for_the_schedule(wire: Wire, ops: Agent) -> None:
    receipt = wire.payload("wake", {"mode": "next-heartbeat", "text": "hello"})
    assert (receipt["sessionKey"], receipt["mode"]) == (MAIN, "next-heartbeat")
    assert texts(MAIN) == ["hello"]
    assert waiting_for_schedule() == {MAIN}
    assert woken_now() == set()


def test_wake_with_key_now_requests_that_sessions_heartbeat(wire: Wire, ops: Agent) -> None:
    receipt = wire.payload(
        "wake", {"mode": "now", "text": "hello", "sessionKey": "Discord:channel:123"}
    )
    assert receipt["sessionKey"] == CHANNEL
    assert texts(CHANNEL) == ["hello"]
    assert woken_now() == {CHANNEL}


def test_wake_with_the_main_key_next_heartbeat_waits_for_the_schedule(wire: Wire) -> None:
    wire.payload("wake", {"mode": "next-heartbeat", "text": "hello", "sessionKey": "main"})
    assert waiting_for_schedule() == {MAIN}


def test_wake_with_another_key_next_heartbeat_is_woken_at_once(wire: Wire) -> None:
    wire.payload("wake", {"mode": "next-heartbeat", "text": "hello", "sessionKey": CHANNEL})
    assert woken_now() == {CHANNEL}


def test_wake_next_heartbeat_with_the_schedule_off_wakes_at_once(wire: Wire) -> None:
    Agent.objects.filter(pk="main").update(heartbeat_every=timedelta(0))
    configuration.gateway.forget()
    configuration.gateway.forget()
    wire.payload("wake", {"mode": "next-heartbeat", "text": "hello"})
    assert woken_now() == {MAIN}


# --- wake: what it takes --------------------------------------------------------------------------


def test_the_same_wake_again_is_coalesced(wire: Wire) -> None:
    first, second = (wire.payload("wake", {"mode": "now", "text": "same"}) for _ in range(2))
    assert second == {**first, "eventOutcome": "coalesced"}
    assert SystemEvent.objects.count() == 1


def test_a_blank_key_is_no_key_and_other_params_are_passed_over(wire: Wire) -> None:
    params = {"mode": "now", "text": "hello", "sessionKey": "  ", "agentId": "", "more": [1]}
    assert wire.payload("wake", params)["sessionKey"] == MAIN


@pytest.mark.parametrize("text", ["", "  \n"])
def test_blank_text_is_answered_in_the_payload(untouched_wire: Wire, text: str) -> None:
    payload = untouched_wire.payload("wake", {"mode": "now", "text": text})
    assert payload == {"ok": False, "error": "text required"}


MODE = '("now" or "next-heartbeat")'


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mode": None}, f"invalid wake params: mode {MODE} required"),
        ({"mode": "later"}, f"invalid wake params: mode {MODE} required"),
        ({"mode": 1}, f"invalid wake params: mode {MODE} required"),
        ({"text": None}, "invalid wake params: text (string) required"),
        ({"text": 5}, "invalid wake params: text (string) required"),
        ({"sessionKey": ""}, "invalid wake params: sessionKey must be: non-empty string"),
        ({"sessionKey": 5}, "invalid wake params: sessionKey must be: non-empty string"),
        ({"agentId": ["ops"]}, "invalid wake params: agentId must be: string"),
        ({"sessionKey": "agent:ops"}, 'malformed session key "agent:ops"'),
        (
            {"sessionKey": "agent:ops:x"},
            'session key "agent:ops:x" targets agent "ops" but the default agent is "main"; '
            "cross-agent wake is not supported",
        ),
        ({"agentId": "nobody"}, 'unknown agent "nobody"'),
        ({"text": "x" * 65_537}, "text is 65537 bytes long; at most 65536 are allowed"),
        ({"text": "a\0b"}, "text contains a NUL character"),
    ],
)
def test_a_refused_wake_says_why_and_leaves_nothing(
    untouched_wire: Wire, changes: Json, message: str
) -> None:
    params = {"mode": "now", "text": "hello", **changes}
    error = untouched_wire.error("wake", {k: v for k, v in params.items() if v is not None})
    assert error == {"code": "INVALID_REQUEST", "message": message}


def test_a_key_of_another_agent_is_taken_when_it_is_selected(wire: Wire, ops: Agent) -> None:
    params = {"mode": "now", "text": "hello", "sessionKey": "agent:ops:x", "agentId": "ops"}
    assert wire.payload("wake", params)["sessionKey"] == "agent:ops:x"


def test_a_full_session_is_unavailable_for_a_while(gateway_url: str) -> None:
    GatewaySettings.objects.update(max_queued_events=1)
    configuration.gateway.forget()
    with connected(gateway_url) as wire:
        wire.payload("wake", {"mode": "now", "text": "one"})
        error = wire.error("wake", {"mode": "now", "text": "two"})
    assert (error["code"], error["retryable"], error["retryAfterMs"]) == (
        "UNAVAILABLE",
        True,
        10_000,
    )
    assert texts(MAIN) == ["one"]


@pytest.fixture
def broken_database(gateway_url: str, wire: Wire) -> Iterator[None]:
    """The events' table is away for the length of a test."""
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE wake_systemevent RENAME TO elsewhere")
        yield
        cursor.execute("ALTER TABLE elsewhere RENAME TO wake_systemevent")


@pytest.mark.usefixtures("broken_database")
def test_a_database_that_fails_is_unavailable_for_a_while(wire: Wire) -> None:
    for method, params in (("wake", {"mode": "now", "text": "x"}), ("health", {})):
        error = wire.error(method, params)
        assert (error["code"], error["retryable"], error["retryAfterMs"]) == (
            "UNAVAILABLE",
            True,
            5_000,
        )
        assert "wake_systemevent" not in error["message"]
    assert Session.objects.count() == 0


# --- system-event ---------------------------------------------------------------------------------

NODE = "Node: desk (10.0.0.2) · app 1.2.3 · last input {}s ago · mode local · reason {}"


def test_system_event_without_key_waits_in_the_main_session(wire: Wire, ops: Agent) -> None:
    payload = wire.payload("system-event", {"text": "hello"})
    assert (payload["ok"], payload["sessionKey"], payload["presence"]) == (True, MAIN, False)
    assert texts(MAIN) == ["hello"]
    assert waiting_for_schedule() == {MAIN}
    assert woken_now() == set()


def test_system_event_with_key_requests_that_sessions_heartbeat(wire: Wire) -> None:
    payload = wire.payload("system-event", {"text": "hello", "sessionKey": CHANNEL})
    assert payload["sessionKey"] == CHANNEL
    assert texts(CHANNEL) == ["hello"]
    assert woken_now() == {CHANNEL}


def test_a_presence_line_goes_to_the_main_session_whatever_its_key(wire: Wire) -> None:
    line = NODE.format(5, "launch")
    payload = wire.payload("system-event", {"text": line, "sessionKey": "agent:ops"})
    assert (payload["sessionKey"], payload["presence"]) == (MAIN, True)
    assert texts(MAIN) == [line]
    assert woken_now() == set()


def test_a_presence_line_is_an_event_only_when_it_is_news(wire: Wire) -> None:
    known = {"host": "desk", "ip": "10.0.0.2", "version": "1", "mode": "local"}

    def report(**fields: object) -> bool:
        count = SystemEvent.objects.count()
        params = {"deviceId": "D1", "text": f"Node: {known['host']} · {uuid4()}", **fields}
        payload = wire.payload("system-event", params)
        is_news = SystemEvent.objects.count() > count
        assert ("eventId" in payload) is is_news
        return is_news

    assert report(**known, reason="launch"), "first seen"
    assert not report(**known, reason="launch")
    assert not report(**known, reason="periodic")
    assert not report(**known, reason="Heartbeat")
    assert not report(lastInputSeconds=3)
    assert report(**known, reason="unlock")
    for field, value in (("host", "hut"), ("ip", "10.0.0.3"), ("version", "2"), ("mode", "x")):
        known[field] = value
        assert report(**known, reason="periodic"), field
        assert not report(**known, reason="periodic"), field
    assert report(deviceId="D2", **known), "another device"
    assert report(deviceId="D3", text="Node:", reason="periodic"), "first seen, without news"
    assert not report(deviceId="D3", text="Node:", reason="periodic")


def test_any_other_system_event_is_an_event_whatever_presence_says(wire: Wire) -> None:
    for text in ("one", "two"):
        assert "eventId" in wire.payload("system-event", {"text": text, "deviceId": "D1"})
    assert texts(MAIN) == ["one", "two"]


def test_a_presence_line_by_itself_is_understood(wire: Wire) -> None:
    assert "eventId" in wire.payload("system-event", {"text": NODE.format(5, "launch")})
    assert "eventId" not in wire.payload("system-event", {"text": NODE.format(65, "periodic")})
    (entry,) = wire.payload("system-presence")
    assert {name: entry[name] for name in ("host", "ip", "version", "mode", "reason")} == {
        "host": "desk",
        "ip": "10.0.0.2",
        "version": "1.2.3",
        "mode": "local",
        "reason": "periodic",
    }


def test_system_event_updates_presence(wire: Wire) -> None:
    params = {
        "text": "back at the desk",
        "deviceId": "D1",
        "instanceId": "i-1",
        "host": "desk",
        "platform": "linux",
        "lastInputSeconds": 2.5,
        "roles": ["operator"],
        "tags": [],
        "modelIdentifier": None,
    }
    assert wire.payload("system-event", params)["presence"] is True
    (entry,) = wire.payload("system-presence")
    assert abs(entry.pop("ts") - timezone.now().timestamp() * 1000) < 60_000
    assert entry == {
        "key": "d1",
        "deviceId": "D1",
        "instanceId": "i-1",
        "host": "desk",
        "ip": "",
        "version": "",
        "mode": "",
        "reason": "",
        "platform": "linux",
        "lastInputSeconds": 2.5,
        "roles": ["operator"],
        "tags": [],
        "text": "back at the desk",
    }


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "invalid system-event params: text (string) required"),
        ({"text": " "}, "text required"),
        ({"text": "x", "sessionKey": "agent:ops"}, 'malformed session key "agent:ops"'),
        (
            {"text": "x", "deviceId": "d", "sessionKey": "agent:ops"},
            'malformed session key "agent:ops"',
        ),
        (
            {"text": "Node: x", "host": "h" * 101},
            "invalid system-event params: host must be: "
            "string of at most 100 characters without NUL",
        ),
        (
            {"text": "Node: x", "tags": ["a\0"]},
            "invalid system-event params: tags[0] must be: "
            "string of at most 100 characters without NUL",
        ),
    ],
)
def test_a_refused_system_event_leaves_nothing(
    untouched_wire: Wire, params: Json, message: str
) -> None:
    assert untouched_wire.error("system-event", params)["message"].replace("[...]", "[0]") == (
        message
    )


def test_news_that_could_not_be_queued_is_news_again(gateway_url: str) -> None:
    GatewaySettings.objects.update(max_queued_events=1)
    configuration.gateway.forget()
    with connected(gateway_url) as wire:
        wire.payload("wake", {"mode": "now", "text": "one"})
        assert wire.error("system-event", {"text": "Node: desk"})["code"] == "UNAVAILABLE"
        assert PresenceEntry.objects.count() == 0
        SystemEvent.objects.all().delete()
        Session.objects.all().delete()
        assert "eventId" in wire.payload("system-event", {"text": "Node: desk"})


def test_the_same_news_from_two_connections_is_one_event(gateway_url: str) -> None:
    with connected(gateway_url) as one, connected(gateway_url) as other:
        for n in range(10):
            for at, wire in enumerate((one, other)):
                wire.ask("system-event", {"text": f"Node: {n} seen by {at}", "host": f"h{n}"})
        payloads = [wire.response()["payload"] for wire in (one, other) for _ in range(10)]
    assert sum("eventId" in payload for payload in payloads) == 10


# --- Heartbeats -----------------------------------------------------------------------------------


def _heartbeat(session: Session, age: int, status: HeartbeatStatus, **fields: object) -> None:
    started = timezone.now() - timedelta(seconds=age)
    Heartbeat.objects.create(
        run_id=uuid4(),
        session=session,
        reason=DueReason.WAKE,
        status=status,
        started_at=started,
        **fields,
    )


def test_last_heartbeat(wire: Wire) -> None:
    assert wire.call("last-heartbeat")["payload"] is None
    session = Session.objects.create(agent_id="main", key=CHANNEL)
    ended = timezone.now() - timedelta(seconds=10)
    _heartbeat(session, 60, HeartbeatStatus.FAILED, finished_at=ended, error="old")
    _heartbeat(session, 12, HeartbeatStatus.DELIVERED, finished_at=ended, reply="y" * 300)
    _heartbeat(session, 1, HeartbeatStatus.RUNNING)
    last = wire.payload("last-heartbeat")
    assert abs(last.pop("durationMs") - 2000) < 100
    assert last == {
        "ts": int(ended.timestamp() * 1000),
        "status": "delivered",
        "reason": "wake",
        "preview": "y" * 200,
        "sessionKey": CHANNEL,
    }


def test_set_heartbeats(wire: Wire) -> None:
    for enabled in (False, True):
        payload = wire.payload("set-heartbeats", {"enabled": enabled})
        assert abs(payload.pop("ts") - time.time() * 1000) < 60_000
        assert payload == {"ok": True, "enabled": enabled}
        assert GatewaySettings.objects.get().heartbeats_enabled is enabled
        assert wire.payload("health")["heartbeats"] == {"enabled": enabled}


@pytest.mark.parametrize("params", [{}, {"enabled": 1}, {"enabled": "false"}, {"enabled": None}])
def test_set_heartbeats_takes_only_a_boolean(untouched_wire: Wire, params: Json) -> None:
    assert untouched_wire.error("set-heartbeats", params) == {
        "code": "INVALID_REQUEST",
        "message": "invalid set-heartbeats params: enabled (boolean) required",
    }
    assert GatewaySettings.objects.get().heartbeats_enabled is True


# --- How things stand -----------------------------------------------------------------------------


def test_health_counts_the_queue(wire: Wire) -> None:
    for key, text in ((None, "a"), (None, "b"), (CHANNEL, "c"), ("dm:1", "d")):
        params = {"mode": "next-heartbeat", "text": text}
        wire.payload("wake", params if key is None else {**params, "sessionKey": key})
    SystemEvent.objects.filter(text="b").update(state=EventState.DEAD)
    Session.objects.filter(key=MAIN).update(queued=1)
    now = timezone.now()
    Session.objects.filter(key=CHANNEL).update(lease_token=uuid4(), lease_until=now)
    health = wire.payload("health")
    assert health["ok"] is True
    assert abs(health["ts"] - now.timestamp() * 1000) < 60_000
    assert health["durationMs"] >= 0
    assert health["defaultAgentId"] == "main"
    assert health["queue"] == {"queued": 3, "due": 1, "running": 1, "held": 0, "dead": 1}
    assert [agent["id"] for agent in health["agents"]] == ["main"]


def test_status(wire: Wire) -> None:
    wire.payload("wake", {"mode": "now", "text": "hello"})
    status = wire.payload("status")
    assert status["sessions"] == {"count": 1}
    assert status["queue"] == {"queued": 1, "due": 1, "running": 0, "held": 0, "dead": 0}
    assert status["lastHeartbeat"] is None
    assert isinstance(status["version"], str)
    assert status["uptimeMs"] > 0


def test_agents_list(wire: Wire, ops: Agent) -> None:
    Agent.objects.create(id="off", enabled=False)
    assert wire.payload("agents.list") == {
        "defaultId": "main",
        "mainKey": "main",
        "scope": "per-sender",
        "agents": [{"id": "main", "name": "Main"}, {"id": "ops", "name": "ops"}],
    }


# --- Who may, and what there is -------------------------------------------------------------------


@pytest.mark.parametrize(
    ("held", "method", "missing"),
    [
        ("operator.read", "health", None),
        ("operator.write", "health", None),
        ("operator.admin", "health", None),
        ("operator.read", "wake", "operator.write"),
        ("operator.write", "system-event", "operator.admin"),
        ("operator.write", "set-heartbeats", "operator.admin"),
        ("operator.approvals", "last-heartbeat", "operator.read"),
    ],
)
def test_scopes(untouched_gateway_url: str, held: str, method: str, missing: str | None) -> None:
    with connected(untouched_gateway_url, scopes=[held]) as wire:
        response = wire.call(method, {"mode": "now", "text": "x", "enabled": False})
    if missing is None:
        assert response["ok"] is True
        return
    assert response["error"] == {
        "code": "FORBIDDEN",
        "message": f"missing scope: {missing}",
        "details": {
            "code": "MISSING_SCOPE",
            "missingScope": missing,
            "requiredScopes": [missing],
        },
    }


def test_unknown_method(untouched_wire: Wire) -> None:
    for name in ("nonsense", "connect"):
        assert untouched_wire.error(name, {}) == {
            "code": "INVALID_REQUEST",
            "message": f"unknown method: {name}",
        }


def test_a_malformed_frame_is_answered_and_the_connection_stays(untouched_wire: Wire) -> None:
    frames: list[tuple[str | bytes | Json, str, str]] = [
        ("nonsense", "invalid", "not valid JSON"),
        ("[]", "invalid", "must be an object"),
        ("[" * 500_000, "invalid", "must be an object"),
        (b"{}", "invalid", "binary frames are not supported"),
        ({"type": "req", "method": "health"}, "invalid", "id (non-empty string) required"),
        ({"type": "req", "id": 5, "method": "x"}, "invalid", "id (non-empty string) required"),
        ({"type": "req", "id": "a"}, "a", "method (non-empty string) required"),
        ({"type": "event", "id": "b", "method": "x"}, "b", 'type ("req") required'),
        ({"id": "c", "method": 5}, "c", "method (non-empty string) required"),
    ]
    for frame, request_id, problem in frames:
        untouched_wire.send(frame)
        assert untouched_wire.response() == {
            "type": "res",
            "id": request_id,
            "ok": False,
            "error": {
                "code": "INVALID_REQUEST",
                "message": f"invalid request frame: {problem}",
            },
        }
    assert untouched_wire.payload("health")["ok"] is True


# --- Side by side ---------------------------------------------------------------------------------


@pytest.fixture
def gate(monkeypatch: pytest.MonkeyPatch) -> Iterator[threading.Event]:
    """A method `hold` that answers once the gate is open."""
    opened = threading.Event()

    def hold(params: Frame, caller: Caller) -> object:
        opened.wait(10)
        return "held"

    monkeypatch.setitem(METHODS, "hold", Method("hold", "operator.read", NoParams, hold))
    yield opened
    opened.set()


def test_a_slow_request_does_not_block_the_next(
    untouched_wire: Wire, gate: threading.Event
) -> None:
    slow = untouched_wire.ask("hold")
    assert untouched_wire.payload("health")["ok"] is True
    gate.set()
    assert untouched_wire.response_to(slow)["payload"] == "held"


def test_slow_requests_of_one_connection_leave_threads_for_others(
    untouched_wire: Wire, untouched_gateway_url: str, gate: threading.Event
) -> None:
    for _ in range(MAX_REQUESTS_IN_FLIGHT):
        untouched_wire.ask("hold")
    with connected(untouched_gateway_url) as other:
        assert other.payload("health")["ok"] is True


def test_requests_in_flight_are_bounded(untouched_wire: Wire, gate: threading.Event) -> None:
    held = {untouched_wire.ask("hold") for _ in range(MAX_REQUESTS_IN_FLIGHT)}
    error = untouched_wire.error("hold")
    assert (error["code"], error["retryable"], error["retryAfterMs"]) == ("UNAVAILABLE", True, 1000)
    gate.set()
    assert {untouched_wire.response()["id"] for _ in range(MAX_REQUESTS_IN_FLIGHT)} == held
    assert untouched_wire.payload("health")["ok"] is True


def test_a_defect_is_logged_and_not_shown(
    untouched_wire: Wire, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(params: Frame, caller: Caller) -> object:
        raise ZeroDivisionError("a secret detail")

    def unwritable(params: Frame, caller: Caller) -> object:
        return object()

    for name, function in (("broken", broken), ("unwritable", unwritable)):
        monkeypatch.setitem(METHODS, name, Method(name, "operator.read", NoParams, function))
        assert untouched_wire.error(name) == {
            "code": "UNAVAILABLE",
            "message": "internal error; the gateway's log has more",
        }
    assert "a secret detail" in caplog.text
    assert untouched_wire.payload("health")["ok"] is True
