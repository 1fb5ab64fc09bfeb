"""The runner inbox: clients that attach, get heartbeats, and say what became of each."""

from __future__ import annotations

import asyncio
import io
import socket
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from uuid import UUID, uuid4

import pytest
from django.core.management import CommandError, call_command
from django.test import Client as Browser
from django.urls import reverse

from tests.live import LiveGateway
from tests.wake.gateway_server import Json, Wire, connect_params, connected
from tests.wake.turns import http_turn
from wake import tokens
from wake.errors import LeaseLost
from wake.heartbeats.runners import (
    MAX_ERROR_CHARACTERS,
    MAX_REPLY_BYTES,
    Delivered,
    Lost,
    Outcome,
    Reach,
    Returned,
    Turn,
)
from wake.heartbeats.runners.inbox import Inbox, InboxRunner
from wake.models import Agent, GatewayToken, RunnerKind

LEASE_SECONDS = 2
LEASE_MS = 2000


# --- Who gets a turn, and for how long --------------------------------------------------------


class Told:
    """What the connections of an inbox were told, in order."""

    def __init__(self) -> None:
        self.events: list[tuple[str, str, Json]] = []

    def __call__(self, connection_id: str) -> Callable[[str, object], None]:
        def tell(event: str, payload: Any) -> None:
            self.events.append((connection_id, event, payload))

        return tell

    def runs(self) -> list[str]:
        """Return the connections that were given a turn."""
        return [told_to for told_to, event, _ in self.events if event == "heartbeat.run"]

    def lost(self) -> list[str]:
        return [told_to for told_to, event, _ in self.events if event == "heartbeat.lost"]


def a_turn(limit: float = 600.0) -> Turn:
    return replace(http_turn("http://nowhere", ""), run_id=uuid4(), limit=limit)


async def given(inbox: Inbox, count: int = 1, limit: float = 600.0) -> list[asyncio.Task[Outcome]]:
    """Start turns of the agent main; they have reached their clients."""
    started = [asyncio.create_task(inbox.run(a_turn(limit))) for _ in range(count)]
    await asyncio.sleep(0)
    return started


async def test_without_a_free_client_a_turn_comes_back() -> None:
    inbox, told = Inbox(5), Told()
    assert await inbox.run(a_turn()) == Returned()
    inbox.attach("one", "other", 5, told("one"))
    assert await inbox.run(a_turn()) == Returned()
    assert (inbox.places("main"), told.events) == (0, [])


async def test_the_client_with_the_smallest_share_of_its_places_taken_is_next() -> None:
    inbox, told = Inbox(5), Told()
    inbox.attach("big", "main", 4, told("big"))
    inbox.attach("small", "main", 2, told("small"))
    assert inbox.places("main") == 6
    runs = await given(inbox, 7)
    assert told.runs() == ["big", "small", "big", "big", "small", "big"]
    assert await runs[-1] == Returned()
    inbox.leave("big", Lost("gone"))
    inbox.leave("small", Lost("gone"))
    assert await asyncio.gather(*runs[:-1]) == [Lost("gone")] * 6
    assert inbox.places("main") == 0


async def test_equal_clients_take_turns() -> None:
    inbox, told = Inbox(5), Told()
    for name in ("one", "two"):
        inbox.attach(name, "main", 1, told(name))
    for _ in range(4):
        (run,) = await given(inbox)
        client, _, payload = told.events[-1]
        done = asyncio.create_task(inbox.done(client, payload["runId"], Delivered()))
        assert await run == Delivered()
        inbox.settled(payload["runId"], is_kept=True)
        await done
    assert told.runs() == ["one", "two", "one", "two"]


async def test_a_client_that_takes_no_more_counts_with_what_it_has() -> None:
    inbox, told = Inbox(5), Told()
    inbox.attach("one", "main", 3, told("one"))
    runs = await given(inbox, 2)
    assert inbox.detach("one", "main") == 2
    assert (inbox.places("main"), inbox.reach("main")) == (
        2,
        Reach(problem="no client is attached"),
    )
    assert await inbox.run(a_turn()) == Returned()
    assert inbox.attach("one", "main", 1, told("one")) == 2
    assert inbox.places("main") == 2
    assert await inbox.run(a_turn()) == Returned()
    assert inbox.reach("main") == Reach(clients=1, capacity=1)
    inbox.leave("one", Returned())
    assert await asyncio.gather(*runs) == [Returned()] * 2


async def test_a_silent_client_loses_its_turn_and_gets_none_until_it_is_heard_of() -> None:
    inbox, told = Inbox(0.05), Told()
    looked: list[int] = []
    inbox.look_again.add(lambda: looked.append(inbox.places("main")))
    inbox.attach("one", "main", 2, told("one"))
    (run,) = await given(inbox)
    run_id = told.events[0][2]["runId"]
    assert await run == Lost("its client gave no sign for 0.05 s")
    assert told.lost() == ["one"]
    assert inbox.places("main") == 0
    assert inbox.reach("main") == Reach(clients=1, problem="its clients do not answer")
    assert await inbox.run(a_turn()) == Returned()
    with pytest.raises(LeaseLost, match=f"run {run_id} is not yours any more: its lease ran out"):
        await inbox.done("one", run_id, Delivered("late"))
    assert inbox.places("main") == 2
    assert looked == [2, 2]


async def test_when_the_gateway_is_held_up_its_clients_are_not_to_blame() -> None:
    inbox, told = Inbox(0.2), Told()
    inbox.attach("one", "main", 1, told("one"))
    (run,) = await given(inbox)
    time.sleep(0.4)  # noqa: ASYNC251 - the event loop hangs
    await asyncio.sleep(0.05)
    assert inbox.progress("one", told.events[0][2]["runId"]) == 200
    assert await run == Lost("its client gave no sign for 0.2 s")


async def test_progress_extends_the_lease_up_to_the_time_limit() -> None:
    inbox, told = Inbox(0.2), Told()
    inbox.attach("one", "main", 1, told("one"))
    (run,) = await given(inbox, limit=0.5)
    payload = told.events[0][2]
    assert (payload["deadlineMs"], payload["timeoutMs"]) == (200, 500)
    for _ in range(4):
        await asyncio.sleep(0.1)
        left = inbox.progress("one", payload["runId"])
    assert left < 120
    assert not run.done()
    run.cancel()  # as the loop does at the limit
    with pytest.raises(asyncio.CancelledError):
        await run
    assert told.lost() == ["one"]
    with pytest.raises(LeaseLost):
        inbox.progress("one", payload["runId"])


async def test_a_turn_is_done_once_it_is_stored_and_by_its_own_client_only() -> None:
    inbox, told = Inbox(5), Told()
    inbox.attach("one", "main", 1, told("one"))
    inbox.attach("two", "main", 1, told("two"))
    for is_kept in (True, False):
        (run,) = await given(inbox)
        client, _, payload = told.events[-1]
        other = "two" if client == "one" else "one"
        with pytest.raises(LeaseLost):
            await inbox.done(other, payload["runId"], Delivered("not mine"))
        done = asyncio.create_task(inbox.done(client, payload["runId"], Delivered("mine")))
        assert await run == Delivered("mine")
        assert not done.done()
        with pytest.raises(LeaseLost):
            await inbox.done(client, payload["runId"], Delivered("twice"))
        inbox.settled(payload["runId"], is_kept=is_kept)
        if is_kept:
            await done
        else:
            with pytest.raises(LeaseLost):
                await done


async def test_an_answer_at_the_moment_of_the_cancellation_is_refused() -> None:
    inbox, told = Inbox(5), Told()
    inbox.attach("one", "main", 1, told("one"))
    (run,) = await given(inbox)
    run_id = told.events[0][2]["runId"]
    done = asyncio.create_task(inbox.done("one", run_id, Delivered("late")))
    await asyncio.sleep(0)
    run.cancel()
    with pytest.raises(asyncio.CancelledError):
        await run
    inbox.settled(run_id, is_kept=True)  # that it was cancelled
    with pytest.raises(LeaseLost):
        await done


async def test_the_runner_tells_its_loop_when_there_are_more_places() -> None:
    looked: list[str] = []
    runner = InboxRunner(lambda: looked.append("again"))
    runner._inbox.attach("one", "main", 2, lambda *_: None)
    agent = a_turn().agent
    assert (runner.places(agent), runner.reach(agent), looked) == (2, Reach(1, 2), ["again"])
    await runner.close()
    runner._inbox.attach("two", "main", 2, lambda *_: None)
    assert looked == ["again"]


# --- Over the WebSocket -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def gateway(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LiveGateway]:
    """A gateway whose agent main has the runner inbox, and whose leases are short.

    It runs no heartbeats but those.
    """
    with LiveGateway(
        tmp_path_factory.mktemp("gateway"),
        arguments=("--no-heartbeats",),
        environment={"HEARTBEAT_LEASE_SECONDS": str(LEASE_SECONDS)},
    ) as live:
        live.manage(
            "shell",
            "-c",
            "from django.core.management import call_command as call\n"
            "call('agents', 'set', 'main', '--every', 'off', '--runner', 'inbox')\n"
            "call('agents', 'set', 'ops', '--every', 'off')\n"
            "call('agents', 'set', 'off', '--runner', 'inbox', '--disable')\n",
        )
        yield live


@pytest.fixture
def wire(gateway: LiveGateway) -> Iterator[Wire]:
    """One that asks, and looks at what became of it."""
    with connected(gateway.ws_url, auth={"token": gateway.gateway_token}) as one:
        yield one


@pytest.fixture
def client(gateway: LiveGateway) -> Iterator[Wire]:
    """One that takes heartbeats."""
    with connected(gateway.ws_url, auth={"token": gateway.gateway_token}) as one:
        yield one


other = client


def attach(client: Wire, capacity: int = 1) -> None:
    client.payload("agent.attach", {"agentId": "main", "capacity": capacity})


def wake(wire: Wire) -> str:
    """Wake a session of its own and return its key."""
    params = {"mode": "now", "text": "größer", "sessionKey": f"s:{uuid4()}"}
    key: str = wire.payload("wake", params)["sessionKey"]
    return key


def run_of(client: Wire, *keys: str, seconds: float = 10) -> Json:
    """Return the next run of one of the sessions; what other tests left is taken and done."""
    while (told := client.event("heartbeat.run", seconds))["sessionKey"] not in keys:
        client.ask("heartbeat.done", {"runId": told["runId"], "status": "delivered"})
    return told


def deliver(client: Wire, told: Json, **said: Any) -> None:
    done = {"runId": told["runId"], "status": "delivered", **said}
    assert client.payload("heartbeat.done", done) == {"ok": True, "runId": told["runId"]}


def ended(wire: Wire, key: str) -> Json:
    """Return the newest run of a session, which has ended."""
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline:
        for item in wire.payload("sessions.history", {"key": key})["items"]:
            if item["kind"] == "heartbeat" and item["status"] != "running":
                found: Json = item
                return found
        time.sleep(0.02)
    raise AssertionError("no run has ended")


def test_a_heartbeat_from_the_wake_to_the_reply(wire: Wire, client: Wire) -> None:
    answer = client.payload("agent.attach", {"agentId": " Main ", "capacity": 3})
    assert answer == {
        "ok": True,
        "agentId": "main",
        "capacity": 3,
        "running": 0,
        "leaseMs": LEASE_MS,
        "maxReplyBytes": MAX_REPLY_BYTES,
    }
    key = wake(wire)
    told = run_of(client, key)
    (event,) = told.pop("events")
    assert (event["text"], event["source"], event["external"]) == ("größer", "ws", False)
    assert "größer" in told.pop("prompt")
    run_id = told.pop("runId")
    assert told == {
        "agentId": "main",
        "sessionKey": key,
        "reason": "wake",
        "attempt": 1,
        "deadlineMs": LEASE_MS,
        "timeoutMs": 600_000,
    }
    done = {"runId": run_id, "status": "delivered", "reply": "seen"}
    assert client.payload("heartbeat.done", done) == {"ok": True, "runId": run_id}
    # It is stored by the time of the answer.
    run = wire.payload("heartbeats.get", {"runId": run_id})
    assert (run["status"], run["reply"], run["attempt"]) == ("delivered", "seen", 1)
    assert client.error("heartbeat.done", done)["details"] == {"code": "LEASE_LOST"}


@pytest.mark.parametrize(
    ("said", "status", "error"),
    [
        ({"status": "failed", "error": "no\0 model"}, "failed", "no\ufffd model"),
        ({"status": "failed", "error": None}, "failed", "its client gave no reason"),
        ({"status": "failed", "error": "x" * 100_000}, "failed", "x" * MAX_ERROR_CHARACTERS),
        ({"status": "delivered", "reply": "HEARTBEAT_OK"}, "quiet", ""),
        ({"status": "returned"}, "released", ""),
    ],
)
def test_what_a_client_says_of_a_run(
    wire: Wire, client: Wire, said: Json, status: str, error: str
) -> None:
    attach(client)
    key = wake(wire)
    deliver(client, run_of(client, key), **said)
    run = ended(wire, key)
    assert (run["status"], run["error"]) == (status, error)


def test_a_reply_is_cut(wire: Wire, client: Wire) -> None:
    attach(client)
    told = run_of(client, wake(wire))
    deliver(client, told, reply="a" + "\U0001f600" * 100_000)
    stored = wire.payload("heartbeats.get", {"runId": told["runId"]})["reply"]
    assert stored == "a" + "\U0001f600" * ((MAX_REPLY_BYTES - 1) // 4)


@pytest.mark.parametrize(
    ("said", "state"), [({"permanent": True}, "dead"), ({"retryAfterMs": 60_000}, "queued")]
)
def test_a_failure_may_be_permanent_or_ask_for_a_wait(
    wire: Wire, client: Wire, said: Json, state: str
) -> None:
    attach(client)
    key = wake(wire)
    deliver(client, run_of(client, key), status="failed", error="no", **said)
    answer = wire.payload("sessions.history", {"key": key})
    (event,) = [item for item in answer["items"] if item["kind"] == "event"]
    assert event["state"] == state
    if state == "queued":
        assert answer["session"]["dueAt"] - time.time() * 1000 > 50_000


def test_a_client_that_gave_a_run_back_gets_no_other(wire: Wire, client: Wire, other: Wire) -> None:
    attach(client)
    key = wake(wire)
    told = run_of(client, key)
    attach(other)
    deliver(client, told, status="returned")
    again = run_of(other, key)
    # It is the same attempt: what was given back does not count.
    assert (again["attempt"], again["runId"] == told["runId"]) == (1, False)
    deliver(other, again)


def test_capacity_is_honoured_and_can_be_changed(wire: Wire, client: Wire) -> None:
    attach(client)
    keys = {wake(wire) for _ in range(3)}
    first = run_of(client, *keys)
    with pytest.raises(TimeoutError):
        client.event("heartbeat.run", LEASE_SECONDS / 4)
    attach(client, 3)
    told = [first, run_of(client, *keys), run_of(client, *keys)]
    assert {one["sessionKey"] for one in told} == keys
    for one in told:
        deliver(client, one)


def test_after_a_detach_runs_go_on_and_no_other_comes(
    wire: Wire, client: Wire, other: Wire
) -> None:
    attach(client)
    told = run_of(client, wake(wire))
    answer = client.payload("agent.detach", {"agentId": "main"})
    assert answer == {"ok": True, "agentId": "main", "running": 1}
    key = wake(wire)
    with pytest.raises(TimeoutError):
        client.event("heartbeat.run", LEASE_SECONDS / 4)
    deliver(client, told)
    attach(other)
    deliver(other, run_of(other, key))


def test_a_lost_connection_gives_its_runs_back_at_once(
    wire: Wire, client: Wire, other: Wire
) -> None:
    attach(client)
    key = wake(wire)
    run_of(client, key)
    attach(other)
    client.connection.socket.shutdown(socket.SHUT_RDWR)  # without a word
    left = time.monotonic()
    again = run_of(other, key)
    assert time.monotonic() - left < LEASE_SECONDS / 2
    assert (again["attempt"], again["reason"]) == (2, "recovery")
    deliver(other, again)


def test_past_its_lease_a_run_goes_to_another_client(wire: Wire, client: Wire, other: Wire) -> None:
    attach(client)
    key = wake(wire)
    told = run_of(client, key)
    attach(other)
    again = run_of(other, key)
    assert client.event("heartbeat.lost")["runId"] == told["runId"]
    run_id = told["runId"]
    late = {"runId": run_id, "status": "delivered", "reply": "late"}
    for method in ("heartbeat.done", "heartbeat.progress"):
        error = client.error(method, late)
        assert error["code"] == "INVALID_REQUEST"
        assert error["message"] == f"run {run_id} is not yours any more: its lease ran out"
        assert error["details"] == {"code": "LEASE_LOST"}
    deliver(other, again, reply="in time")
    assert ended(wire, key)["reply"] == "in time"


def test_progress_keeps_a_run(wire: Wire, client: Wire) -> None:
    attach(client)
    key = wake(wire)
    told = run_of(client, key)
    for _ in range(4):
        time.sleep(LEASE_SECONDS / 3)
        answer = client.payload("heartbeat.progress", {"runId": told["runId"]})
        assert answer == {"ok": True, "runId": told["runId"], "deadlineMs": LEASE_MS}
    deliver(client, told)
    assert ended(wire, key)["attempt"] == 1


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"agentId": "nobody"}, 'unknown agent "nobody"'),
        ({"agentId": "off"}, 'agent "off" is disabled'),
        ({"agentId": "ops"}, 'agent "ops" has the runner none, not inbox'),
        ({}, "invalid agent.attach params: agentId (non-empty string) required"),
        *(
            (
                {"agentId": "main", "capacity": capacity},
                "invalid agent.attach params: capacity must be: integer from 1 to 1000",
            )
            for capacity in (0, 1001, "1", -5, 1.5)
        ),
    ],
)
def test_who_cannot_attach_is_told_why(wire: Wire, params: Json, message: str) -> None:
    error = wire.error("agent.attach", params)
    assert (error["code"], error["message"]) == ("INVALID_REQUEST", message)


@pytest.mark.parametrize(
    ("method", "params"),
    [
        ("heartbeat.done", {"runId": "x" * 5000, "status": "delivered"}),
        ("heartbeat.progress", {"runId": str(UUID(int=0))}),
    ],
)
def test_a_run_that_nobody_has_is_not_the_callers(wire: Wire, method: str, params: Json) -> None:
    error = wire.error(method, params)
    assert error["details"] == {"code": "LEASE_LOST"}
    assert len(error["message"]) < 200


def test_without_a_scope_nobody_attaches(gateway: LiveGateway) -> None:
    auth = {"token": gateway.gateway_token}
    with connected(gateway.ws_url, auth=auth, scopes=["operator.read"]) as reader:
        assert reader.error("agent.attach", {"agentId": "main"})["code"] == "FORBIDDEN"
        assert reader.error("heartbeat.progress", {"runId": "x"})["code"] == "FORBIDDEN"


def test_a_stop_of_the_gateway_counts_as_no_attempt(tmp_path: Path) -> None:
    with LiveGateway(tmp_path) as live:
        live.manage("agents", "set", "main", "--every", "off", "--runner", "inbox")
        with (
            connected(live.ws_url, auth={"token": live.gateway_token}) as wire,
            connected(live.ws_url, auth={"token": live.gateway_token}) as client,
        ):
            attach(client)
            key = wake(wire)
            run_of(client, key)
            assert live.stop() == 0
        live.start()
        with connected(live.ws_url, auth={"token": live.gateway_token}) as client:
            attach(client)
            assert run_of(client, key)["attempt"] == 1


# --- Tokens that are bound to an agent --------------------------------------------------------


@pytest.fixture
def agent(gateway_url: str) -> Agent:
    return Agent.objects.create(pk="worker", runner=RunnerKind.INBOX)


def test_a_bound_token_attaches_to_its_agent_and_does_nothing_else(
    gateway_url: str, agent: Agent
) -> None:
    _, token = tokens.create_for_gateway("worker", scopes=[], agent_id=agent.pk)
    with Wire(gateway_url) as wire:
        hello = wire.payload("connect", connect_params(auth={"token": token}))
        assert (hello["auth"]["scopes"], hello["snapshot"]["health"]) == ([], {})
        assert hello["snapshot"]["presence"] == []
        assert wire.payload("agent.attach", {"agentId": "worker"})["ok"] is True
        assert wire.payload("agent.detach", {"agentId": "worker"})["ok"] is True
        for name in ("agent.attach", "agent.detach"):
            error = wire.error(name, {"agentId": "main"})
            assert (error["code"], error["details"]["code"]) == ("FORBIDDEN", "AGENT_MISMATCH")
        for name in ("health", "system-presence", "sessions.list", "wake", "set-heartbeats"):
            assert wire.error(name, {})["details"]["code"] == "MISSING_SCOPE"


def test_a_bound_token_keeps_its_scopes_and_still_attaches_to_its_agent_only(
    gateway_url: str, agent: Agent
) -> None:
    Agent.objects.create(pk="second", runner=RunnerKind.INBOX)
    _, token = tokens.create_for_gateway("worker", scopes=["operator.write"], agent_id=agent.pk)
    with connected(gateway_url, auth={"token": token}) as wire:
        assert wire.payload("health")["ok"] is True
        assert wire.payload("agent.attach", {"agentId": "worker"})["ok"] is True
        assert wire.error("agent.attach", {"agentId": "second"})["code"] == "FORBIDDEN"


@pytest.mark.parametrize("change", ["revoked", "other agent", "no agent", "agent deleted"])
def test_a_connection_ends_when_its_token_is_not_the_agents_any_more(
    gateway_url: str, agent: Agent, change: str
) -> None:
    row, token = tokens.create_for_gateway("worker", scopes=[], agent_id=agent.pk)
    Agent.objects.create(pk="second", runner=RunnerKind.INBOX)
    with connected(gateway_url, auth={"token": token}) as wire:
        wire.payload("agent.attach", {"agentId": "worker"})
        if change == "revoked":
            tokens.revoke(GatewayToken.objects.all(), row.created_at)
        elif change == "agent deleted":
            agent.delete()
        else:
            row.agent_id = "second" if change == "other agent" else None
            row.save()
        assert wire.close_code() == 1008


def test_a_disabled_agent_is_named_to_the_holder_of_its_token(
    gateway_url: str, agent: Agent
) -> None:
    _, token = tokens.create_for_gateway("worker", scopes=[], agent_id=agent.pk)
    agent.enabled = False
    agent.save()
    with connected(gateway_url, auth={"token": token}) as wire:
        message = wire.error("agent.attach", {"agentId": "worker"})["message"]
        assert message == 'agent "worker" is disabled'


def run_command(*arguments: str) -> str:
    output = io.StringIO()
    call_command("gateway_tokens", *arguments, stdout=output)
    return output.getvalue()


@pytest.mark.django_db
def test_gateway_tokens_makes_lists_and_rotates_bound_tokens() -> None:
    Agent.objects.create(pk="worker", runner=RunnerKind.INBOX)
    shown = run_command("create", "desk", "--agent", "Worker")
    assert ", holds agent worker, shown only this once" in shown
    assert "agent_client --url ws://127.0.0.1:8000 --agent worker -- cat" in shown
    run_command("create", "more", "--agent", "worker", "--scope", "operator.read")
    run_command("rotate", "desk")
    held = {
        row.name.split(" ")[0]: (row.scopes, row.agent_id) for row in GatewayToken.objects.all()
    }
    assert held == {"desk": ([], "worker"), "more": (["operator.read"], "worker")}
    assert GatewayToken.objects.count() == 3
    assert "read, agent worker" in run_command("list")
    with pytest.raises(CommandError, match='unknown agent "nobody"'):
        run_command("create", "x", "--agent", "nobody")


def test_the_admin_makes_bound_tokens(admin_client: Browser) -> None:
    Agent.objects.create(pk="worker", runner=RunnerKind.INBOX)
    add = reverse("admin:wake_gatewaytoken_add")
    form = {"name": "desk", "agent": "worker"}
    page = admin_client.post(add, form)
    assert "agent_client" in page.content.decode()
    row = GatewayToken.objects.get()
    assert (row.agent_id, row.scopes) == ("worker", [])
    listed = admin_client.get(reverse("admin:wake_gatewaytoken_changelist")).content.decode()
    assert "agent worker" in listed
    refused = admin_client.post(add, {"name": "nothing"}).content.decode()
    assert "Choose at least one scope, or an agent." in refused
    assert GatewayToken.objects.count() == 1
