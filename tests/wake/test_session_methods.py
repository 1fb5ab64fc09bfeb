"""What clients read of sessions, over a real socket: lists, keys, histories, the last hour."""

from __future__ import annotations

from collections.abc import Iterator
from datetime import datetime, timedelta
from typing import Any, get_args
from uuid import UUID, uuid4

import pytest
from django.db import connection
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from tests.claims import terms
from tests.wake.gateway_server import Json, Wire
from wake import activity, configuration, queue
from wake.dispatch import Mode, Receipt, Turn, WakeRequest, dispatch
from wake.gateway import records
from wake.gateway.methods import sessions as methods
from wake.models import (
    Agent,
    GatewaySettings,
    Heartbeat,
    HeartbeatStatus,
    RunnerKind,
    Session,
    SystemEvent,
)
from wake.session_states import SessionState

MAIN = "agent:main:main"
CHANNEL = "agent:main:discord:channel:123"
LEASE = timedelta(seconds=15)


def milliseconds(moment: datetime | None) -> int | None:
    return int(moment.timestamp() * 1000) if moment else None


def send(text: str, key: str | None = CHANNEL, **more: Any) -> Receipt:
    return dispatch(WakeRequest(text, "cli", session_key=key, **more))


def claim(agent: str = "main", *, after: timedelta = timedelta(0)) -> queue.Claim:
    now = timezone.now() + after
    (taken,) = queue.claim(terms(agent), limit=1, owner="test", now=now, lease=LEASE)
    return taken


def deliver(reply: str = "Looked at it.", prompt: str = "the prompt") -> queue.Claim:
    taken = claim()
    queue.settle(taken, HeartbeatStatus.DELIVERED, now=timezone.now(), prompt=prompt, reply=reply)
    return taken


def set_agent(agent_id: str = "main", **fields: object) -> None:
    Agent.objects.filter(pk=agent_id).update(**fields)
    configuration.gateway.forget()


@pytest.fixture
def running_agent(transactional_db: None) -> None:
    """The agent `main` has a runner, so that its sessions need not wait for one."""
    GatewaySettings.ensure()
    set_agent(runner=RunnerKind.COMMAND, command=["true"])


# --- sessions.list --------------------------------------------------------------------------------


def keys(payload: Json) -> list[str]:
    return [row["key"] for row in payload["sessions"]]


def test_no_sessions(wire: Wire) -> None:
    payload = wire.payload("sessions.list")
    assert abs(payload.pop("ts") - timezone.now().timestamp() * 1000) < 60_000
    assert payload == {
        "count": 0,
        "totalCount": 0,
        "hasMore": False,
        "nextOffset": None,
        "sessions": [],
    }


def test_a_row_says_what_there_is_to_know_of_a_session(wire: Wire) -> None:
    send("one")
    run = deliver("y" * 300)
    send("two")
    (row,) = wire.payload("sessions.list")["sessions"]
    session, heartbeat = Session.objects.get(), Heartbeat.objects.get()
    assert heartbeat.duration is not None
    assert row == {
        "key": CHANNEL,
        "agentId": "main",
        "queued": 1,
        "dead": 0,
        "running": False,
        "state": "waiting",
        "holdReason": "agent main has no runner",
        "dueAt": milliseconds(session.due_at),
        "dueReason": "wake",
        "attempts": 0,
        "lastEventAt": milliseconds(session.last_event_at),
        "lastHeartbeat": {
            "runId": str(run.run_id),
            "ts": milliseconds(heartbeat.finished_at),
            "status": "delivered",
            "reason": "wake",
            "preview": "y" * 200,
            "durationMs": int(heartbeat.duration.total_seconds() * 1000),
        },
    }


@pytest.mark.usefixtures("running_agent")
def test_a_heartbeat_that_runs_is_the_last_one(wire: Wire) -> None:
    send("one")
    deliver()
    send("two")
    run = claim()
    (row,) = wire.payload("sessions.list")["sessions"]
    assert (row["running"], row["state"], row["holdReason"]) == (True, "running", None)
    assert (row["queued"], row["dueAt"], row["dueReason"], row["attempts"]) == (1, None, "", 1)
    assert row["lastHeartbeat"] == {
        "runId": str(run.run_id),
        "ts": milliseconds(Heartbeat.objects.get(run_id=run.run_id).started_at),
        "status": "running",
        "reason": "wake",
        "preview": "",
        "durationMs": None,
    }


def test_the_preview_of_a_failure_is_its_error(wire: Wire) -> None:
    send("one")
    queue.fail(claim(), "exit status 1", now=timezone.now(), max_attempts=1)
    (row,) = wire.payload("sessions.list")["sessions"]
    assert (row["dead"], row["queued"]) == (1, 0)
    assert row["lastHeartbeat"]["preview"] == "exit status 1"


def test_a_session_without_anything_has_a_row_too(wire: Wire) -> None:
    Session.objects.create(agent_id="main", key=MAIN)
    (row,) = wire.payload("sessions.list")["sessions"]
    assert row == {
        "key": MAIN,
        "agentId": "main",
        "queued": 0,
        "dead": 0,
        "running": False,
        "state": "idle",
        "holdReason": None,
        "dueAt": None,
        "dueReason": "",
        "attempts": 0,
        "lastEventAt": None,
        "lastHeartbeat": None,
    }


@pytest.fixture
def one_of_each(running_agent: None) -> dict[str, str]:
    """A session in each state; returns their keys by state."""
    named = {state: f"agent:main:{state}" for state in ("running", "backing-off", "dead", "idle")}
    send("runs", named["running"])
    claim()
    send("fails", named["backing-off"])
    queue.fail(claim(), "no", now=timezone.now(), max_attempts=8)
    send("dies", named["dead"])
    queue.fail(claim(), "no", now=timezone.now(), max_attempts=1)
    send("done", named["idle"])
    deliver()
    named["due"] = send("due", "agent:main:due").session_key
    named["scheduled"] = send("waits", None, mode=Mode.NEXT_HEARTBEAT).session_key
    Agent.objects.create(id="ops", paused=True, runner=RunnerKind.COMMAND, command=["true"])
    configuration.gateway.forget()
    named["waiting"] = send("held", "agent:ops:x", agent_id="ops").session_key
    return named


def test_a_list_of_one_state(wire: Wire, one_of_each: dict[str, str]) -> None:
    every = wire.payload("sessions.list")
    states = {row["key"]: row["state"] for row in every["sessions"]}
    # What died leaves nothing to do.
    assert states == {
        key: "idle" if state == "dead" else state for state, key in one_of_each.items()
    }
    held = {row["key"]: row["holdReason"] for row in every["sessions"] if row["holdReason"]}
    assert held == {"agent:ops:x": "agent ops is paused"}
    for state, key in one_of_each.items():
        listed = wire.payload("sessions.list", {"state": state})
        expected = {key, one_of_each["dead"]} if state == "idle" else {key}
        assert set(keys(listed)) == expected, state
        assert listed["totalCount"] == len(expected), state


def test_the_states_of_a_list_are_those_of_sessions_and_dead() -> None:
    assert get_args(methods._ListedState) == (*SessionState.values, "dead")


def test_the_newest_event_comes_first_then_the_newest_session(wire: Wire) -> None:
    for name in ("old", "older"):
        Session.objects.create(agent_id="main", key=f"agent:main:{name}")
    for text, name in (("1", "a"), ("2", "b"), ("3", "a")):
        send(text, f"agent:main:{name}")
    names = [key.rsplit(":")[-1] for key in keys(wire.payload("sessions.list"))]
    assert names == ["a", "b", "older", "old"]


def test_a_list_comes_in_pages(wire: Wire) -> None:
    for n in range(7):
        Session.objects.create(agent_id="main", key=f"agent:main:{n}")
    pages = [wire.payload("sessions.list", {"limit": 3, "offset": n}) for n in (0, 3, 6, 9)]
    assert [page["count"] for page in pages] == [3, 3, 1, 0]
    assert [page["totalCount"] for page in pages] == [7, 7, 7, 7]
    assert [page["hasMore"] for page in pages] == [True, True, False, False]
    assert [page["nextOffset"] for page in pages] == [3, 6, None, None]
    found = [key for page in pages for key in keys(page)]
    assert found == [f"agent:main:{n}" for n in range(6, -1, -1)]
    assert wire.payload("sessions.list", {"limit": 7})["hasMore"] is False
    Session.objects.bulk_create(
        Session(agent_id="main", key=f"agent:main:more:{n}") for n in range(50)
    )
    assert wire.payload("sessions.list")["count"] == 50


def test_a_search_is_for_a_part_of_the_key_as_it_is_written(wire: Wire) -> None:
    names = ("one%two", "one_two", "onextwo", "matrix:channel:!Room:Example.org", "grün", "a\\b")
    for name in names:
        Session.objects.create(agent_id="main", key=f"agent:main:{name}")
    for search, expected in {
        "e%t": {"one%two"},
        "E_T": {"one_two"},
        "two": {"one%two", "one_two", "onextwo"},
        "!room:EXAMPLE": {"matrix:channel:!Room:Example.org"},
        "GRÜN": {"grün"},
        "\\": {"a\\b"},
        "'": set(),
        " onex ": {"onextwo"},
        "  ": set(names),
    }.items():
        found = wire.payload("sessions.list", {"search": search})
        assert {key.removeprefix("agent:main:") for key in keys(found)} == expected, search
        assert found["totalCount"] == len(expected)


def test_a_list_of_one_agent_which_may_be_disabled(wire: Wire) -> None:
    Agent.objects.create(id="ops", enabled=False)
    configuration.gateway.forget()
    for agent, name in (("main", "x"), ("main", "y"), ("ops", "x")):
        Session.objects.create(agent_id=agent, key=f"agent:{agent}:{name}")
    assert keys(wire.payload("sessions.list", {"agentId": " OPS "})) == ["agent:ops:x"]
    both = {"agentId": "main", "search": ":x"}
    assert keys(wire.payload("sessions.list", both)) == ["agent:main:x"]
    assert len(keys(wire.payload("sessions.list", {"agentId": ""}))) == 3


STATES = (
    '"running" or "waiting" or "held" or "backing-off" or "due" or "scheduled" or "idle" or "dead"'
)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"limit": 0}, "invalid sessions.list params: limit must be: integer from 1 to 200"),
        ({"limit": 201}, "invalid sessions.list params: limit must be: integer from 1 to 200"),
        ({"limit": "5"}, "invalid sessions.list params: limit must be: integer from 1 to 200"),
        (
            {"offset": -1},
            "invalid sessions.list params: offset must be: integer from 0 to 1000000000",
        ),
        (
            {"offset": 2**70},
            "invalid sessions.list params: offset must be: integer from 0 to 1000000000",
        ),
        (
            {"search": "x" * 513},
            "invalid sessions.list params: search must be: "
            "string of at most 512 characters without NUL",
        ),
        (
            {"search": "a\0b"},
            "invalid sessions.list params: search must be: "
            "string of at most 512 characters without NUL",
        ),
        ({"agentId": 1}, "invalid sessions.list params: agentId must be: string"),
        ({"agentId": "nobody"}, 'unknown agent "nobody"'),
        ({"state": "dying"}, f"invalid sessions.list params: state must be: {STATES}"),
    ],
)
def test_a_list_that_is_refused(untouched_wire: Wire, params: Json, message: str) -> None:
    error = untouched_wire.error("sessions.list", params)
    # The order of the choices is the library's.
    assert error["code"] == "INVALID_REQUEST"
    assert sorted(error["message"].split()) == sorted(message.split())


# --- sessions.resolve -----------------------------------------------------------------------------


def test_resolving_a_key(wire: Wire) -> None:
    Agent.objects.create(id="ops")
    configuration.gateway.forget()
    cases: list[tuple[Json, str, str, bool]] = [
        ({"key": " Discord:channel:123 "}, CHANNEL, "main", False),
        ({"key": "agent:main:MAIN"}, MAIN, "main", True),
        ({"key": "main"}, MAIN, "main", True),
        ({"key": "  "}, MAIN, "main", True),
        ({"key": " ", "agentId": "ops"}, "agent:ops:main", "ops", True),
        ({"key": "agent:ops:x", "agentId": "OPS"}, "agent:ops:x", "ops", False),
    ]
    for exists in (False, True):
        for params, key, agent, is_main in cases:
            assert wire.payload("sessions.resolve", params) == {
                "ok": True,
                "key": key,
                "agentId": agent,
                "exists": exists,
                "isMain": is_main,
            }
        if not exists:
            assert Session.objects.count() == 0, "it makes nothing"
            for key, agent in {(key, agent) for _, key, agent, _ in cases}:
                Session.objects.create(agent_id=agent, key=key)


def test_under_the_global_scope_every_key_is_the_agents_one_session(wire: Wire) -> None:
    GatewaySettings.objects.update(scope=GatewaySettings.Scope.GLOBAL)
    Agent.objects.create(id="ops")
    configuration.gateway.forget()
    Session.objects.create(agent_id="ops", key="global")
    resolved = wire.payload("sessions.resolve", {"key": "hook:x"})
    assert (resolved["key"], resolved["exists"], resolved["isMain"]) == ("global", False, True)
    resolved = wire.payload("sessions.resolve", {"key": "hook:x", "agentId": "ops"})
    assert (resolved["key"], resolved["exists"], resolved["isMain"]) == ("global", True, True)


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "invalid sessions.resolve params: key (non-empty string) required"),
        ({"key": ""}, "invalid sessions.resolve params: key (non-empty string) required"),
        ({"key": 1}, "invalid sessions.resolve params: key (non-empty string) required"),
        (
            {"key": "x", "agentId": None},
            "invalid sessions.resolve params: agentId must be: string",
        ),
        ({"key": "agent:ops"}, 'malformed session key "agent:ops"'),
        ({"key": "a b"}, 'session key "a b" contains whitespace'),
        ({"key": "a\0b"}, 'session key "a\\x00b" contains a control character (U+0000)'),
        (
            {"key": "agent:ops:x"},
            'session key "agent:ops:x" targets agent "ops" but the default agent is "main"; '
            "cross-agent wake is not supported",
        ),
        ({"key": "x", "agentId": "nobody"}, 'unknown agent "nobody"'),
    ],
)
def test_a_key_that_is_refused(untouched_wire: Wire, params: Json, message: str) -> None:
    error = untouched_wire.error("sessions.resolve", params)
    assert error == {"code": "INVALID_REQUEST", "message": message}


def test_a_disabled_agents_key_is_refused_as_a_wake_is(wire: Wire) -> None:
    Agent.objects.create(id="ops", enabled=False)
    configuration.gateway.forget()
    for method in ("sessions.resolve", "wake"):
        params = {"key": "x", "agentId": "ops", "mode": "now", "text": "x", "sessionKey": "x"}
        assert wire.error(method, params)["message"] == 'agent "ops" is disabled'


# --- sessions.history -----------------------------------------------------------------------------


def history(wire: Wire, **params: object) -> Json:
    payload: Json = wire.payload("sessions.history", {"key": CHANNEL, **params})
    return payload


def test_a_history_holds_events_and_heartbeats_the_newest_first(wire: Wire) -> None:
    receipts = [send("one"), send("two", external=True)]
    run = deliver("Looked at it.")
    receipts.append(send("three"))
    send("elsewhere", "agent:main:other")
    found = history(wire)
    assert (found["key"], found["agentId"]) == (CHANNEL, "main")
    assert (found["hasMore"], found["before"]) == (False, None)
    assert found["session"]["queued"] == 1
    assert found["session"]["lastHeartbeat"]["runId"] == str(run.run_id)
    heartbeat = Heartbeat.objects.get()
    one, two, three = SystemEvent.objects.filter(session__key=CHANNEL).order_by("pk")
    assert [item["id"] for item in found["items"]] == [
        str(receipts[2].event_id),
        str(run.run_id),
        str(receipts[1].event_id),
        str(receipts[0].event_id),
    ]
    assert found["items"][0] == {
        "kind": "event",
        "id": str(three.uid),
        "ts": milliseconds(three.created_at),
        "text": "three",
        "source": "cli",
        "external": False,
        "state": "queued",
        "settledAt": None,
        "runId": None,
        "turn": None,
    }
    assert heartbeat.duration is not None
    assert found["items"][1] == {
        "kind": "heartbeat",
        "id": str(run.run_id),
        "ts": milliseconds(heartbeat.started_at),
        "status": "delivered",
        "reason": "wake",
        "attempt": 1,
        "eventCount": 2,
        "finishedAt": milliseconds(heartbeat.finished_at),
        "durationMs": int(heartbeat.duration.total_seconds() * 1000),
        "reply": "Looked at it.",
        "replyCut": False,
        "error": "",
        "eventIds": [str(one.uid), str(two.uid)],
    }
    assert found["items"][2] == {
        "kind": "event",
        "id": str(two.uid),
        "ts": milliseconds(two.created_at),
        "text": "two",
        "source": "cli",
        "external": True,
        "state": "delivered",
        "settledAt": milliseconds(two.settled_at),
        "runId": str(run.run_id),
        "turn": None,
    }


def test_a_heartbeat_that_runs_has_settled_nothing(wire: Wire) -> None:
    send("one")
    claim()
    item = history(wire)["items"][0]
    assert (item["kind"], item["status"], item["eventCount"]) == ("heartbeat", "running", 1)
    assert (item["finishedAt"], item["durationMs"], item["eventIds"]) == (None, None, [])


def test_what_became_of_events(wire: Wire) -> None:
    send("dies")
    run = claim()
    queue.fail(run, "exit status 1", now=timezone.now(), max_attempts=1)
    item, event = history(wire)["items"]
    assert (item["status"], item["error"], item["eventIds"]) == (
        "failed",
        "exit status 1",
        [event["id"]],
    )
    assert (event["state"], event["runId"]) == ("dead", str(run.run_id))
    queue.discard([SystemEvent.objects.get().pk], now=timezone.now())
    assert history(wire)["items"][1]["state"] == "discarded"


def test_a_turn_of_its_own_is_named(wire: Wire) -> None:
    receipt = send("do this", turn=Turn("Nightly report"))
    run = deliver()
    heartbeat, event = history(wire)["items"]
    assert event["turn"] == "Nightly report"
    assert heartbeat["id"] == event["id"] == event["runId"] == str(receipt.event_id)
    assert run.run_id == receipt.event_id


def test_a_long_reply_is_cut_until_it_is_asked_for(wire: Wire) -> None:
    for length, is_cut in ((4000, False), (4001, True)):
        reply = "ü" * length
        send("one")
        run = deliver(reply)
        item = history(wire)["items"][0]
        assert (item["reply"], item["replyCut"]) == (reply[:4000], is_cut)
        whole = wire.payload("heartbeats.get", {"runId": str(run.run_id)})
        assert (whole["reply"], whole["replyCut"]) == (reply, False)


def test_a_history_comes_in_pages_and_nothing_is_lost_or_told_twice(wire: Wire) -> None:
    for n in range(6):
        send(f"number {n}")
        if n % 3:
            deliver()
    for limit in (1, 4, 99):
        expected = [item["id"] for item in history(wire, limit=100)["items"]]
        found: list[str] = []
        before = ""
        while before is not None:
            page = history(wire, limit=limit, before=before)
            found += [item["id"] for item in page["items"]]
            assert len(found) <= len(expected)
            before = page["before"]
            assert page["hasMore"] is (before is not None)
            assert len(page["items"]) == limit or not page["hasMore"]
            # What comes in the meantime is newer than any page.
            send(str(uuid4()))
        assert found == expected


def test_a_clock_that_was_set_back_hides_nothing(wire: Wire) -> None:
    sent = []
    for n, hours in enumerate((0, -2, 1, -3)):
        sent.append(str(send(f"number {n}").event_id))
        deliver()
        at = timezone.now() + timedelta(hours=hours)
        SystemEvent.objects.filter(text=f"number {n}").update(created_at=at)
        Heartbeat.objects.filter(events__text=f"number {n}").update(started_at=at)
    found: list[str] = []
    page: Json = {"before": ""}
    while page["before"] is not None:
        page = history(wire, limit=1, before=page["before"])
        found += [item["id"] for item in page["items"] if item["kind"] == "event"]
        assert len(found) <= len(sent)
    assert found == sent[::-1]


def test_a_history_of_a_session_that_does_not_exist(wire: Wire) -> None:
    assert history(wire, key="hook:Nobody") == {
        "key": "agent:main:hook:nobody",
        "agentId": "main",
        "session": None,
        "items": [],
        "hasMore": False,
        "before": None,
    }
    assert Session.objects.count() == 0


def test_whose_history_a_key_means(wire: Wire) -> None:
    Agent.objects.create(id="ops")
    configuration.gateway.forget()
    send("for ops", "agent:ops:x", agent_id="ops")
    send("for main", None)
    set_agent("ops", enabled=False)
    assert [item["text"] for item in history(wire, key="agent:ops:x")["items"]] == ["for ops"]
    assert [i["text"] for i in history(wire, key="x", agentId="OPS")["items"]] == ["for ops"]
    assert [item["text"] for item in history(wire, key=" ")["items"]] == ["for main"]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"key": None}, "invalid sessions.history params: key (non-empty string) required"),
        ({"key": ""}, "invalid sessions.history params: key (non-empty string) required"),
        ({"limit": 0}, "invalid sessions.history params: limit must be: integer from 1 to 100"),
        ({"limit": 101}, "invalid sessions.history params: limit must be: integer from 1 to 100"),
        ({"before": 5}, "invalid sessions.history params: before must be: string"),
        (
            {"before": "yesterday"},
            "invalid sessions.history params: before must be: that of the previous page",
        ),
        (
            {"before": "e1h1x"},
            "invalid sessions.history params: before must be: that of the previous page",
        ),
        (
            {"before": f"e{10**30}h1"},
            "invalid sessions.history params: before must be: that of the previous page",
        ),
        ({"key": "agent:nobody:x"}, 'unknown agent "nobody"'),
        ({"agentId": "nobody"}, 'unknown agent "nobody"'),
        ({"key": "agent:ops"}, 'malformed session key "agent:ops"'),
        (
            {"key": "agent:ops:x", "agentId": "main"},
            'session key "agent:ops:x" targets agent "ops" but the selected agent is "main"; '
            "cross-agent wake is not supported",
        ),
    ],
)
def test_a_history_that_is_refused(untouched_wire: Wire, params: Json, message: str) -> None:
    error = untouched_wire.error("sessions.history", {"key": "x", **params})
    assert error == {"code": "INVALID_REQUEST", "message": message}


# --- heartbeats.get -------------------------------------------------------------------------------


def test_a_whole_heartbeat(wire: Wire) -> None:
    receipt = send("one")
    run = deliver("Looked at it.", prompt="p" * 5000)
    item = history(wire)["items"][0]
    assert wire.payload("heartbeats.get", {"runId": str(run.run_id)}) == {
        **item,
        "sessionKey": CHANNEL,
        "agentId": "main",
        "prompt": "p" * 5000,
    }
    assert item["eventIds"] == [str(receipt.event_id)]


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({}, "invalid heartbeats.get params: runId (non-empty string) required"),
        ({"runId": ""}, "invalid heartbeats.get params: runId (non-empty string) required"),
        ({"runId": 7}, "invalid heartbeats.get params: runId (non-empty string) required"),
        ({"runId": "x" * 200}, f"unknown run: {'x' * 100}"),
        ({"runId": str(UUID(int=7))}, f"unknown run: {UUID(int=7)}"),
    ],
)
def test_a_heartbeat_that_is_not_there(untouched_wire: Wire, params: Json, message: str) -> None:
    error = untouched_wire.error("heartbeats.get", params)
    assert error == {"code": "INVALID_REQUEST", "message": message}


# --- activity -------------------------------------------------------------------------------------


@pytest.fixture
def _no_minutes_held() -> Iterator[None]:
    activity.forget()
    yield
    activity.forget()


@pytest.mark.usefixtures("_no_minutes_held")
def test_activity(wire: Wire) -> None:
    send("one")
    deliver()
    send("two")
    payload = wire.payload("activity", {"minutes": 5})
    now = milliseconds(timezone.now())
    assert now is not None
    assert 0 <= now - payload["ts"] < 60_000
    starts = [minute["ts"] for minute in payload["minutes"]]
    assert starts == [starts[0] + n * 60_000 for n in range(5)]
    assert starts[-1] == payload["ts"] // 60_000 * 60_000
    # A minute may have ended between what was sent.
    totals = {
        name: sum(minute[name] for minute in payload["minutes"])
        for name in ("queued", "delivered", "dead")
    }
    assert totals == {"queued": 2, "delivered": 1, "dead": 0}
    assert payload["minutes"][-1]["depth"] == 1
    assert set(payload["minutes"][0]) == {
        "ts",
        "queued",
        "delivered",
        "dead",
        "depth",
        "deliveryMs",
    }
    assert payload["minutes"][0]["deliveryMs"] is None
    (times,) = [minute["deliveryMs"] for minute in payload["minutes"] if minute["deliveryMs"]]
    assert 0 <= times["median"] == times["p95"] < 10_000


@pytest.mark.usefixtures("_no_minutes_held")
def test_activity_is_of_an_hour_unless_asked_otherwise(wire: Wire) -> None:
    assert len(wire.payload("activity")["minutes"]) == 60
    assert len(wire.payload("activity", {"minutes": 180})["minutes"]) == 180


@pytest.mark.parametrize("minutes", [4, 181, "60", 7.5])
def test_activity_that_is_refused(untouched_wire: Wire, minutes: object) -> None:
    assert untouched_wire.error("activity", {"minutes": minutes}) == {
        "code": "INVALID_REQUEST",
        "message": "invalid activity params: minutes must be: integer from 5 to 180",
    }


# --- What it costs --------------------------------------------------------------------------------


@pytest.mark.django_db
def test_many_rows_take_as_few_queries_as_one_and_no_prompts() -> None:
    for n in range(12):
        send(f"number {n}", f"agent:main:{n}")
        deliver()
    runs, events = Heartbeat.objects.order_by("pk"), SystemEvent.objects.order_by("pk")
    pks = list(Session.objects.values_list("pk", flat=True))
    with CaptureQueriesContext(connection) as queries:
        assert len(records.session_rows(pks, timezone.now())) == 12
        assert len(records.heartbeat_items(runs)) == 12
        assert len(records.event_items(events)) == 12
    of_configuration = [query for query in queries if "gatewaysettings" in query["sql"]]
    assert len(queries) - 2 * len(of_configuration) == 2 + 2 + 1
    assert not [query["sql"] for query in queries if '"prompt"' in query["sql"]]


@pytest.mark.django_db
def test_records_of_nothing() -> None:
    assert records.session_rows([7], timezone.now()) == {}
    assert records.heartbeat_items(Heartbeat.objects.all()[:5]) == {}
    assert records.event_items(SystemEvent.objects.all()[:5]) == {}
