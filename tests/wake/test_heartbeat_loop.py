"""The heartbeat loop with real programs as agents, on a real database."""

from __future__ import annotations

import asyncio
import contextlib
import json
import sys
import time
from collections.abc import AsyncIterator, Callable
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
from asgiref.sync import sync_to_async

from tests.claims import terms
from wake import configuration, queue
from wake.dispatch import Mode, Receipt, WakeRequest, dispatch
from wake.heartbeats import pulse
from wake.heartbeats.loop import POLL_SECONDS, HeartbeatLoop
from wake.models import (
    Agent,
    EventState,
    GatewaySettings,
    Heartbeat,
    HeartbeatStatus,
    Session,
    SystemEvent,
)

pytestmark = pytest.mark.django_db(transaction=True)

# Appends what it was given to a file, one JSON line per run: begin, then end.
RECORDER = """
import json, os, sys, time
prompt = sys.stdin.read()
with open(sys.argv[1], "a") as file:
    file.write(json.dumps({"session": os.environ["OPENCLAW_SESSION_KEY"], "prompt": prompt,
                           "reason": os.environ["OPENCLAW_REASON"]}) + "\\n")
time.sleep(float(sys.argv[2]))
print("HEARTBEAT_OK")
"""


class Clock:
    def __init__(self) -> None:
        self.now = datetime(2026, 11, 22, 12, tzinfo=UTC)

    def __call__(self) -> datetime:
        return self.now


def set_agent(agent_id: str = "main", **fields: Any) -> None:
    agent, _ = Agent.objects.get_or_create(pk=agent_id)
    for name, value in fields.items():
        setattr(agent, name, value)
    agent.save()


def recorder(path: Path, seconds: float = 0) -> dict[str, Any]:
    return {
        "runner": "command",
        "command": [sys.executable, "-c", RECORDER, str(path), str(seconds)],
    }


def recorded(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def wake(
    text: str, key: str | None = "x", mode: Mode = Mode.NOW, agent: str | None = None
) -> Receipt:
    return dispatch(WakeRequest(text, "cli", mode, key, agent))


@contextlib.asynccontextmanager
async def serving(loop: HeartbeatLoop) -> AsyncIterator[HeartbeatLoop]:
    task = asyncio.create_task(loop.run())
    try:
        yield loop
    finally:
        loop.stop()
        await asyncio.wait_for(task, 20)


async def until(condition: Callable[[], bool], seconds: float = 15) -> None:
    """Wait for what happens in another task or process."""
    deadline = time.monotonic() + seconds
    while not await sync_to_async(condition)():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def all_settled() -> bool:
    return not SystemEvent.objects.filter(state=EventState.QUEUED).exists()


async def test_an_event_reaches_its_agent_with_text_id_and_session(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    await sync_to_async(set_agent)(**recorder(inbox))
    async with serving(HeartbeatLoop()):
        receipt = await sync_to_async(wake)("CI finished: 214 passed", "discord:channel:123")
        await until(all_settled)
    (run,) = recorded(inbox)
    assert run["session"] == "agent:main:discord:channel:123"
    assert "CI finished: 214 passed" in run["prompt"]
    assert str(receipt.event_id) in run["prompt"]
    heartbeat = await Heartbeat.objects.aget()
    assert (heartbeat.status, heartbeat.reason) == (HeartbeatStatus.QUIET, "wake")
    assert heartbeat.prompt == run["prompt"]
    assert heartbeat.reply.strip() == "HEARTBEAT_OK"


async def test_a_wake_without_a_key_gives_every_agent_a_heartbeat(tmp_path: Path) -> None:
    for agent in ("main", "ops"):
        await sync_to_async(set_agent)(agent, **recorder(tmp_path / agent))
    async with serving(HeartbeatLoop()):
        await sync_to_async(wake)("for all", None)
        await until(lambda: len(recorded(tmp_path / "main")) + len(recorded(tmp_path / "ops")) == 2)
        await until(lambda: Heartbeat.objects.filter(status=HeartbeatStatus.QUIET).count() == 2)
    assert "for all" in recorded(tmp_path / "main")[0]["prompt"]
    assert "for all" not in recorded(tmp_path / "ops")[0]["prompt"]
    event = await SystemEvent.objects.select_related("session").aget()
    assert event.session.key == "agent:main:main"


async def test_next_heartbeat_for_the_main_session_waits_for_the_schedule(tmp_path: Path) -> None:
    inbox, clock = tmp_path / "inbox", Clock()
    await sync_to_async(set_agent)(**recorder(inbox))
    loop = HeartbeatLoop(clock=clock)
    await loop.run_once()
    due = (await Session.objects.aget(key="agent:main:main")).due_at
    assert due is not None
    clock.now = due - timedelta(seconds=1)
    await sync_to_async(queue.enqueue)(
        [await sync_to_async(_planned)("waits", None, clock.now)], now=clock.now, max_queued=9
    )
    assert await loop.run_once() == 0
    clock.now = due
    assert await loop.run_once() == 1
    assert "waits" in recorded(inbox)[0]["prompt"]
    assert recorded(inbox)[0]["reason"] == "schedule"
    session = await Session.objects.aget(key="agent:main:main")
    assert session.due_at == due + timedelta(minutes=30), "the schedule goes on"
    await loop.close()


def _planned(text: str, key: str | None, now: datetime) -> queue.Entry:
    from wake.dispatch import plan

    request = WakeRequest(text, "cli", Mode.NEXT_HEARTBEAT, key)
    return plan(request, configuration.gateway(), now)


@pytest.mark.parametrize(("key", "every"), [("x", timedelta(minutes=30)), (None, timedelta(0))])
async def test_next_heartbeat_elsewhere_or_without_a_schedule_is_delivered_at_once(
    tmp_path: Path, key: str | None, every: timedelta
) -> None:
    inbox = tmp_path / "inbox"
    await sync_to_async(set_agent)(**recorder(inbox), heartbeat_every=every)
    loop = HeartbeatLoop()
    await sync_to_async(wake)("at once", key, Mode.NEXT_HEARTBEAT)
    assert await loop.run_once() == 1
    assert "at once" in recorded(inbox)[0]["prompt"]
    await loop.close()


async def test_events_that_come_during_a_heartbeat_follow_in_the_next_one_at_once(
    tmp_path: Path,
) -> None:
    inbox = tmp_path / "inbox"
    await sync_to_async(set_agent)(**recorder(inbox, 0.5))
    async with serving(HeartbeatLoop()):
        await sync_to_async(wake)("first")
        await until(lambda: len(recorded(inbox)) == 1)
        await sync_to_async(wake)("second")
        await sync_to_async(wake)("third")
        await until(all_settled)
    first, second = recorded(inbox)
    assert "first" in first["prompt"]
    assert second["prompt"].index("second") < second["prompt"].index("third")


async def test_a_failing_agent_backs_off_and_its_events_become_dead_letters_while_others_go_on(
    tmp_path: Path,
) -> None:
    inbox, clock = tmp_path / "inbox", Clock()
    script = 'case "$OPENCLAW_SESSION_KEY" in *bad) echo broken >&2; exit 3;; *) cat >> "$0";; esac'
    await sync_to_async(set_agent)(
        runner="command",
        command=["/bin/sh", "-c", script, str(inbox)],
        heartbeat_every=timedelta(0),
    )
    loop = HeartbeatLoop(clock=clock)
    await sync_to_async(wake)("poison", "bad")
    waits = []
    for attempt in range(1, 9):
        await sync_to_async(wake)(f"good {attempt}", "good")
        clock.now = max(clock.now, datetime.now(UTC))
        while await loop.run_once():
            pass
        session = await Session.objects.aget(key="agent:main:bad")
        assert f"good {attempt}" in inbox.read_text()
        if session.due_at:
            waits.append(session.due_at - clock.now)
            clock.now = session.due_at
    await loop.close()
    assert len(waits) == 7
    assert all(
        later > 1.01 * earlier for earlier, later in zip(waits[::2], waits[2::2], strict=False)
    )
    dead = await SystemEvent.objects.select_related("heartbeat").aget(state=EventState.DEAD)
    assert dead.text == "poison"
    assert dead.heartbeat
    assert dead.heartbeat.error == "exit status 3: broken"

    # A person requeues it once the agent is well again.
    await sync_to_async(set_agent)(command=["/bin/sh", "-c", 'cat >> "$0"', str(inbox)])
    await sync_to_async(queue.requeue)([dead.pk], now=clock.now)
    again = HeartbeatLoop(clock=clock)
    assert await again.run_once() == 1
    await again.close()
    assert "poison" in inbox.read_text()


async def test_paused_heartbeats_keep_their_events(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    await sync_to_async(set_agent)(**recorder(inbox), paused=True)
    async with serving(HeartbeatLoop()):
        await sync_to_async(wake)("patience")
        await asyncio.sleep(0.6)
        assert recorded(inbox) == []
        stored = await sync_to_async(GatewaySettings.ensure)()
        stored.heartbeats_enabled = False
        await stored.asave()
        await sync_to_async(set_agent)(paused=False)
        await asyncio.sleep(0.6)
        assert recorded(inbox) == []
        stored.heartbeats_enabled = True
        await stored.asave()
        await until(all_settled, 1.5)
    assert "patience" in recorded(inbox)[0]["prompt"]


async def test_an_agent_without_a_runner_lets_its_events_wait(tmp_path: Path) -> None:
    async with serving(HeartbeatLoop()):
        await sync_to_async(wake)("no runner yet")
        await asyncio.sleep(0.3)
        assert not await Heartbeat.objects.aexists()
        await sync_to_async(set_agent)(**recorder(tmp_path / "inbox"))
        await until(all_settled, 2)


async def test_the_time_limit_ends_the_program_and_counts_as_a_failure(tmp_path: Path) -> None:
    await sync_to_async(set_agent)(**recorder(tmp_path / "inbox", 60), timeout_seconds=1)
    async with serving(HeartbeatLoop()):
        await sync_to_async(wake)("slow")
        await until(lambda: Heartbeat.objects.filter(status=HeartbeatStatus.FAILED).exists())
    heartbeat = await Heartbeat.objects.aget()
    assert heartbeat.error == "no answer within 1 s"


async def test_stopping_gives_the_work_back_without_using_up_an_attempt(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    await sync_to_async(set_agent)(**recorder(inbox, 60))
    async with serving(HeartbeatLoop()):
        await sync_to_async(wake)("interrupted")
        await until(lambda: len(recorded(inbox)) == 1)
    session = await Session.objects.aget(key="agent:main:x")
    assert (session.queued, session.attempts, session.lease_token) == (1, 0, None)
    assert (await Heartbeat.objects.aget()).status == HeartbeatStatus.RELEASED
    await sync_to_async(set_agent)(**recorder(inbox))
    async with serving(HeartbeatLoop()):
        await until(all_settled)
    assert len(recorded(inbox)) == 2


async def test_a_lost_lease_ends_the_run_and_refuses_its_outcome(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    await sync_to_async(set_agent)(**recorder(inbox, 60))
    lease = timedelta(seconds=1)
    async with serving(HeartbeatLoop(lease=lease)):
        await sync_to_async(wake)("taken away")
        await until(lambda: len(recorded(inbox)) == 1)
        # Another process believes that this one is dead.
        await sync_to_async(queue.reap)(
            now=datetime.now(UTC) + 3 * lease, lease=3 * lease, max_attempts={"main": 8}
        )
        await sync_to_async(set_agent)(**recorder(inbox))
        await until(all_settled)
    statuses = [heartbeat.status async for heartbeat in Heartbeat.objects.order_by("pk")]
    assert statuses == [HeartbeatStatus.LOST, HeartbeatStatus.QUIET]


async def test_a_lease_is_renewed_for_as_long_as_its_program_runs(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    await sync_to_async(set_agent)(**recorder(inbox, 2.5))
    async with serving(HeartbeatLoop(lease=timedelta(seconds=1))):
        await sync_to_async(wake)("long")
        await until(all_settled)
    assert len(recorded(inbox)) == 1
    assert await Heartbeat.objects.acount() == 1


async def test_sessions_run_side_by_side_up_to_the_limit(tmp_path: Path) -> None:
    inbox = tmp_path / "inbox"
    stored = await sync_to_async(GatewaySettings.ensure)()
    stored.max_parallel_heartbeats = 3
    await stored.asave()
    await sync_to_async(set_agent)(**recorder(inbox, 0.3))
    running: list[int] = []

    def look() -> bool:
        running.append(Heartbeat.objects.filter(status=HeartbeatStatus.RUNNING).count())
        return all_settled()

    async with serving(HeartbeatLoop()):
        for number in range(7):
            await sync_to_async(wake)("x", f"s{number}")
        await until(look)
    assert max(running) == 3
    assert len(recorded(inbox)) == 7


async def test_a_defect_in_a_runner_is_a_failed_attempt() -> None:
    await sync_to_async(set_agent)(runner="command", command=["/bin/true"])
    # Not a list of texts: nothing but a defect elsewhere could store it.
    await Agent.objects.filter(pk="main").aupdate(command=[1, None])
    await sync_to_async(configuration.gateway.forget)()
    loop = HeartbeatLoop()
    await sync_to_async(wake)("x")
    assert await loop.run_once() == 1
    await loop.close()
    heartbeat = await Heartbeat.objects.aget()
    assert heartbeat.status == HeartbeatStatus.FAILED


async def test_an_agent_that_hangs_in_all_its_sessions_leaves_room_for_others(
    tmp_path: Path,
) -> None:
    stored = await sync_to_async(GatewaySettings.ensure)()
    stored.max_parallel_heartbeats = 4
    await stored.asave()
    await sync_to_async(set_agent)(**recorder(tmp_path / "hangs", 60))
    await sync_to_async(set_agent)("ops", **recorder(tmp_path / "inbox"))
    async with serving(HeartbeatLoop()):
        for number in range(8):
            await sync_to_async(wake)("x", f"s{number}")
        await until(lambda: len(recorded(tmp_path / "hangs")) == 3)
        await sync_to_async(wake)("me too", "x", agent="ops")
        await until(lambda: len(recorded(tmp_path / "inbox")) == 1, 2)
    assert len(recorded(tmp_path / "hangs")) == 3


async def test_a_clock_that_is_set_forward_takes_no_lease_from_a_living_process(
    tmp_path: Path,
) -> None:
    """Another process is frozen for a moment; this one sees the clock leap by an hour."""
    inbox, lease = tmp_path / "inbox", timedelta(seconds=1.5)
    await sync_to_async(set_agent)(**recorder(inbox), heartbeat_every=timedelta(0))
    await sync_to_async(wake)("elsewhere")
    (elsewhere,) = await sync_to_async(queue.claim)(
        terms("main"), limit=1, owner="other", now=datetime.now(UTC), lease=lease
    )
    leap = [timedelta(0)]
    async with serving(HeartbeatLoop(clock=lambda: datetime.now(UTC) + leap[0], lease=lease)):
        await asyncio.sleep(0.6)
        leap[0] = timedelta(hours=1)
        await asyncio.sleep(0.8)
        now = datetime.now(UTC) + leap[0]
        assert await sync_to_async(queue.renew)([elsewhere], now=now, lease=lease)
        await sync_to_async(queue.settle)(elsewhere, HeartbeatStatus.DELIVERED, now=now)
    assert recorded(inbox) == []


async def test_a_clock_that_is_set_back_stalls_neither_schedules_nor_retries(
    tmp_path: Path,
) -> None:
    inbox = tmp_path / "inbox"
    await sync_to_async(set_agent)(**recorder(inbox), timeout_seconds=600)
    await sync_to_async(wake)("once more")
    (first,) = await sync_to_async(queue.claim)(
        terms("main"), limit=1, owner="other", now=datetime.now(UTC),
        lease=timedelta(seconds=15),
    )  # fmt: skip
    back = [timedelta(0)]
    async with serving(HeartbeatLoop(clock=lambda: datetime.now(UTC) - back[0])):
        await sync_to_async(queue.fail)(first, "no", now=datetime.now(UTC), max_attempts=8)
        back[0] = timedelta(minutes=55)
        await until(lambda: len(recorded(inbox)) == 1, 8)
    assert "once more" in recorded(inbox)[0]["prompt"]


async def test_a_loop_without_places_does_not_look_at_every_ring(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    looks: list[float] = []
    monkeypatch.setattr(pulse, "beat", lambda: looks.append(time.monotonic()))
    await sync_to_async(set_agent)(runner="none")
    async with serving(HeartbeatLoop()):
        await until(lambda: bool(looks))
        await asyncio.sleep(0.1)
        looks.clear()
        began = time.monotonic()
        for number in range(30):
            await sync_to_async(wake)(f"text {number}")
        # The slow poll looks, and nothing else.
        assert len(looks) <= (time.monotonic() - began) / POLL_SECONDS + 1
