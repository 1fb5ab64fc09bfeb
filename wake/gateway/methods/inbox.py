"""Clients that take an agent's heartbeats: they attach, get runs, and say what became of each.

The runs themselves are in `wake.heartbeats.runners.inbox`.
"""

from __future__ import annotations

from datetime import timedelta
from enum import StrEnum
from typing import Annotated

from msgspec import Meta

from wake import configuration
from wake.configuration import AgentConfiguration
from wake.errors import AgentError
from wake.gateway.frames import Error, Frame, NonEmpty
from wake.gateway.methods.registry import Caller, MethodRefused, method
from wake.gateway.scopes import WRITE
from wake.heartbeats.runners import (
    MAX_ERROR_CHARACTERS,
    MAX_REPLY_BYTES,
    Delivered,
    Failed,
    Outcome,
    Returned,
    cut,
    inbox,
)
from wake.models import RunnerKind
from wake.queue import RETRY_AFTER_LIMIT

_MAX_RETRY_AFTER_MS = int(RETRY_AFTER_LIMIT.total_seconds() * 1000)


class AttachParams(Frame):
    agent_id: NonEmpty
    capacity: Annotated[int, Meta(ge=1, le=inbox.MAX_CAPACITY)] = 1


@method("agent.attach", scope=WRITE, params=AttachParams, for_agents=True)
async def attach(params: AttachParams, caller: Caller) -> object:
    """This connection gets heartbeats of the agent, whose runner must be `inbox`, as the event
    `heartbeat.run`: at most `capacity` at a time, 1 unless said otherwise. Again, it changes
    the capacity. `ok`, `agentId`, `capacity`, `running` (how many it has already), `leaseMs`,
    `maxReplyBytes`."""
    agent_id = _own_agent(params.agent_id, caller)
    agent = await caller.link.in_database(_agent_with_inbox, agent_id)
    here = inbox.of_this_loop()
    running = here.attach(caller.connection_id, agent.id, params.capacity, caller.link.tell)
    return {
        "ok": True,
        "agentId": agent.id,
        "capacity": params.capacity,
        "running": running,
        "leaseMs": int(here.lease * 1000),
        "maxReplyBytes": MAX_REPLY_BYTES,
    }


class DetachParams(Frame):
    agent_id: NonEmpty


@method("agent.detach", scope=WRITE, params=DetachParams, for_agents=True)
async def detach(params: DetachParams, caller: Caller) -> object:
    """No further heartbeats of the agent; those that this connection has go on. `ok`, `agentId`,
    `running` (how many these are)."""
    agent_id = _own_agent(params.agent_id, caller)
    running = inbox.of_this_loop().detach(caller.connection_id, agent_id)
    return {"ok": True, "agentId": agent_id, "running": running}


class RunParams(Frame):
    run_id: NonEmpty


@method("heartbeat.progress", scope=WRITE, params=RunParams, for_agents=True)
async def progress(params: RunParams, caller: Caller) -> object:
    """The lease on a run begins anew, up to the run's time limit. `ok`, `runId`, `deadlineMs`."""
    deadline_ms = inbox.of_this_loop().progress(caller.connection_id, params.run_id)
    return {"ok": True, "runId": params.run_id, "deadlineMs": deadline_ms}


class Status(StrEnum):
    """What became of a run, as its client says."""

    DELIVERED = "delivered"
    FAILED = "failed"
    RETURNED = "returned"


class DoneParams(RunParams):
    status: Status
    reply: str | None = None
    error: str | None = None
    permanent: bool | None = None
    retry_after_ms: Annotated[int, Meta(ge=0, le=_MAX_RETRY_AFTER_MS)] | None = None


@method("heartbeat.done", scope=WRITE, params=DoneParams, for_agents=True)
async def done(params: DoneParams, caller: Caller) -> object:
    """The end of a run: the turn was taken (`reply`), or failed (`error`; with `permanent` another
    try cannot help; `retryAfterMs` lengthens the wait), or comes back undone from a client that
    stops, and counts as no attempt. `ok` and `runId`, once the outcome is stored."""
    await inbox.of_this_loop().done(caller.connection_id, params.run_id, _outcome(params))
    return {"ok": True, "runId": params.run_id}


def _outcome(said: DoneParams) -> Outcome:
    if said.status == Status.RETURNED:
        return Returned()
    if said.status == Status.DELIVERED:
        return Delivered(cut(said.reply or ""))
    reason = cut((said.error or "").strip()[:MAX_ERROR_CHARACTERS])
    return Failed(
        reason or "its client gave no reason",
        permanent=bool(said.permanent),
        retry_after=timedelta(milliseconds=said.retry_after_ms) if said.retry_after_ms else None,
    )


def _own_agent(agent_id: str, caller: Caller) -> str:
    """Return the agent's id. A token that is bound to another agent is refused."""
    wanted = agent_id.strip().lower()
    bound_to = caller.credential.agent_id
    if bound_to and wanted != bound_to:
        message = f'this token is for agent "{bound_to}" only'
        raise MethodRefused(
            Error(code="FORBIDDEN", message=message, details={"code": "AGENT_MISMATCH"})
        )
    return wanted


def _agent_with_inbox(agent_id: str) -> AgentConfiguration:
    """Return the agent as it is now. Raises AgentError, naming it, when no client may attach."""
    agent = configuration.gateway.refresh().agent(agent_id)
    if agent.runner != RunnerKind.INBOX:
        raise AgentError(f'agent "{agent.id}" has the runner {agent.runner}, not inbox')
    return agent
