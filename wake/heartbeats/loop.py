"""The heartbeat loop: claims due sessions, runs their heartbeats side by side, settles them.

Any number of loops, in any number of processes, share the work through the leases in the
database. All database work of a loop happens on one thread of its own, so that the event loop
that also serves connections never waits for the database.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import socket
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timedelta
from typing import Final, ParamSpec, TypeVar
from uuid import UUID

from django.conf import settings
from django.db import connections
from django.utils import timezone

from wake import configuration, doorbell, queue, schedule
from wake.configuration import AgentConfiguration, GatewayConfiguration
from wake.errors import LeaseLost
from wake.heartbeats.prompt import build_prompt, is_quiet
from wake.heartbeats.runners import Delivered, Failed, Outcome, Runner, Turn, make_runner
from wake.models import HeartbeatStatus, RunnerKind
from wake.queue import Claim
from wake.threads import call_in

logger = logging.getLogger(__name__)

# The slow poll behind the doorbell. A configuration snapshot is at most half a second old, so a
# change of an agent is in force within one second.
POLL_SECONDS: Final = 0.4
UPKEEP_SECONDS: Final = 2.0
SCHEDULES_EVERY: Final = timedelta(minutes=1)
DATABASE_RETRY_SECONDS: Final = 1.0

P = ParamSpec("P")
T = TypeVar("T")


class HeartbeatLoop:
    """One worker. `run` serves until `stop` is called; then it gives its work back and returns.

    `clock` gives the present time; tests pass their own. `lease` is how long a run survives the
    silence of its process (by default the setting HEARTBEAT_LEASE_SECONDS); it is renewed at a
    third of that.
    """

    def __init__(
        self, *, clock: Callable[[], datetime] = timezone.now, lease: timedelta | None = None
    ) -> None:
        self.owner = f"{socket.gethostname()}:{os.getpid()}:{secrets.token_hex(4)}"
        self._clock = clock
        self._lease = lease or timedelta(seconds=settings.HEARTBEAT_LEASE_SECONDS)
        self._stopping = asyncio.Event()
        self._look_again = asyncio.Event()
        self._runs: set[asyncio.Task[None]] = set()
        # Until their leases are given back, so that upkeep renews them to the end.
        self._handing_over: dict[UUID, asyncio.Task[Outcome]] = {}
        self._runners: dict[RunnerKind, Runner] = {}
        self._scheduled: tuple[GatewayConfiguration, datetime] | None = None
        self._database = ThreadPoolExecutor(max_workers=1, thread_name_prefix="heartbeats-database")

    def stop(self) -> None:
        """Ask the loop to end. Runs under way are ended and their events given back."""
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
            for handing_over in self._handing_over.values():
                handing_over.cancel()
            await asyncio.gather(*self._runs, return_exceptions=True)
            upkeep.cancel()
            await asyncio.gather(upkeep, return_exceptions=True)
            await self.close()
            logger.info("heartbeats: %s stopped", self.owner)

    async def _serve(self) -> None:
        """Start what is due, and wait for the doorbell or the next due time, until stopped."""
        async with doorbell.listen(self._look_again):
            while not self._stopping.is_set():
                self._look_again.clear()
                pause = await self._start_due()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(self._look_again.wait(), pause)

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
        snapshot, claims, pause = await self._in_database(self._claim_step, len(self._runs))
        for claim in claims:
            run = asyncio.create_task(self._run(claim, snapshot.agents[claim.session.agent_id]))
            self._runs.add(run)
            run.add_done_callback(self._ended)
        return pause

    def _claim_step(self, running: int) -> tuple[GatewayConfiguration, list[Claim], float]:
        snapshot = configuration.gateway()
        now = self._clock()
        agents = [agent.id for agent in snapshot.agents.values() if agent.runs]
        free = snapshot.max_parallel_heartbeats - running
        if not snapshot.heartbeats_enabled or not agents or free <= 0:
            return snapshot, [], POLL_SECONDS
        due_at = queue.next_due(agents)
        if due_at is None:
            return snapshot, [], POLL_SECONDS
        if due_at > now:
            return snapshot, [], min((due_at - now).total_seconds(), POLL_SECONDS)
        claims = queue.claim(agents, limit=free, owner=self.owner, now=now, lease=self._lease)
        return snapshot, claims, POLL_SECONDS

    def _ended(self, run: asyncio.Task[None]) -> None:
        self._runs.discard(run)
        self._look_again.set()
        if not run.cancelled() and (error := run.exception()):
            logger.error("heartbeats: a run ended in a defect", exc_info=error)

    # --- Running --------------------------------------------------------------------------------

    async def _run(self, claim: Claim, agent: AgentConfiguration) -> None:
        """Run one heartbeat to its end.

        1. Build the prompt, with a token of its own.
        2. Let the runner hand it over. Upkeep cancels that when the lease is lost, `run` when the
           loop stops.
        3. Settle the outcome, or give the claim back when the handing over was cancelled.
        """
        prompt = build_prompt(claim.events, agent.heartbeat_prompt, secrets.token_hex(8))
        turn = Turn(
            run_id=claim.run_id,
            agent=agent,
            session_key=claim.session.key,
            reason=claim.reason.value,
            attempt=claim.attempt,
            prompt=prompt,
            events=claim.events,
        )
        handing_over = asyncio.create_task(self._hand_over(turn))
        self._handing_over[claim.run_id] = handing_over
        await asyncio.wait([handing_over])
        try:
            await self._settle(claim, self._settling_step(claim, agent, prompt, handing_over))
        finally:
            del self._handing_over[claim.run_id]

    def _settling_step(
        self,
        claim: Claim,
        agent: AgentConfiguration,
        prompt: str,
        handing_over: asyncio.Task[Outcome],
    ) -> Callable[[], None]:
        if handing_over.cancelled():
            return lambda: queue.release(claim, now=self._clock())
        outcome = handing_over.result()
        logger.info(
            "heartbeats: run %s of %s: %s, %d events, attempt %d",
            claim.run_id,
            claim.session.key,
            "delivered" if isinstance(outcome, Delivered) else f"failed: {outcome.error[:200]!r}",
            len(claim.events),
            claim.attempt,
        )
        return lambda: self._settle_step(claim, agent, prompt, outcome)

    async def _hand_over(self, turn: Turn) -> Outcome:
        """Return how the runner ended. A defect or a time-out in it is a failed attempt."""
        limit = turn.agent.timeout.total_seconds()
        try:
            async with asyncio.timeout(limit) as timer:
                return await self._runner(turn.agent.runner).run(turn)
        except Exception as error:
            if isinstance(error, TimeoutError) and timer.expired():
                return Failed(f"no answer within {limit:g} s")
            logger.exception("heartbeats: run %s: defect in its runner", turn.run_id)
            return Failed(f"the {turn.agent.runner} runner failed: {type(error).__name__}: {error}")

    def _runner(self, kind: RunnerKind) -> Runner:
        if kind not in self._runners:
            self._runners[kind] = make_runner(kind)
        return self._runners[kind]

    async def _settle(self, claim: Claim, step: Callable[[], None]) -> None:
        """Call a settling step until the database takes it, or the lease is lost.

        Upkeep renews the lease meanwhile, so an outcome is not lost to a busy database.
        """
        while True:
            try:
                await self._in_database(step)
            except LeaseLost as lost:
                logger.warning("heartbeats: %s; its outcome was refused", lost)
            except Exception:
                logger.exception("heartbeats: run %s is not settled; trying again", claim.run_id)
                await asyncio.sleep(DATABASE_RETRY_SECONDS)
                continue
            return

    def _settle_step(
        self, claim: Claim, agent: AgentConfiguration, prompt: str, outcome: Outcome
    ) -> None:
        now = self._clock()
        scheduled = self._next_scheduled(claim, now)
        if isinstance(outcome, Delivered):
            quiet = is_quiet(outcome.reply)
            queue.settle(
                claim,
                HeartbeatStatus.QUIET if quiet else HeartbeatStatus.DELIVERED,
                now=now,
                prompt=prompt,
                reply=outcome.reply,
                next_scheduled=scheduled,
            )
        else:
            queue.fail(
                claim,
                outcome.error,
                now=now,
                max_attempts=agent.max_attempts,
                permanent=outcome.permanent,
                retry_after=outcome.retry_after,
                prompt=prompt,
                next_scheduled=scheduled,
            )

    def _next_scheduled(self, claim: Claim, now: datetime) -> datetime | None:
        """Return the session's next scheduled heartbeat, if it is its agent's main session."""
        snapshot = configuration.gateway()
        agent = snapshot.agents.get(claim.session.agent_id)
        if agent is None or claim.session != snapshot.main_session(agent.id):
            return None
        return schedule.next_due(agent.id, agent.heartbeat_every, now)

    # --- Upkeep ---------------------------------------------------------------------------------

    async def _keep_up(self) -> None:
        """Every third of a lease: renew, end the runs that lost theirs, and look after the rest."""
        while True:
            try:
                handing_over = dict(self._handing_over)
                renewed = await self._in_database(
                    queue.renew, list(handing_over), now=self._clock(), lease=self._lease
                )
                for run_id, task in handing_over.items():
                    if run_id not in renewed:
                        task.cancel()
                await self._in_database(self._upkeep_step)
            except Exception:
                logger.exception("heartbeats: upkeep failed; trying again")
            await asyncio.sleep(min(UPKEEP_SECONDS, self._lease.total_seconds() / 3))

    def _upkeep_step(self) -> None:
        """Reap lost leases, correct due times after a clock jump, keep the schedules."""
        snapshot = configuration.gateway()
        now = self._clock()
        limits = {agent.id: agent.max_attempts for agent in snapshot.agents.values()}
        if lost := queue.reap(now=now, lease=self._lease, max_attempts=limits):
            logger.warning("heartbeats: took back %d leases that ran out", lost)
        if ahead := queue.correct_due_times(now=now):
            logger.warning("heartbeats: brought %d due times back from the future", ahead)
        if self._scheduled is None or self._scheduled[0] != snapshot or self._scheduled[1] <= now:
            self._keep_schedules(snapshot, now)
            self._scheduled = snapshot, now + SCHEDULES_EVERY

    def _keep_schedules(self, snapshot: GatewayConfiguration, now: datetime) -> None:
        for agent in snapshot.agents.values():
            every = agent.heartbeat_every if agent.enabled else timedelta(0)
            scheduled = schedule.next_due(agent.id, every, now)
            queue.keep_schedule(snapshot.main_session(agent.id), scheduled, now=now)

    async def _in_database(self, step: Callable[P, T], /, *args: P.args, **kwargs: P.kwargs) -> T:
        """Call `step` on the loop's database thread."""
        return await call_in(self._database, step, *args, **kwargs)
