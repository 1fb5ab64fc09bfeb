"""The inbox runner: a program that is connected to this gateway takes the turn.

A client attaches to an agent with `agent.attach` (wake/gateway/methods/inbox.py) and says how many
turns it takes at a time. Each turn is told to one client, which has a lease on it: it lasts as long
as a heartbeat's own, and each sign of progress extends it. The turn is lost when the lease runs
out or the connection ends; then the session is due again at once, for another client.

A client that let a lease run out gets no further turns until it is heard of again: it may be
frozen, and would use up the attempts of one session after the other.

Only the process that holds a client's connection reaches it. All of this lives on its event loop.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Final
from uuid import UUID
from weakref import WeakKeyDictionary

from django.conf import settings

from wake.configuration import AgentConfiguration
from wake.errors import LeaseLost
from wake.heartbeats.runners import Lost, Outcome, Reach, Returned, Runner, Turn
from wake.heartbeats.runners.wire import as_json

MAX_CAPACITY: Final = 1000

Tell = Callable[[str, object], None]


@dataclass(eq=False, slots=True)
class _Run:
    """A turn that a client has, or had and that is not settled yet.

    Of the futures, `outcome` is how it ended and `is_kept` whether that was stored. `limit_at` is
    when the loop ends it, in the event loop's time.
    """

    id: str
    limit_at: float
    outcome: asyncio.Future[Outcome]
    is_kept: asyncio.Future[bool]
    lease: asyncio.TimerHandle | None = None


@dataclass(eq=False, slots=True)
class _Client:
    """What one connection takes of one agent; `tell` sends it an event."""

    tell: Tell
    capacity: int = 0
    is_silent: bool = False
    # When it was given its last turn, by the count of all turns.
    given_at: int = 0
    runs: dict[str, _Run] = field(default_factory=dict)

    @property
    def takes(self) -> int:
        """How many turns it may have now."""
        return 0 if self.is_silent else self.capacity


class Inbox:
    """The clients that are attached on one event loop, and the turns that they have.

    `lease` is how many seconds a turn survives the silence of its client.
    """

    def __init__(self, lease: float) -> None:
        self.lease = lease
        # By connection and agent.
        self._clients: dict[str, dict[str, _Client]] = {}
        self._unsettled: dict[str, _Run] = {}
        self._given = 0
        self.look_again: set[Callable[[], None]] = set()

    # --- Who is there ---------------------------------------------------------------------------

    def attach(self, connection_id: str, agent_id: str, capacity: int, tell: Tell) -> int:
        """Let a connection take `capacity` turns of an agent at a time.

        Returns how many of them it has already.
        """
        clients = self._clients.setdefault(connection_id, {})
        client = clients.setdefault(agent_id, _Client(tell))
        client.capacity = capacity
        self._hear_of(connection_id)
        self._look_again()
        return len(client.runs)

    def detach(self, connection_id: str, agent_id: str) -> int:
        """Give a connection no further turns of an agent; return how many it still has."""
        client = self._clients.get(connection_id, {}).get(agent_id)
        if client is None:
            return 0
        client.capacity = 0
        return len(client.runs)

    def leave(self, connection_id: str, outcome: Outcome) -> None:
        """Forget a connection. The turns that it has end with `outcome`."""
        for client in self._clients.pop(connection_id, {}).values():
            client.capacity = 0
            for run in client.runs.values():
                _end(run, outcome)

    def places(self, agent_id: str) -> int:
        """Return how many turns of the agent can be under way.

        A client that takes no further one counts with those that it has.
        """
        return sum(max(client.takes, len(client.runs)) for client in self._of(agent_id))

    def reach(self, agent_id: str) -> Reach:
        """Return how many clients take turns of the agent, and how many turns in all."""
        attached = [client for client in self._of(agent_id) if client.capacity]
        capacity = sum(client.takes for client in attached)
        problem = ""
        if not capacity:
            problem = "its clients do not answer" if attached else "no client is attached"
        return Reach(clients=len(attached), capacity=capacity, problem=problem)

    def _of(self, agent_id: str) -> Iterator[_Client]:
        for clients in self._clients.values():
            if client := clients.get(agent_id):
                yield client

    def _least_loaded(self, agent_id: str) -> _Client | None:
        """Return the client with a free place that has the smallest share of its places taken.

        Among equals that is the one with the most free places, then the one that waited longest.
        """
        free = [client for client in self._of(agent_id) if len(client.runs) < client.takes]
        return min(
            free,
            key=lambda client: (
                len(client.runs) / client.capacity,
                len(client.runs) - client.capacity,
                client.given_at,
            ),
            default=None,
        )

    def _hear_of(self, connection_id: str) -> None:
        """Give a client turns again that was silent."""
        silent = [one for one in self._clients.get(connection_id, {}).values() if one.is_silent]
        for client in silent:
            client.is_silent = False
        if silent:
            self._look_again()

    def _look_again(self) -> None:
        for look_again in self.look_again:
            look_again()

    # --- Turns ----------------------------------------------------------------------------------

    async def run(self, turn: Turn) -> Outcome:
        """Give a turn to a client and return how it ended; undone where no client is free."""
        client = self._least_loaded(turn.agent.id)
        if client is None:
            return Returned()
        self._given += 1
        client.given_at = self._given
        loop = asyncio.get_running_loop()
        run = _Run(
            str(turn.run_id),
            limit_at=loop.time() + turn.limit,
            outcome=loop.create_future(),
            is_kept=loop.create_future(),
        )
        client.runs[run.id] = self._unsettled[run.id] = run
        lease = {
            "deadlineMs": self._extend(run, client),
            "timeoutMs": int(turn.limit * 1000),
        }
        client.tell("heartbeat.run", as_json(turn) | lease)
        try:
            return await run.outcome
        except asyncio.CancelledError:
            self.settled(run.id, is_kept=False)
            _tell_lost(client, run, "the gateway ended it")
            raise
        finally:
            del client.runs[run.id]
            if run.lease:
                run.lease.cancel()

    def progress(self, connection_id: str, run_id: str) -> int:
        """Extend the lease on a turn; return for how many milliseconds. Raises LeaseLost."""
        client, run = self._held(connection_id, run_id)
        return self._extend(run, client)

    async def done(self, connection_id: str, run_id: str, outcome: Outcome) -> None:
        """End a turn with what its client says, and return when that is stored.

        A client that gives a turn back is taken to stop: it gets no further ones until it attaches
        again. Raises LeaseLost when the turn is not the client's any more, and nothing is stored.
        """
        client, run = self._held(connection_id, run_id)
        if isinstance(outcome, Returned):
            client.capacity = 0
        _end(run, outcome)
        if not await run.is_kept:
            raise _lost(run_id)

    def settled(self, run_id: str, *, is_kept: bool) -> None:
        """Take note that the outcome of a turn is stored, or is not and never will be."""
        run = self._unsettled.pop(run_id, None)
        if run and not run.is_kept.done():
            run.is_kept.set_result(is_kept)

    def _held(self, connection_id: str, run_id: str) -> tuple[_Client, _Run]:
        self._hear_of(connection_id)
        for client in self._clients.get(connection_id, {}).values():
            run = client.runs.get(run_id)
            if run and not run.outcome.done():
                return client, run
        raise _lost(run_id)

    def _extend(self, run: _Run, client: _Client) -> int:
        """Renew the lease, and return how many milliseconds it lasts."""
        loop = asyncio.get_running_loop()
        if run.lease:
            run.lease.cancel()
        left = max(0.0, run.limit_at - loop.time())
        if self.lease < left:  # else the loop ends it at its limit
            run.lease = loop.call_later(self.lease, self._run_out, run, client)
        return int(min(self.lease, left) * 1000)

    def _run_out(self, run: _Run, client: _Client) -> None:
        if run.outcome.done() or run.lease is None:
            return
        if asyncio.get_running_loop().time() - run.lease.when() > self.lease / 3:
            # This process was held up. What clients sent meanwhile is still to be read.
            self._extend(run, client)
            return
        client.is_silent = True
        _end(run, Lost(f"its client gave no sign for {self.lease:g} s"))
        _tell_lost(client, run, "its lease ran out")


def _end(run: _Run, outcome: Outcome) -> None:
    if not run.outcome.done():
        run.outcome.set_result(outcome)


def _tell_lost(client: _Client, run: _Run, reason: str) -> None:
    client.tell("heartbeat.lost", {"runId": run.id, "reason": reason})


def _lost(run_id: str) -> LeaseLost:
    return LeaseLost(f"run {run_id[:100]} is not yours any more: its lease ran out")


_inboxes: WeakKeyDictionary[asyncio.AbstractEventLoop, Inbox] = WeakKeyDictionary()


def of_this_loop() -> Inbox:
    """Return the inbox of the running event loop."""
    loop = asyncio.get_running_loop()
    inbox = _inboxes.get(loop)
    if inbox is None:
        inbox = _inboxes[loop] = Inbox(settings.HEARTBEAT_LEASE_SECONDS)
    return inbox


class InboxRunner(Runner):
    """Hands turns to the clients that are attached on this event loop."""

    def __init__(self, look_again: Callable[[], None] = lambda: None) -> None:
        super().__init__(look_again)
        self._inbox = of_this_loop()
        self._inbox.look_again.add(look_again)

    def places(self, agent: AgentConfiguration) -> int:
        return self._inbox.places(agent.id)

    def reach(self, agent: AgentConfiguration) -> Reach:
        return self._inbox.reach(agent.id)

    async def run(self, turn: Turn) -> Outcome:
        return await self._inbox.run(turn)

    def settled(self, run_id: UUID, *, is_kept: bool) -> None:
        self._inbox.settled(str(run_id), is_kept=is_kept)

    async def close(self) -> None:
        self._inbox.look_again.discard(self.look_again)
