"""What a connection is told by itself: events of the protocol, over real sockets."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any
from urllib.parse import urlsplit
from uuid import uuid4

import pytest
from django.db import connection, transaction
from django.utils import timezone
from hypothesis import given
from hypothesis import strategies as st
from websockets.exceptions import ConnectionClosed

from tests.claims import terms
from tests.live import ROOT, LiveGateway
from tests.wake.gateway_server import Json, Wire, connect_params, connected, serving
from wake import doorbell, queue, status
from wake.gateway import presence
from wake.gateway.changes import GAP_SECONDS, Cursor, Follower
from wake.gateway.connection import Connection
from wake.models import (
    Agent,
    EventState,
    GatewaySettings,
    HeartbeatStatus,
    PresenceEntry,
    Session,
    SystemEvent,
)
from wake.session_keys import SessionKey

KEY = "agent:main:hook:x"
LEASE = timedelta(seconds=15)


def wake(wire: Wire, text: str, key: str = "hook:x") -> Json:
    receipt: Json = wire.payload("wake", {"mode": "now", "text": text, "sessionKey": key})
    return receipt


def named_change(wire: Wire) -> Json:
    changed = wire.event("sessions.changed")
    assert changed["reason"] != "many"
    return changed


def next_claim() -> queue.Claim:
    (claim,) = queue.claim(terms("main"), limit=1, owner="test", now=timezone.now(), lease=LEASE)
    return claim


@pytest.fixture
def listener(gateway_url: str) -> Iterator[Wire]:
    with connected(gateway_url) as wire:
        wire.payload("sessions.subscribe")
        wire.payload("sessions.messages.subscribe", {"key": KEY})
        yield wire


# --- Sessions -------------------------------------------------------------------------------------


def test_a_new_event_is_told_to_those_who_follow(listener: Wire, wire: Wire) -> None:
    receipt = wake(wire, "hello")
    changed = named_change(listener)
    assert (changed["sessionKey"], changed["reason"]) == (KEY, "event")
    assert changed["session"]["queued"] == 1
    assert changed["session"]["state"] == "waiting", "agent main has no runner"

    second = wake(wire, "and again")
    message = listener.event("session.message")
    assert (message["sessionKey"], message["agentId"]) == (KEY, "main")
    assert message["item"]["kind"] == "event"
    assert message["item"]["id"] in {receipt["eventId"], second["eventId"]}


def test_a_message_holds_the_event_and_comes_once(listener: Wire, wire: Wire) -> None:
    receipts = [wake(wire, f"number {n}")["eventId"] for n in range(5)]
    told = [listener.event("session.message")["item"] for _ in receipts]
    assert [item["id"] for item in told] == receipts
    assert [item["text"] for item in told] == [f"number {n}" for n in range(5)]
    listener.payload("health")
    wake(wire, "last")
    assert listener.event("session.message")["item"]["text"] == "last", "none came twice"


def test_runs_are_told_at_their_start_and_at_their_end(listener: Wire, wire: Wire) -> None:
    wake(wire, "hello")
    claim = next_claim()
    began = listener.event("heartbeat")
    assert (began["status"], began["sessionKey"], began["agentId"]) == ("running", KEY, "main")
    assert (began["runId"], began["eventCount"], began["durationMs"]) == (
        str(claim.run_id),
        1,
        None,
    )
    queue.settle(claim, HeartbeatStatus.DELIVERED, now=timezone.now(), reply="done", prompt="p")
    ended = listener.event("heartbeat")
    assert (ended["runId"], ended["status"], ended["preview"]) == (
        str(claim.run_id),
        "delivered",
        "done",
    )
    assert ended["durationMs"] >= 0


def test_a_run_that_began_and_ended_between_two_looks_is_told_as_both(
    listener: Wire, wire: Wire
) -> None:
    wake(wire, "hello")
    listener.event("session.message")
    claim = next_claim()
    queue.settle(claim, HeartbeatStatus.QUIET, now=timezone.now(), reply="HEARTBEAT_OK")
    assert listener.event("heartbeat")["status"] == "running"
    assert listener.event("heartbeat")["status"] == "quiet"


def test_the_end_of_a_run_names_the_events_that_it_settled(listener: Wire, wire: Wire) -> None:
    receipt = wake(wire, "hello")
    claim = next_claim()
    queue.settle(claim, HeartbeatStatus.DELIVERED, now=timezone.now(), reply="done")
    while (item := listener.event("session.message")["item"])["kind"] != "heartbeat" or not item[
        "finishedAt"
    ]:
        pass
    assert (item["id"], item["status"], item["reply"]) == (str(claim.run_id), "delivered", "done")
    assert item["eventIds"] == [receipt["eventId"]]


def test_what_an_operator_does_by_hand_is_told(listener: Wire, wire: Wire) -> None:
    wake(wire, "hello")
    claim = next_claim()
    queue.fail(claim, "no", now=timezone.now(), max_attempts=1)
    while named_change(listener)["session"]["dead"] != 1:
        pass
    dead = list(SystemEvent.objects.filter(state=EventState.DEAD).values_list("pk", flat=True))
    queue.requeue(dead, now=timezone.now())
    while (session := named_change(listener)["session"])["dead"] != 0:
        pass
    assert session["queued"] == 1
    claim = next_claim()
    queue.fail(claim, "no", now=timezone.now(), max_attempts=1)
    while named_change(listener)["session"]["dead"] != 1:
        pass
    queue.discard(dead, now=timezone.now())
    while named_change(listener)["session"]["dead"] != 0:
        pass


def test_work_by_hand_that_nobody_named_is_told_as_many(listener: Wire, wire: Wire) -> None:
    """As it is on SQLite when it was done in another process, or of too many to name."""
    wake(wire, "hello")
    queue.fail(next_claim(), "no", now=timezone.now(), max_attempts=1)
    while listener.event("health")["queue"]["dead"] != 1:
        pass
    with transaction.atomic():
        SystemEvent.objects.update(state=EventState.DISCARDED)
        doorbell.ring()
    while listener.event("sessions.changed")["reason"] != "many":
        pass


def test_pausing_an_agent_says_that_many_sessions_changed(listener: Wire) -> None:
    agent = Agent.objects.get(pk="main")
    agent.paused = True
    agent.save()
    while listener.event("sessions.changed")["reason"] != "many":
        pass


def test_more_changes_than_are_worth_telling_one_by_one(listener: Wire) -> None:
    from wake.dispatch import WakeRequest, dispatch_batch

    dispatch_batch([WakeRequest("x", "test", session_key=f"hook:{n}") for n in range(80)])
    assert "session" not in listener.event("sessions.changed")


def test_nothing_is_told_to_those_who_did_not_ask(gateway_url: str, listener: Wire) -> None:
    with connected(gateway_url) as quiet, connected(gateway_url) as left:
        for name, params in (("sessions", {}), ("sessions.messages", {"key": KEY})):
            assert left.payload(f"{name}.subscribe", params)["subscribed"] is True
            assert left.payload(f"{name}.unsubscribe", params)["subscribed"] is False
        quiet.payload("sessions.messages.subscribe", {"key": "hook:other"})
        wake(quiet, "hello")
        listener.event("session.message")
        queue.settle(next_claim(), HeartbeatStatus.DELIVERED, now=timezone.now())
        for wire in (quiet, left):
            names = set[str | None]()
            while not names & {"heartbeat"}:
                names.add(wire.receive().get("event"))
            assert not names & {"sessions.changed", "session.message"}


def test_a_session_of_another_agent_is_followed_by_its_key_alone(gateway_url: str) -> None:
    Agent.objects.create(id="ops", enabled=True)
    with connected(gateway_url) as wire:
        answer = wire.payload("sessions.messages.subscribe", {"key": "Agent:OPS:hook:x"})
        assert answer == {"subscribed": True, "key": "agent:ops:hook:x", "agentId": "ops"}
        Agent.objects.filter(pk="ops").update(enabled=False)
        again = wire.payload("sessions.messages.subscribe", {"key": "main", "agentId": "ops"})
        assert again["key"] == "agent:ops:main"
        error = wire.error("sessions.messages.subscribe", {"key": "agent:nobody:x"})
        assert error["message"] == 'unknown agent "nobody"'
        error = wire.error("sessions.messages.subscribe", {"key": "agent:x"})
        assert error["message"] == 'malformed session key "agent:x"'


def test_a_connection_follows_so_many_sessions(gateway_url: str) -> None:
    with connected(gateway_url) as wire:
        for number in range(200):
            wire.payload("sessions.messages.subscribe", {"key": f"hook:{number}"})
        error = wire.error("sessions.messages.subscribe", {"key": "hook:more"})
        assert error["message"] == "a connection follows at most 200 sessions"
        wire.payload("sessions.messages.subscribe", {"key": "hook:1"})


def test_work_of_another_process_is_told(listener: Wire) -> None:
    """The event comes from a process that knows nothing of this one but the database."""
    database = connection.settings_dict
    url = (
        f"sqlite:///{database['NAME']}"
        if connection.vendor == "sqlite"
        else f"postgres://{database['USER']}@{database['HOST']}:{database['PORT']}/{database['NAME']}"
    )
    subprocess.run(
        [sys.executable, "manage.py", "system_event", "from elsewhere", "--session-key", "hook:x"],
        cwd=ROOT,
        env={**os.environ, "DATABASE_URL": url, "SECRET_KEY": "x"},
        check=True,
        capture_output=True,
    )
    assert listener.event("session.message")["item"]["text"] == "from elsewhere"
    assert named_change(listener)["sessionKey"] == KEY


def test_events_are_numbered_without_a_gap(listener: Wire, wire: Wire) -> None:
    for number in range(20):
        wake(wire, f"number {number}", f"hook:{number % 3}")
    while named_change(listener)["session"]["queued"] < 6:
        pass
    assert listener.numbers == list(range(1, len(listener.numbers) + 1))


# --- Health and presence --------------------------------------------------------------------------


def test_health_is_told_when_it_changes(listener: Wire, wire: Wire) -> None:
    wake(wire, "hello")
    while listener.event("health")["queue"]["queued"] != 1:
        pass
    stored = GatewaySettings.ensure()
    stored.heartbeats_enabled = False
    stored.save()
    while listener.event("health")["heartbeats"]["enabled"]:
        pass


def test_one_count_that_was_slow_does_not_hold_up_the_next(
    listener: Wire, wire: Wire, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such as the first one of a process, on a busy machine."""
    health, slow = status.health, iter([0.7])

    def slow_once() -> Json:
        time.sleep(next(slow, 0))
        return health()

    monkeypatch.setattr(status, "health", slow_once)
    wake(wire, "hello")
    while listener.event("health")["queue"]["queued"] != 1:
        pass
    began = time.monotonic()
    wake(wire, "another")
    while listener.event("health", 20)["queue"]["queued"] != 2:
        pass
    assert time.monotonic() - began < 5


def test_presence_is_told_when_a_node_reports(listener: Wire, wire: Wire) -> None:
    wire.payload("system-event", {"text": "Node: desk (10.0.0.2) · mode local", "host": "desk"})
    while not any(e["host"] == "desk" for e in listener.event("presence")["presence"]):
        pass


def test_a_client_that_stays_is_present_until_it_leaves(listener: Wire, gateway_url: str) -> None:
    browser = {
        "id": "openclaw-control-ui",
        "version": "9",
        "platform": "web",
        "mode": "webchat",
        "instanceId": "tab-1",
    }

    def seen(reason: str) -> Json:
        while True:
            for entry in listener.event("presence")["presence"]:
                if entry.get("instanceId") == "tab-1" and entry["reason"] == reason:
                    found: Json = entry
                    return found

    with connected(gateway_url, client=browser, scopes=["operator.read"]):
        entry = seen("connect")
    assert (entry["host"], entry["mode"], entry["version"]) == (
        "openclaw-control-ui",
        "webchat",
        "9",
    )
    assert entry["scopes"] == ["operator.read"]
    assert entry["ip"] == "127.0.0.1"
    seen("disconnect")


def test_a_client_that_another_process_takes_for_gone_is_there_again(
    listener: Wire, gateway_url: str
) -> None:
    browser = {"id": "ui", "version": "9", "platform": "web", "mode": "ui", "instanceId": "tab-2"}

    def reason() -> str:
        entries = listener.event("presence")["presence"]
        return str({entry["key"]: entry["reason"] for entry in entries}.get("tab-2"))

    with connected(gateway_url, client=browser):
        while reason() != "connect":
            pass
        presence.keep([], ["tab-2"], timezone.now())
        while reason() != "disconnect":
            pass
        while reason() != "connect":
            pass


def test_no_word_of_a_client_stops_presence(listener: Wire, gateway_url: str) -> None:
    odd = "\0\u202e " + "x" * 500
    client = {"id": f"odd {odd}", "version": odd, "platform": odd, "mode": "m", "instanceId": odd}
    asked = ["operator.read", "operator.\0x", "operator." + "y" * 2000, "a b"]
    with connected(gateway_url, client=client, scopes=asked) as wire:
        while not any(e["host"][:3] == "odd" for e in listener.event("presence")["presence"]):
            pass
        with connected(gateway_url, client={**client, "id": "later", "instanceId": "l"}):
            while not any(e["host"] == "later" for e in listener.event("presence")["presence"]):
                pass
        assert wire.payload("health")["ok"] is True


def test_a_client_without_admin_overwrites_nobody(listener: Wire, gateway_url: str) -> None:
    with connected(gateway_url) as admin:
        admin.payload("system-event", {"text": "Node: desk", "instanceId": "desk", "host": "desk"})
    rogue = {
        "id": "rogue",
        "version": "1",
        "platform": "x",
        "mode": "backend",
        "instanceId": "desk",
    }
    with connected(gateway_url, client=rogue, scopes=["operator.read"]):
        while not any(e["host"] == "rogue" for e in listener.event("presence")["presence"]):
            pass
    assert PresenceEntry.objects.get(pk="desk").host == "desk"


def test_who_gives_no_sign_ages_out(wire: Wire) -> None:
    wire.payload("system-event", {"text": "Node: desk", "host": "desk"})
    wire.payload("system-event", {"text": "Node: lamp", "host": "lamp"})
    long_ago = timezone.now() - timedelta(minutes=5, seconds=1)
    PresenceEntry.objects.filter(pk="lamp").update(seen_at=long_ago)
    hosts = [entry["host"] for entry in wire.payload("system-presence")]
    assert "desk" in hosts
    assert "lamp" not in hosts


def test_at_most_200_are_shown(wire: Wire) -> None:
    PresenceEntry.objects.bulk_create(
        PresenceEntry(key=f"n{n}", host=f"n{n}", seen_at=timezone.now()) for n in range(250)
    )
    assert len(wire.payload("system-presence")) == 200


# --- Who may hear ---------------------------------------------------------------------------------


def test_without_read_nothing_but_ticks_is_told(gateway_url: str, listener: Wire) -> None:
    application = Connection.as_asgi(tick_seconds=0.2)
    with (
        serving(application) as url,
        Wire(url) as deaf,
        connected(gateway_url) as speaker,
    ):
        hello = deaf.payload("connect", connect_params(scopes=["operator.approvals"]))
        assert hello["auth"]["scopes"] == ["operator.approvals"]
        for number in range(5):
            wake(speaker, f"number {number}")
            listener.event("session.message")
        names = {deaf.receive().get("event") for _ in range(5)}
        assert names == {"tick"}
        assert deaf.error("sessions.subscribe")["code"] == "FORBIDDEN"


# --- Slow ones ------------------------------------------------------------------------------------


def test_a_client_that_stops_reading_is_dropped_and_slows_nobody(gateway_url: str) -> None:
    # A third of what is told.
    application = Connection.as_asgi(max_buffered_bytes=3_000_000)
    with (
        serving(application) as url,
        _small_socket(url) as small,
        connected(url, options={"sock": small, "max_queue": 1, "compression": None}) as slow,
        connected(gateway_url) as speaker,
    ):
        # They read whatever comes: by itself their library stops at sixteen messages.
        others = [connected(url, options={"max_queue": None}) for _ in range(3)]
        for wire in (slow, *others):
            wire.payload("sessions.messages.subscribe", {"key": KEY})
        # From here on it takes nothing, and its library stops to read.
        for start in range(0, 150, 10):
            numbers = range(start, start + 10)
            for number in numbers:
                wake(speaker, f"{number} {'x' * 60_000}")
            for wire in others:  # at once: on a busy machine they might be taken for slow
                told = [wire.event("session.message")["item"]["text"] for _ in numbers]
                assert [text.split()[0] for text in told] == list(map(str, numbers))
        with pytest.raises(ConnectionClosed) as closed:  # noqa: PT012 - it reads what is left
            while True:
                slow.receive()
        assert closed.value.rcvd
        assert (closed.value.rcvd.code, closed.value.rcvd.reason) == (1008, "slow consumer")
        assert all(wire.payload("health")["ok"] for wire in others)


def _small_socket(url: str) -> socket.socket:
    """Return a connected socket that takes little before its owner reads."""
    small = socket.socket()
    small.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    small.connect(("127.0.0.1", urlsplit(url).port))
    return small


# --- The end --------------------------------------------------------------------------------------


def test_a_stop_is_announced(live_gateway: LiveGateway) -> None:
    with (
        connected(live_gateway.ws_url, auth={"token": live_gateway.gateway_token}) as known,
        Wire(live_gateway.ws_url) as unknown,
    ):
        began = time.monotonic()
        assert live_gateway.stop() == 0
        assert time.monotonic() - began < 5
        assert known.event("shutdown") == {"reason": "the gateway stops"}
        with pytest.raises(ConnectionClosed) as closed:
            known.receive()
        assert closed.value.rcvd
        assert closed.value.rcvd.code == 1012
        assert unknown.close_code() == 1012


# --- Following ids that are committed out of order ------------------------------------------------


@given(
    order=st.permutations(range(1, 30)),
    never=st.sets(st.integers(1, 29)),
    sizes=st.lists(st.integers(1, 6), min_size=30, max_size=30),
)
def test_a_cursor_sees_every_row_once_whatever_the_order_of_commits(
    order: list[int], never: set[int], sizes: list[int]
) -> None:
    cursor, stored, seen = Cursor(0), set[int](), list[int]()
    arriving = [pk for pk in order if pk not in never]
    for size in sizes:
        batch, arriving = arriving[:size], arriving[size:]
        stored |= set(batch)
        newest, missing = _unseen(cursor)
        found = {pk for pk in stored if pk > newest or pk in missing}
        seen += found
        cursor.saw(found, now=0.0)
    assert sorted(seen) == sorted(stored)


@pytest.mark.django_db
def test_what_is_committed_after_the_start_under_a_lower_id_is_told() -> None:
    session = Session.objects.create(agent_id="main", key=KEY)

    def commit(pk: int) -> None:
        SystemEvent.objects.create(
            pk=pk, uid=uuid4(), session=session, text="x", source="x", created_at=timezone.now()
        )

    commit(50_001)
    follower = Follower()
    follower.start()
    commit(50_000)
    followed = SessionKey("main", KEY)
    found = follower.look((), lambda: [followed], lambda: False, now=timezone.now())
    assert len(found.messages) == 1


def test_a_cursor_holds_as_many_gaps_as_big_batches_make() -> None:
    cursor = Cursor(0)
    cursor.saw([3000], now=0.0)
    assert _unseen(cursor) == (3000, list(range(1, 3000)))


def test_a_cursor_gives_up_what_no_transaction_can_hold_any_more() -> None:
    cursor = Cursor(0)
    cursor.saw([3], now=0.0)
    assert _unseen(cursor) == (3, [1, 2])
    cursor.saw([], now=GAP_SECONDS + 1)
    assert _unseen(cursor) == (3, [])


def _unseen(cursor: Cursor) -> tuple[int, list[int]]:
    condition: dict[str, Any] = dict(cursor.unseen().children)  # type: ignore[arg-type] # pairs of a lookup and its value
    return condition["pk__gt"], condition["pk__in"]
