"""The heartbeat loop: claims due sessions, runs their heartbeats side by side, settles them.

Any number of loops, in any number of processes, share the work through the leases in the
database. All database work of a loop happens on one thread of its own, so that the event loop
that also serves connections never waits for the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import math
import os
import secrets
import socket
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Any, Final, ParamSpec, TypeVar

from django.conf import settings
from django.db import DatabaseError, connections
from django.utils import timezone

from wake import configuration, doorbell, queue, schedule
from wake.configuration import AgentConfiguration, GatewayConfiguration
from wake.errors import LeaseLost, QueueFull
from wake.heartbeats import pulse, reaches, replies, transcripts, turns
from wake.heartbeats.prompt import build_prompt, is_quiet
from wake.heartbeats.runners import (
    Delivered,
    Failed,
    Lost,
    Outcome,
    Reach,
    Returned,
    Runner,
    Turn,
    make_runner,
)
from wake.models import HeartbeatStatus, RunnerKind
from wake.queue import Claim, Settlement
from wake.session_keys import SessionKey
from wake.threads import call_in

logger = logging.getLogger(__name__)

# The slow poll behind the doorbell. A configuration snapshot is at most half a second old, so a
# change of an agent is in force within one second.
POLL_SECONDS: Final = 0.4
# From one look at what is due to the next it lets others have the database for as long as it took,
# at most so long: under load a look takes more at once, and wakes are stored meanwhile.
MOST_SECONDS_APART: Final = 0.05
# More are not settled in one transaction, unless they are those of one run.
MOST_EVENTS_AT_ONCE: Final = 200
UPKEEP_SECONDS: Final = 2.0
SCHEDULES_SECONDS: Final = 60.0
REACH_SECONDS: Final = 30.0
STOP_SECONDS: Final = 5.0
CLOCK_JUMP: Final = timedelta(seconds=1)
DATABASE_RETRY_SECONDS: Final = 1.0

P = ParamSpec("P")
T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class _Step:
    """What waits for a transaction: what is to be done in it, and the claim that it settles."""

    do: Settlement | Callable[[], Any]
    claim: Claim | None
    done: asyncio.Future[Any]


class HeartbeatLoop:
    """One worker. `run` serves until `stop` is called; then it gives its work back and returns.

    It serves the agents that have one of these `kinds` of runners. `clock`
    gives the present time; tests pass their own. `lease` is how long a run survives the
    silence of its process (by default the setting HEARTBEAT_LEASE_SECONDS); it is renewed at a
    third of that.
    """

    def __init__(
        self,
        *,
        clock: Callable[[], datetime] = timezone.now,
        lease: timedelta | None = None,
        kinds: Collection[RunnerKind] = tuple(RunnerKind),
    ) -> None:
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._kinds = frozenset(kinds)
        self._clock = clock
        self._lease = lease or timedelta(seconds=settings.HEARTBEAT_LEASE_SECONDS)
        self._stopping = asyncio.Event()
        self._give_up_at = math.inf
        self._look_again = asyncio.Event()
        # Where there are none, nothing that rings is of use until a run ends or is given a place.
        self._has_places = True
        self._runs: set[asyncio.Task[None]] = set()
        # Until their leases are given back, so that upkeep renews them to the end.
        self._handing_over: dict[Claim, asyncio.Task[Outcome]] = {}
        self._runners: dict[RunnerKind, Runner] = {}
        # The configuration whose schedules are kept, and when to look at them again.
        self._scheduled: tuple[GatewayConfiguration | None, float] = (None, 0.0)
        self._reap_from = 0.0
        # What was last said about how agents are reached, and when to say it again.
        self._reached: tuple[dict[str, Reach], float] = ({}, 0.0)
        # Steps that wait for their transaction, and who takes them there.
        self._steps: list[_Step] = []
        self._stepping: asyncio.Task[None] | None = None
        self._database = ThreadPoolExecutor(max_workers=1, thread_name_prefix="heartbeats-database")

    def stop(self) -> None:
        """Ask the loop to end. Runs under way are ended and their events given back.

        A database that does not take that within a few seconds is not waited for: the leases run
        out by themselves.
        """
        self._give_up_at = time.monotonic() + STOP_SECONDS
        self._stopping.set()
        self._look_again.set()

    async def run(self) -> None:
        """Serve until stopped. Neither a failing database nor a defect ends it: it starts again."""
        logger.info("heartbeats: %s started", self.owner)
        upkeep = asyncio.create_task(self._keep_up())
        try:
            while not self._stopping.is_set():
                try:
                    await self._serve()
                except Exception:
                    logger.exception("heartbeats: serving failed; starting again")
                    await asyncio.sleep(DATABASE_RETRY_SECONDS)
        finally:
            # First, so that giving back does not wait behind it: the rest is shorter than a lease.
            upkeep.cancel()
            await asyncio.gather(upkeep, return_exceptions=True)
            for handing_over in self._handing_over.values():
                handing_over.cancel()
            await asyncio.gather(*self._runs, return_exceptions=True)
            await self.close()
            logger.info("heartbeats: %s stopped", self.owner)

    async def _serve(self) -> None:
        """Start what is due, and wait for the doorbell or the next due time, until stopped."""
        async with doorbell.listen(lambda _: self._look_again.set(), self._awaits_ring):
            while not self._stopping.is_set():
                self._look_again.clear()
                began = time.monotonic()
                pause = await self._start_due()
                pulse.beat()
                await asyncio.sleep(min(time.monotonic() - began, MOST_SECONDS_APART))
                if pause and not self._look_again.is_set():
                    with contextlib.suppress(TimeoutError):
                        async with asyncio.timeout(pause):
                            await self._look_again.wait()

    def _awaits_ring(self) -> bool:
        return self._has_places and not self._look_again.is_set()

    async def run_once(self) -> int:
        """Claim what is due, run it to its end, and return how many heartbeats there were."""
        await self._in_database(self._upkeep_step)
        await self._start_due()
        started = list(self._runs)
        await asyncio.gather(*started)
        return len(started)

    async def close(self) -> None:
        """Let go of the runners and of the database thread; no run is under way."""
        for runner in self._runners.values():
            await runner.close()
        with contextlib.suppress(DatabaseError):
            await self._in_database(self._note_reach, {})
        await self._in_database(connections.close_all)
        self._database.shutdown()

    # --- Claiming -------------------------------------------------------------------------------

    async def _start_due(self) -> float:
        """Claim and start what is due and fits; return the seconds until there may be more.

        1. Read the configuration; paused, disabled and unreachable agents are passed over.
        2. Claim up to the number of free places, and start a task for each claim.
        3. With places left, sleep until the next due time; with none, until a run ends. Either
           way look again soon: the configuration may have changed.
        """
        snapshot = configuration.gateway.at_hand()
        if snapshot is None:
            snapshot = await self._in_database(configuration.gateway)
        # What is only left to be stored takes no place: its agent has done its part.
        running = Counter(
            claim.session.agent_id
            for claim, handing_over in self._handing_over.items()
            if not handing_over.done()
        )
        terms = self._terms(snapshot, running)
        free = snapshot.max_parallel_heartbeats - running.total()
        self._has_places = bool(snapshot.heartbeats_enabled and terms and free > 0)
        if not self._has_places:
            return POLL_SECONDS
        claims, pause = await self._together(lambda: self._claim_step(terms, free))
        for claim in claims:
            agent = snapshot.agents[claim.session.agent_id]
            turn = self._turn(claim, agent)
            self._handing_over[claim] = asyncio.create_task(self._hand_over(claim, turn))
            run = asyncio.create_task(self._run(claim, turn))
            self._runs.add(run)
            run.add_done_callback(self._ended)
        return pause

    def _terms(
        self, snapshot: GatewayConfiguration, running: Mapping[str, int]
    ) -> dict[str, queue.Terms]:
        """Return on what terms to claim for the agents that have a place here."""
        served = [agent for agent in snapshot.agents.values() if agent.runner in self._kinds]
        agents = [agent for agent in served if agent.runs]
        for kind in self._runners.keys() | {agent.runner for agent in agents}:
            self._runner(kind).keep([agent for agent in agents if agent.runner == kind])
        places = snapshot.max_parallel_heartbeats
        # One that hangs in all its sessions leaves places for others, up to half of them.
        each = max(1, places - min(len(agents) - 1, places // 2))
        terms = {}
        for agent in agents:
            here = self._runner(agent.runner).places(agent)
            most = each if here is None else min(each, here)
            if running.get(agent.id, 0) < min(most, agent.max_parallel_runs or most):
                terms[agent.id] = queue.Terms(
                    running=running.get(agent.id, 0),
                    most=most,
                    max_parallel_runs=agent.max_parallel_runs,
                    max_runs_per_minute=agent.max_runs_per_minute,
                    only_with_events=agent.only_with_events,
                    runner=agent.runner,
                )
        return terms

    def _claim_step(self, terms: Mapping[str, queue.Terms], free: int) -> tuple[list[Claim], float]:
        now = self._clock()
        first = queue.first_due(terms)
        due_at = queue.next_due(first)
        if due_at is None:
            return [], POLL_SECONDS
        if due_at > now:
            return [], min((due_at - now).total_seconds(), POLL_SECONDS)
        claims = queue.claim(
            terms, limit=free, owner=self.owner, now=now, lease=self._lease, first=first
        )
        return claims, 0.0 if claims else POLL_SECONDS

    def _turn(self, claim: Claim, agent: AgentConfiguration) -> Turn:
        limit = agent.timeout.total_seconds()
        if claim.turn and claim.turn.timeout_seconds:
            limit = claim.turn.timeout_seconds
        return Turn(
            run_id=claim.run_id,
            agent=agent,
            session_key=claim.session.key,
            reason=claim.reason.value,
            attempt=claim.attempt,
            prompt=build_prompt(claim.events, agent.heartbeat_prompt, secrets.token_hex(8)),
            events=claim.events,
            limit=limit,
        )

    def _ended(self, run: asyncio.Task[None]) -> None:
        self._runs.discard(run)
        self._look_again.set()
        if not run.cancelled() and (error := run.exception()):
            logger.error("heartbeats: a run ended in a defect", exc_info=error)

    # --- Running --------------------------------------------------------------------------------

    async def _run(self, claim: Claim, turn: Turn) -> None:
        """See one heartbeat to its end.

        1. Wait until the runner has handed it over. Upkeep cancels that when the lease is lost,
           `run` when the loop stops.
        2. Settle the outcome, or give the claim back when the handing over was cancelled.
        """
        handing_over = self._handing_over[claim]
        await asyncio.wait([handing_over])
        self._look_again.set()
        is_kept = False
        try:
            outcome = Returned() if handing_over.cancelled() else handing_over.result()
            logger.info(
                "heartbeats: run %s of %s: %s, %d events, attempt %d",
                claim.run_id,
                claim.session.key,
                type(outcome).__name__.lower(),
                len(claim.events),
                claim.attempt,
                extra=_ids(claim),
            )
            if isinstance(outcome, Failed | Lost):  # it may quote what the agent was given
                logger.debug(
                    "heartbeats: run %s: %s", claim.run_id, outcome.error, extra=_ids(claim)
                )
            is_kept = await self._settle(claim, self._ending(claim, turn, outcome))
        finally:
            del self._handing_over[claim]
            self._runner(turn.agent.runner).settled(claim.run_id, is_kept=is_kept)

    async def _hand_over(self, claim: Claim, turn: Turn) -> Outcome:
        """Return how the runner ended. A defect or a time-out in it is a failed attempt."""
        if turn.agent.runner == RunnerKind.CHAT:
            try:
                transcript = await self._in_database(
                    transcripts.read, claim.session_id, turn.agent.transcript_bytes
                )
            except DatabaseError as error:
                logger.warning("heartbeats: run %s cannot begin: %s", claim.run_id, error)
                return Returned()
            turn = replace(turn, transcript=transcript)
        try:
            async with asyncio.timeout(turn.limit) as timer:
                return await self._runner(turn.agent.runner).run(turn)
        except Exception as error:
            if isinstance(error, TimeoutError) and timer.expired():
                return Failed(f"no answer within {turn.limit:g} s")
            ids = {"run_id": turn.run_id, "agent_id": turn.agent.id}
            logger.exception("heartbeats: run %s: defect in its runner", turn.run_id, extra=ids)
            return Failed(f"the {turn.agent.runner} runner failed: {type(error).__name__}: {error}")

    def _runner(self, kind: RunnerKind) -> Runner:
        if kind not in self._runners:
            self._runners[kind] = make_runner(kind, self._look_again.set)
        return self._runners[kind]

    async def _settle(self, claim: Claim, step: Settlement | Callable[[], None]) -> bool:
        """Call a settling step until the database takes it; False when the lease is lost.

        Upkeep renews the lease meanwhile, so an outcome is not lost to a busy database.
        """
        while True:
            try:
                await self._together(step, claim)
            except LeaseLost as lost:
                logger.warning("heartbeats: %s; its outcome was refused", lost, extra=_ids(claim))
            except DatabaseError as error:
                if time.monotonic() < self._give_up_at:
                    waits = "heartbeats: run %s is not settled yet: %s"
                    logger.warning(waits, claim.run_id, error, extra=_ids(claim))
                    await asyncio.sleep(DATABASE_RETRY_SECONDS)
                    continue
                left = "heartbeats: run %s is left to its lease: %s"
                logger.warning(left, claim.run_id, error, extra=_ids(claim))
            else:
                return True
            return False

    async def _together(self, do: Settlement | Callable[[], T], claim: Claim | None = None) -> T:
        """Take a step in one transaction with those that came while the last one ran.

        `claim` is the one that it settles. Returns its result, None for a settlement. Raises
        LeaseLost or DatabaseError; then nothing of the step is stored.
        """
        step = _Step(do, claim, asyncio.get_running_loop().create_future())
        self._steps.append(step)
        if self._stepping is None:
            self._stepping = asyncio.create_task(self._take_steps())
        result: T = await step.done
        return result

    async def _take_steps(self) -> None:
        while self._steps:
            # Those that go on with what the last transaction gave them come along.
            await asyncio.sleep(0)
            count = _few(self._steps)
            gathered, self._steps = self._steps[:count], self._steps[count:]
            for step, result in zip(gathered, await self._results_of(gathered), strict=True):
                if step.done.done():  # whoever waited was cancelled
                    continue
                if isinstance(result, Exception):
                    step.done.set_exception(result)
                else:
                    step.done.set_result(result)
        self._stepping = None

    async def _results_of(self, steps: Sequence[_Step]) -> Sequence[Any]:
        """Return what each step returns or raises."""
        try:
            return await self._in_database(
                queue.together,
                [step.do for step in steps],
                sessions={step.claim.session_id for step in steps if step.claim},
                now=self._clock(),
            )
        except Exception as error:
            if len(steps) == 1:
                return [error]
        # It may be one of them: each for itself.
        return [result for step in steps for result in await self._results_of([step])]

    def _ending(
        self, claim: Claim, turn: Turn, outcome: Outcome
    ) -> Settlement | Callable[[], None]:
        """Return what settles an outcome."""
        if not isinstance(outcome, Delivered):
            return lambda: self._settle_step(claim, turn, outcome)
        reply = outcome.reply
        status = HeartbeatStatus.QUIET if is_quiet(reply) else HeartbeatStatus.DELIVERED
        is_posted = bool(turn.agent.reply_url and reply.strip()) and status != HeartbeatStatus.QUIET
        is_noted = bool(claim.turn and claim.turn.deliver)

        def then() -> None:
            now = self._clock()
            if is_posted:
                replies.queue_reply(claim.run_id, now=now)
            if is_noted:
                self._note_step(claim, now)

        return Settlement(
            claim,
            status,
            prompt=turn.prompt,
            reply=reply,
            next_scheduled=self._next_scheduled(claim, self._clock()),
            then=then if is_posted or is_noted else None,
        )

    def _settle_step(self, claim: Claim, turn: Turn, outcome: Failed | Lost | Returned) -> None:
        """Settle what was not delivered."""
        now = self._clock()
        limit = turn.agent.max_attempts
        match outcome:
            case Returned(handed_over):
                queue.release(claim, now=now, handed_over=handed_over)
                return
            case Lost(error):
                queue.lose(claim, error, now=now, max_attempts=limit)
            case Failed():
                queue.fail(
                    claim,
                    outcome.error,
                    now=now,
                    max_attempts=limit,
                    permanent=outcome.permanent,
                    retry_after=outcome.retry_after,
                    handed_over=outcome.handed_over,
                    is_about_one=outcome.is_about_one,
                    prompt=turn.prompt,
                    next_scheduled=self._next_scheduled(claim, now),
                )
        if claim.turn and claim.turn.deliver:
            self._note_step(claim, now)

    def _note_step(self, claim: Claim, now: datetime) -> None:
        """Write the note about a turn that ended. It is settled: upkeep tries again what fails."""
        try:
            turns.note_turn(claim.events[0].pk, configuration.gateway(), now)
        except (DatabaseError, QueueFull) as error:
            waits = "heartbeats: the note about run %s waits: %s"
            logger.warning(waits, claim.run_id, error, extra=_ids(claim))

    def _next_scheduled(self, claim: Claim, now: datetime) -> datetime | None:
        """Return the session's next scheduled heartbeat, if it is its agent's main session."""
        snapshot = configuration.gateway()
        agent = snapshot.agents.get(claim.session.agent_id)
        if agent is None or claim.session != snapshot.main_session(agent.id):
            return None
        return schedule.next_due(agent.id, agent.schedule, now)

    # --- Upkeep ---------------------------------------------------------------------------------

    async def _keep_up(self) -> None:
        """Every third of a lease: renew, end the runs that lost theirs, and look after the rest."""
        watch = _ClockWatch(self._clock)
        while True:
            try:
                handing_over = dict(self._handing_over)
                renewed = await self._in_database(
                    queue.renew, list(handing_over), now=self._clock(), lease=self._lease
                )
                for claim, task in handing_over.items():
                    # Once: a second cancellation would cut short how the runner ends its run.
                    if claim.run_id not in renewed and not task.cancelling():
                        task.cancel()
                await self._in_database(self._after_clock_jump, watch.jump())
                await self._in_database(self._upkeep_step)
                await self._in_database(self._note_reach, self._reach_now())
            except DatabaseError as error:
                logger.warning("heartbeats: upkeep failed: %s; trying again", error)
            except Exception:
                logger.exception("heartbeats: upkeep failed; trying again")
            await asyncio.sleep(min(UPKEEP_SECONDS, self._lease.total_seconds() / 3))

    def _after_clock_jump(self, jump: timedelta) -> None:
        """Make good what a clock that was set would otherwise do to leases and retries."""
        if not jump:
            return
        logger.warning("heartbeats: the clock was set by %s", jump)
        if jump > timedelta(0):
            # Leases of living processes look old now; let those renew them first.
            self._reap_from = time.monotonic() + self._lease.total_seconds()
        else:
            queue.turn_back_retries(-jump, now=self._clock())

    def _reach_now(self) -> dict[str, Reach]:
        """Return how the agents are reached from here, where that is not the same for all."""
        snapshot, _ = self._scheduled
        reached = {
            agent.id: self._runners[agent.runner].reach(agent)
            for agent in (snapshot.agents.values() if snapshot else ())
            if agent.runs and agent.runner in self._runners
        }
        return {agent_id: reach for agent_id, reach in reached.items() if reach is not None}

    def _note_reach(self, reached: dict[str, Reach]) -> None:
        """Tell the others, when it is news and every so often."""
        said, again_at = self._reached
        if reached == said and (not said or time.monotonic() < again_at):
            return
        reaches.note(self.owner, reached, self._clock())
        self._reached = reached, time.monotonic() + REACH_SECONDS

    def _upkeep_step(self) -> None:
        """Reap lost leases, correct due times after a clock jump, keep schedules, write notes."""
        snapshot = configuration.gateway()
        now = self._clock()
        limits = {agent.id: agent.max_attempts for agent in snapshot.agents.values()}
        if time.monotonic() >= self._reap_from:
            lost = queue.reap(now=now, lease=self._lease, max_attempts=limits)
            if lost:
                logger.warning("heartbeats: took back %d leases that ran out", lost)
        if ahead := queue.correct_due_times(now=now):
            logger.warning("heartbeats: brought %d due times back from the future", ahead)
        scheduled_for, again_at = self._scheduled
        if scheduled_for != snapshot or time.monotonic() >= again_at:
            queue.lift_holds(_limits(snapshot), now=now)
            queue.keep_schedules(_schedules(snapshot, now), now=now)
            self._scheduled = snapshot, time.monotonic() + SCHEDULES_SECONDS
        # Those of turns that died with their process, and those that could not be written before.
        turns.note_ended_turns(snapshot, now)

    async def _in_database(self, step: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `step` on the loop's database thread."""
        return await call_in(self._database, step, *args, **kwargs)


def _few(steps: Sequence[_Step]) -> int:
    """Return how many of the steps, at least one, are few enough to store at once. Pure.

    Who else writes waits for them: on SQLite every wake does.
    """
    events = 0
    for place, step in enumerate(steps):
        events += len(step.claim.events) if step.claim else 1
        if place and events > MOST_EVENTS_AT_ONCE:
            return place
    return len(steps)


def _ids(claim: Claim) -> dict[str, object]:
    """Return what a log line about a run has as fields of its own."""
    return {
        "run_id": claim.run_id,
        "session_key": claim.session.key,
        "agent_id": claim.session.agent_id,
    }


def _limits(snapshot: GatewayConfiguration) -> dict[str, tuple[int | None, int | None]]:
    """Return each agent's limits that hold sessions back. Pure."""
    return {
        agent.id: (agent.max_runs_per_minute, agent.max_self_wakes)
        for agent in snapshot.agents.values()
    }


def _schedules(snapshot: GatewayConfiguration, now: datetime) -> dict[SessionKey, datetime | None]:
    """Return every agent's main session, with its next scheduled heartbeat or None. Pure."""
    return {
        snapshot.main_session(agent.id): (
            schedule.next_due(agent.id, agent.schedule, now) if agent.enabled else None
        )
        for agent in snapshot.agents.values()
    }


class _ClockWatch:
    """Tells by how much the clock was set, by comparing it with one that cannot be."""

    def __init__(self, clock: Callable[[], datetime]) -> None:
        self._clock = clock
        self._seen = clock(), time.monotonic()

    def jump(self) -> timedelta:
        """Return by how much the clock was set since the last call; zero for less than a second."""
        before, steady_before = self._seen
        self._seen = now, steady_now = self._clock(), time.monotonic()
        jump = (now - before) - timedelta(seconds=steady_now - steady_before)
        return jump if abs(jump) >= CLOCK_JUMP else timedelta(0)
